"""Prompts of every family, as transformers, diffusers and ComfyUI read them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from tiny_tokenizers import CLIP_MERGES, clip_tokenizer, t5_tokenizer, write_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from darkroom_engine.networks import HostNetworks
from darkroom_engine.prompts import PromptEncoder

HIDDEN = "encoder_hidden_states"
TOLERANCE = 1e-5
LONG_TOLERANCE = 5e-5
"""Of calls with another number of rows, whose sums are taken in another order."""
NUM_LAYERS = 3
CLIP_SKIPS = (0, 1, 2)
T5_LENGTH = 256
SD3_WIDTH = 96

LONG = "a large red circle on the mat "


class TorchTextEncoders(HostNetworks):
    """Text encoders in PyTorch, called as the exported ones are."""

    def __init__(self, modules: Mapping[str, Any], *, is_last_layer_used: bool) -> None:
        """`is_last_layer_used`: as in Stable Diffusion 1; later ones use the one before it."""
        self._modules = modules
        self._is_last_layer_used = is_last_layer_used

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """They always are."""

    def run(
        self, network: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        module = self._modules[network]
        with torch.no_grad():
            answer = module(torch.from_numpy(inputs["input_ids"]), output_hidden_states=True)
            made = {"last_hidden_state": answer.last_hidden_state}
            layers = answer.hidden_states
            if self._is_last_layer_used:
                norm = module.text_model.final_layer_norm
                made["hidden_states"] = torch.stack([norm(layer) for layer in layers], dim=1)
            else:
                made["hidden_states"] = torch.stack(layers[:-1], dim=1)
                made["penultimate_hidden_state"] = layers[-2]
            if isinstance(module, CLIPTextModelWithProjection):
                made["text_embeds"] = answer.text_embeds
        return [made[name].numpy() for name in outputs]


@dataclass
class Family:
    """A pipeline of diffusers, of text encoders alone, and the engine's encoder of the same."""

    pipeline: Any
    encoder: PromptEncoder
    text: dict[str, Any]

    def by_diffusers(self, text: str, **options: Any) -> list[dict[str, np.ndarray]]:
        """The conditioning of a text, and that of the negative prompt."""
        # Stable Diffusion 1 and 3 have no defaults for all that they do not need.
        given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if isinstance(self.pipeline, StableDiffusion3Pipeline):
            given |= {"prompt_2": None, "prompt_3": None}
        with torch.no_grad():
            found = [
                tensor.numpy() for tensor in self.pipeline.encode_prompt(text, **given, **options)
            ]
        rows = [{HIDDEN: hidden[0]} for hidden in found[:2]]
        for row, (pooled,) in zip(rows, found[2:], strict=False):
            row[self.text["pooled_input"]] = pooled
        return rows


def clip_module(kind: type, tokenizer: Any, width: int, act: str, seed: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=width - 8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = strengthened(kind(config), seed)
    if not hasattr(module, "text_model"):
        # diffusers' clip_skip reaches through a layer that transformers 5 gave up.
        object.__setattr__(module, "text_model", module)
    return module


def t5_module(tokenizer: Any, seed: int) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=SD3_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    return strengthened(T5EncoderModel(config), seed)


def strengthened(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights of a strength at which every layer and every token shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


def encoder_record(name: str, tokenizer: Any, folder: Path, **options: Any) -> dict[str, Any]:
    kind = options.get("kind", "clip")
    path = folder / f"{name}.json"
    return {
        "network": name,
        "kind": kind,
        "tokenizer": write_tokenizer(tokenizer, path, T5_LENGTH if kind == "t5" else 77),
        "hidden": "last_hidden_state",
        "layers": "hidden_states",
        "pooled": None,
        **options,
    }


PENULTIMATE = {"hidden": "penultimate_hidden_state"}
POOLED = PENULTIMATE | {"pooled": "text_embeds"}
UNUSED = {"vae": None, "scheduler": None}


def first_tokenizer(folder: Path) -> Any:
    return clip_tokenizer(folder / "tokenizer", CLIP_MERGES)


def second_tokenizer(folder: Path) -> Any:
    """Another padding and fewer merges, hence another number of tokens of a text."""
    return clip_tokenizer(folder / "tokenizer_2", CLIP_MERGES[:3], pad_token="!")  # noqa: S106  a token of text


def family_of(pipeline: Any, records: list[dict[str, Any]], folder: Path, **options: Any) -> Family:
    text = {
        "encoders": records,
        "pooled_input": None,
        "empty_negative": "encode",
        "num_blank_tokens": 0,
        **options,
    }
    networks = TorchTextEncoders(
        {record["network"]: getattr(pipeline, record["network"]) for record in records},
        is_last_layer_used=records[0]["hidden"] == "last_hidden_state",
    )
    return Family(pipeline, PromptEncoder.from_config(text, folder, networks, 2**26), text)


def sd1(folder: Path) -> Family:
    tokenizer = first_tokenizer(folder)
    pipeline = StableDiffusionPipeline(
        text_encoder=clip_module(CLIPTextModel, tokenizer, 32, "quick_gelu", seed=1),
        tokenizer=tokenizer,
        unet=None,
        **UNUSED,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    record = encoder_record("text_encoder", tokenizer, folder)
    return family_of(pipeline, [record], folder, hidden_size=32)


def sdxl(folder: Path, *, is_zeros: bool = True) -> Family:
    tokenizer, tokenizer_2 = first_tokenizer(folder), second_tokenizer(folder)
    pipeline = StableDiffusionXLPipeline(
        text_encoder=clip_module(CLIPTextModel, tokenizer, 32, "quick_gelu", seed=1),
        tokenizer=tokenizer,
        text_encoder_2=clip_module(CLIPTextModelWithProjection, tokenizer_2, 48, "gelu", seed=2),
        tokenizer_2=tokenizer_2,
        unet=None,
        **UNUSED,
        force_zeros_for_empty_prompt=is_zeros,
        add_watermarker=False,
    )
    records = [
        encoder_record("text_encoder", tokenizer, folder, **PENULTIMATE),
        encoder_record("text_encoder_2", tokenizer_2, folder, **POOLED),
    ]
    return family_of(
        pipeline,
        records,
        folder,
        hidden_size=32 + 48,
        pooled_input="text_embeds",
        empty_negative="zeros" if is_zeros else "encode",
    )


def sdxl_without_zeros(folder: Path) -> Family:
    return sdxl(folder, is_zeros=False)


def sdxl_refiner(folder: Path) -> Family:
    tokenizer = second_tokenizer(folder)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_module(CLIPTextModelWithProjection, tokenizer, 48, "gelu", seed=2),
        tokenizer_2=tokenizer,
        unet=None,
        **UNUSED,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    record = encoder_record("text_encoder_2", tokenizer, folder, **POOLED)
    return family_of(pipeline, [record], folder, hidden_size=48, pooled_input="text_embeds")


def sd3(folder: Path, *, has_t5: bool = True) -> Family:
    tokenizer, tokenizer_2 = first_tokenizer(folder), second_tokenizer(folder)
    tokenizer_3 = t5_tokenizer(folder / "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        text_encoder=clip_module(CLIPTextModelWithProjection, tokenizer, 32, "quick_gelu", seed=1),
        tokenizer=tokenizer,
        text_encoder_2=clip_module(CLIPTextModelWithProjection, tokenizer_2, 48, "gelu", seed=2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_module(tokenizer_3, seed=3) if has_t5 else None,
        tokenizer_3=tokenizer_3 if has_t5 else None,
        # It is asked for its width where T5 is not there.
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=SD3_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=24 + 40,
        ),
        **UNUSED,
    )
    records = [
        encoder_record("text_encoder", tokenizer, folder, **POOLED),
        encoder_record("text_encoder_2", tokenizer_2, folder, **POOLED),
    ]
    if has_t5:
        t5 = encoder_record("text_encoder_3", tokenizer_3, folder, kind="t5", layers=None)
        records.append(t5)
    return family_of(
        pipeline,
        records,
        folder,
        hidden_size=SD3_WIDTH,
        pooled_input="pooled_projections",
        num_blank_tokens=0 if has_t5 else T5_LENGTH,
    )


def sd3_without_t5(folder: Path) -> Family:
    return sd3(folder, has_t5=False)


FAMILIES = (sd1, sdxl, sdxl_without_zeros, sdxl_refiner, sd3, sd3_without_t5)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return request.param(tmp_path_factory.mktemp("family"))


def assert_same(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: float = TOLERANCE,
) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].shape == array.shape
        assert np.abs(actual[name] - array).max() <= tolerance


TEXTS = {
    "empty": "",
    "words": "a red cat sat on the mat",
    "too long": "the cat sat on a mat " * 40,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_prompt_is_diffusers(family: Family, name: str) -> None:
    expected, _ = family.by_diffusers(TEXTS[name])

    assert_same(family.encoder.encode(TEXTS[name]), expected)


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("name", TEXTS)
def test_clip_skip_is_diffusers(family: Family, name: str, clip_skip: int) -> None:
    expected, _ = family.by_diffusers(TEXTS[name], clip_skip=clip_skip)

    assert_same(family.encoder.encode(TEXTS[name], clip_skip), expected)


@pytest.mark.parametrize("negative_prompt", [None, "", "the mat", "a mat " * 60])
def test_a_negative_prompt_is_diffusers(family: Family, negative_prompt: str | None) -> None:
    _, expected = family.by_diffusers("a red cat", negative_prompt=negative_prompt, clip_skip=1)

    # As in diffusers, whose clip_skip is the prompt's alone.
    assert_same(family.encoder.encode(negative_prompt), expected)


def test_only_sdxl_makes_zeros_of_what_is_left_out(family: Family) -> None:
    left_out = family.encoder.encode(None).values()

    is_zeros = family.text["empty_negative"] == "zeros"
    assert all(array.any() != is_zeros for array in left_out)
    assert all(array.any() for array in family.encoder.encode("").values())


def test_each_layer_and_each_text_is_another(family: Family) -> None:
    """Else the comparisons above would say nothing."""
    encode = family.encoder.encode
    found = [encode("a red cat", clip_skip)[HIDDEN] for clip_skip in CLIP_SKIPS]
    found.append(encode("a red mat")[HIDDEN])

    for index, first in enumerate(found):
        for second in found[:index]:
            assert np.abs(first - second).max() > 0.1


Segments = list[tuple[str, float]]


@dataclass
class Reader:
    """One text encoder, as ComfyUI uses it, by transformers alone."""

    record: Mapping[str, Any]
    tokenizer: Any
    module: Any

    @property
    def is_clip(self) -> bool:
        return bool(self.record["kind"] == "clip")

    @property
    def room(self) -> int:
        """Tokens of a chunk, without its begin and its end."""
        return int(self.record["tokenizer"]["max_length"]) - (2 if self.is_clip else 1)

    def tokens(self, segments: Segments) -> list[tuple[int, float]]:
        return [
            (token, weight)
            for text, weight in segments
            for token in self.tokenizer(text, add_special_tokens=False).input_ids
        ]

    def read(
        self, segments: Segments, clip_skip: int, num_chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (N L, C), and those that are pooled, (P,)."""
        tokens = self.tokens(segments)
        begin = [(self.tokenizer.bos_token_id, 1.0)] if self.is_clip else []
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        starts = range(0, num_chunks * self.room, self.room)
        chunks = [[*begin, *tokens[start : start + self.room], (end, 1.0)] for start in starts]
        chunks.append([*begin, (end, 1.0)])
        for chunk in chunks:
            chunk.extend([(pad, 1.0)] * (self.room + len(begin) + 1 - len(chunk)))
        ids = torch.tensor([[token for token, _ in chunk] for chunk in chunks])
        with torch.no_grad():
            answer = self.module(ids, output_hidden_states=True)
            hidden = self._hidden(answer, clip_skip).clone()
        empty = hidden[-1]
        for row, chunk in enumerate(chunks[:-1]):
            for position, (_, weight) in enumerate(chunk):
                if weight != 1.0:
                    difference = hidden[row, position] - empty[position]
                    hidden[row, position] = difference * weight + empty[position]
        pooled = answer.text_embeds[0] if self.record["pooled"] else None
        return torch.cat(list(hidden[:-1])), pooled

    def _hidden(self, answer: Any, clip_skip: int) -> torch.Tensor:
        if not self.is_clip:
            return answer.last_hidden_state
        if self.record["hidden"] == "last_hidden_state":
            return self.module.text_model.final_layer_norm(answer.hidden_states[-(clip_skip + 1)])
        return answer.hidden_states[-(clip_skip + 2)]


def readers(family: Family) -> list[Reader]:
    found = []
    for record in family.text["encoders"]:
        name = record["network"]
        tokenizer = getattr(family.pipeline, name.replace("text_encoder", "tokenizer"))
        found.append(Reader(record, tokenizer, getattr(family.pipeline, name)))
    return found


def num_chunks_of(family: Family, segments: Segments) -> int:
    """As many as the CLIP encoder needs that makes most tokens of a text, four at the most."""
    needed = [
        math.ceil(len(reader.tokens(segments)) / reader.room)
        for reader in readers(family)
        if reader.is_clip
    ]
    return min(4, max(1, *needed))


def by_comfyui(family: Family, segments: Segments, clip_skip: int) -> dict[str, np.ndarray]:
    """The whole conditioning: the parts of the encoders, joined as diffusers joins them."""
    num_chunks = num_chunks_of(family, segments)
    clip, others, pooled = [], [], []
    for reader in readers(family):
        hidden, summary = reader.read(segments, clip_skip, num_chunks if reader.is_clip else 1)
        (clip if reader.is_clip else others).append(hidden)
        if summary is not None:
            pooled.append(summary)
    width = family.text["hidden_size"]
    side_by_side = torch.cat(clip, dim=1)
    padded = torch.nn.functional.pad(side_by_side, (0, width - side_by_side.shape[1]))
    blank = torch.zeros(family.text["num_blank_tokens"], width)
    conditioning = {HIDDEN: torch.cat([padded, *others, blank]).numpy()}
    if pooled:
        conditioning[family.text["pooled_input"]] = torch.cat(pooled).numpy()
    return conditioning


@pytest.mark.parametrize("clip_skip", CLIP_SKIPS)
@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", []),
        ("a red cat", [("a red cat", 1)]),
        ("a (red:1.4) cat", [("a", 1), ("red", 1.4), ("cat", 1)]),
        (
            "((a red:0.5) cat:-2) (on) the mat",
            [("a red", -1), ("cat", -2), ("on", 1.1), ("the mat", 1)],
        ),
        (LONG * 6, [(LONG * 6, 1)]),
        (
            f"{LONG * 3}({LONG * 3}:0.7){LONG}",
            [(LONG * 3, 1), (LONG * 3, 0.7), (LONG, 1)],
        ),
        (f"({LONG * 30}:1.2)", [(LONG * 30, 1.2)]),
    ],
    ids=["empty", "plain", "weighted", "nested", "long", "long and weighted", "too long"],
)
def test_weights_and_long_prompts_are_comfyuis(
    family: Family, text: str, segments: Segments, clip_skip: int
) -> None:
    expected = by_comfyui(family, segments, clip_skip)

    assert_same(family.encoder.encode(text, clip_skip, 4), expected, LONG_TOLERANCE)


def test_the_long_prompts_are_of_many_chunks(family: Family) -> None:
    lengths = [num_chunks_of(family, [(LONG * count, 1)]) for count in (1, 6, 30)]

    assert lengths[0] == 1
    assert 1 < lengths[1] < lengths[2] == 4


@pytest.mark.parametrize("family", [sdxl], indirect=True)
def test_sdxls_tokenizers_may_need_other_numbers_of_chunks(family: Family) -> None:
    text = "the mat sat " * 30
    first, second = (len(reader.tokens([(text, 1)])) for reader in readers(family))

    assert math.ceil(first / 75) < math.ceil(second / 75)
    assert_same(
        family.encoder.encode(text, 0, 4), by_comfyui(family, [(text, 1)], 0), LONG_TOLERANCE
    )
