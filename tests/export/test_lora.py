"""LoRA files, against diffusers and peft: fused at the export, or mixed row by row."""

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import triton_python_backend_utils as pb_utils
from google.protobuf import text_format
from onnx_networks import start_network
from safetensors.torch import load_file, save_file
from torch import nn
from tritonclient.grpc import model_config_pb2

from darkroom_export import ExportError, Precision, export_checkpoint
from darkroom_export.families import FAMILIES
from darkroom_export.lora import (
    LoraFile,
    add_adapters,
    add_lora_inputs,
    check_adapters,
    convert_adapter,
    load_and_fuse,
)
from darkroom_export.lora_file import _sgm_name
from darkroom_export.lora_inputs import adaptable_layers
from darkroom_export.networks import InputShape, NetworkSpec, network_specs
from darkroom_export.repository import write_network_model
from darkroom_export.to_onnx import export_onnx

ROOT = Path(__file__).parents[2]

Changes = dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]
"""Down and up weights by network and path."""
Networks = Mapping[str, Callable[[str], bool]]
"""Which layers of which networks are changed."""

ATTENTION = re.compile(r".*attn\d?\.to_(q|k|v|out\.0)")
TEXT_ATTENTION = re.compile(r".*self_attn\.(q|k|v|out)_proj")


def load(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def sd15(make_checkpoint: Callable[[str], Path]) -> Any:
    return load(make_checkpoint("tiny-sd15"))


@pytest.fixture(scope="session")
def sdxl(make_checkpoint: Callable[[str], Path]) -> Any:
    return load(make_checkpoint("tiny-sdxl"))


@pytest.fixture(scope="session")
def sd3(make_checkpoint: Callable[[str], Path]) -> Any:
    return load(make_checkpoint("tiny-sd3"))


def layers_of(network: nn.Module) -> dict[str, Any]:
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def random_changes(pipeline: Any, networks: Networks, rank: int = 4, seed: int = 0) -> Changes:
    """Of convolutions as trainers write them: the down weight has the kernel's size."""
    generator = torch.Generator().manual_seed(seed)

    def change(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [1] * (weight.ndim - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *ends, generator=generator)
        return down / down[0].numel() ** 0.5, 0.3 * up

    return {
        network: {
            path: change(layer.weight)
            for path, layer in layers_of(getattr(pipeline, network)).items()
            if is_changed(path)
        }
        for network, is_changed in networks.items()
    }


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata or None)
    return path


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def in_full(network: str, path: str) -> str:
    """A text encoder's path as files have it: transformers 5 gives up its first part."""
    is_flat = network.startswith("text") and not path.startswith("text_")
    return f"text_model.{path}" if is_flat else path


def kohya(changes: Changes, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    tensors = {}
    for network, layers in changes.items():
        for path, (down, up) in layers.items():
            name = f"{KOHYA[network]}_{in_full(network, path).replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(changes: Changes) -> dict[str, torch.Tensor]:
    tensors = {}
    for network, layers in changes.items():
        for path, (down, up) in layers.items():
            name = f"{network}.{in_full(network, path)}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def new_diffusers(changes: Changes) -> dict[str, torch.Tensor]:
    tensors = {}
    for network, layers in changes.items():
        part = "lora_linear_layer" if network.startswith("text") else "lora"
        for path, (down, up) in layers.items():
            name = f"{network}.{in_full(network, path)}.{part}"
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors


def old_diffusers(changes: Changes) -> dict[str, torch.Tensor]:
    """As its attention processors were saved."""
    tensors = {}
    for network, layers in changes.items():
        for path, (down, up) in layers.items():
            head, _, end = in_full(network, path).removesuffix(".0").rpartition(".")
            end = end.replace("_proj", "") if end.endswith("_proj") else end.removeprefix("to_")
            place = "" if network.startswith("text") else ".processor"
            name = f"{network}.{head}{place}.to_{end}_lora"
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors


def unet_output(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    unet = pipeline.unet
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    added = None
    if unet.config.addition_embed_type == "text_time":
        width = pipeline.text_encoder_2.config.projection_dim
        added = {"text_embeds": torch.randn(2, width, generator=generator)}
        added["time_ids"] = 100 * torch.rand(2, 6, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([7.0, 700.0]), hidden, added_cond_kwargs=added)[0]


def text_output(text_encoder: Any) -> torch.Tensor:
    ids = torch.arange(77).repeat(2, 1)
    with torch.no_grad():
        return text_encoder(ids, output_hidden_states=True).hidden_states[-1]


def outputs(pipeline: Any) -> list[torch.Tensor]:
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    return [unet_output(pipeline), *(text_output(encoder) for encoder in encoders if encoder)]


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name in ("unet", "text_encoder")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def assert_changed(actual: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, before, strict=True):
        assert (ours - theirs).abs().max() > 1e-2


def everything(path: str) -> bool:
    return bool(path)


def all_that_diffusers_reads(path: str) -> bool:
    """It passes over these two in silence, but for their names in Stability AI's code."""
    return not path.startswith("add_embedding.")


def attention(path: str) -> bool:
    return ATTENTION.fullmatch(path) is not None


def text_attention(path: str) -> bool:
    return TEXT_ATTENTION.fullmatch(path) is not None


# Fused.


@pytest.mark.parametrize(
    ("form", "networks"),
    [
        # All layers, convolutions and those of the time too: what an LCM-LoRA changes.
        (kohya, {"unet": everything, "text_encoder": everything}),
        (peft, {"unet": everything, "text_encoder": text_attention}),
        (new_diffusers, {"unet": attention, "text_encoder": text_attention}),
        (old_diffusers, {"unet": attention, "text_encoder": text_attention}),
    ],
    ids=["kohya", "peft", "diffusers", "old diffusers"],
)
def test_a_fused_lora_gives_what_diffusers_gives_with_it_loaded(
    sd15: Any, tmp_path: Path, form: Any, networks: Networks
) -> None:
    path = write(tmp_path / "lora.safetensors", form(random_changes(sd15, networks)))
    loaded = copy.deepcopy(sd15)
    loaded.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="it")
    loaded.set_adapters(["it"], [0.7])
    fused = copy.deepcopy(sd15)

    touched = load_and_fuse(fused, [LoraFile(path, 0.7)])

    assert touched == ("unet", "text_encoder")
    assert_equal(outputs(fused), outputs(loaded))
    assert_changed(outputs(fused), outputs(sd15))


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
def test_several_loras_add_up_as_in_diffusers(sd15: Any, tmp_path: Path) -> None:
    scales = {"first": 0.5, "second": -0.8}
    loaded, fused = copy.deepcopy(sd15), copy.deepcopy(sd15)
    for seed, name in enumerate(scales):
        changes = random_changes(sd15, {"unet": attention}, rank=2 + seed, seed=seed)
        write(tmp_path / f"{name}.safetensors", kohya(changes))
        loaded.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    loaded.set_adapters(list(scales), list(scales.values()))

    files = [LoraFile(tmp_path / f"{name}.safetensors", scale) for name, scale in scales.items()]
    touched = load_and_fuse(fused, files)

    assert touched == ("unet",)
    assert_equal([unet_output(fused)], [unet_output(loaded)])


@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_alpha_over_rank_scales(sd15: Any, tmp_path: Path, alpha: float | None) -> None:
    changes = random_changes(sd15, {"unet": attention, "text_encoder": text_attention}, rank=4)
    path = write(tmp_path / "lora.safetensors", kohya(changes, alpha))
    fused = copy.deepcopy(sd15)

    load_and_fuse(fused, [LoraFile(path, 0.5)])

    for network, layers in changes.items():
        after, before = layers_of(getattr(fused, network)), layers_of(getattr(sd15, network))
        for name, (down, up) in layers.items():
            scale = 0.5 * (1 if alpha is None else alpha / 4)
            expected = before[name].weight + scale * up @ down
            torch.testing.assert_close(after[name].weight, expected)


def test_the_settings_that_peft_writes_scale_as_in_diffusers(sd15: Any, tmp_path: Path) -> None:
    changes = random_changes(sd15, {"unet": attention})
    settings = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1.5}}
    settings["unet.target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
    path = write(
        tmp_path / "lora.safetensors", peft(changes), lora_adapter_metadata=json.dumps(settings)
    )
    loaded, fused = copy.deepcopy(sd15), copy.deepcopy(sd15)
    loaded.load_lora_weights(tmp_path, weight_name=path.name)

    load_and_fuse(fused, [LoraFile(path)])

    assert_equal([unet_output(fused)], [unet_output(loaded)])
    assert_changed([unet_output(fused)], [unet_output(sd15)])


def test_all_of_sdxl_fuses_as_in_diffusers(sdxl: Any, tmp_path: Path) -> None:
    networks = {"unet": all_that_diffusers_reads, "text_encoder": text_attention}
    networks |= {"text_encoder_2": text_attention}
    tensors = kohya(random_changes(sdxl, networks))
    path = write(tmp_path / "lora.safetensors", tensors)
    loaded, fused = copy.deepcopy(sdxl), copy.deepcopy(sdxl)
    loaded.load_lora_weights(tmp_path, weight_name=path.name)

    assert load_and_fuse(fused, [LoraFile(path)]) == ("unet", "text_encoder", "text_encoder_2")

    assert_equal(outputs(fused), outputs(loaded))
    assert_changed(outputs(fused), outputs(sdxl))


def test_names_of_stability_ais_code_are_those_that_diffusers_reads(
    sdxl: Any, tmp_path: Path
) -> None:
    changes = random_changes(sdxl, {"unet": everything})["unet"]
    num_layers = sdxl.unet.config.layers_per_block
    ups = sdxl.unet.config.up_block_types
    with_attention = {str(n) for n, kind in enumerate(ups) if kind.startswith("CrossAttn")}
    tensors = {}
    for path, (down, up) in changes.items():
        name = f"lora_unet_{_sgm_name(path, num_layers, with_attention).replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    file = write(tmp_path / "lora.safetensors", tensors)
    loaded, fused = copy.deepcopy(sdxl), copy.deepcopy(sdxl)
    loaded.load_lora_weights(tmp_path, weight_name=file.name)

    load_and_fuse(fused, [LoraFile(file)])

    assert_equal([unet_output(fused)], [unet_output(loaded)])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("up_blocks.0.attentions.2.proj_in", "output_blocks.2.1.proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_layers_of_sdxl_have_the_names_of_stability_ais_code(path: str, name: str) -> None:
    assert _sgm_name(path, 2, {"0", "1"}) == name


def test_the_transformer_of_sd3_fuses_as_in_diffusers(sd3: Any, tmp_path: Path) -> None:
    changes = random_changes(sd3, {"transformer": attention})
    path = write(tmp_path / "lora.safetensors", peft(changes))
    loaded, fused = copy.deepcopy(sd3), copy.deepcopy(sd3)
    loaded.load_lora_weights(tmp_path, weight_name=path.name)
    loaded.fuse_lora(components=["transformer"])
    loaded.unload_lora_weights()

    assert load_and_fuse(fused, [LoraFile(path)]) == ("transformer",)

    after, expected = fused.transformer.state_dict(), loaded.transformer.state_dict()
    before = sd3.transformer.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {f"{name}.weight" for name in changes["transformer"]}
    torch.testing.assert_close(after, expected)


def test_half_precision_weights_take_the_sum_that_is_rounded_once(
    sd15: Any, tmp_path: Path
) -> None:
    changes = random_changes(sd15, {"unet": attention})
    path = write(tmp_path / "lora.safetensors", kohya(changes, alpha=None))
    half = copy.deepcopy(sd15).to(torch.float16)

    load_and_fuse(half, [LoraFile(path)])

    before, after = layers_of(sd15.unet), layers_of(half.unet)
    for name, (down, up) in changes["unet"].items():
        expected = (before[name].weight + up @ down).half()
        torch.testing.assert_close(after[name].weight, expected, atol=1e-6, rtol=1e-3)


# Refused.

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = f"lora_unet_{TO_Q.replace('.', '_')}"


def pair(name: str = NAME, width: int = 32, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(rank, width),
        f"{name}.lora_up.weight": torch.ones(width, rank),
    }


NOT_LORA = {
    f"{NAME}.dora_scale": "DoRA",
    f"unet.{TO_Q}.lora_magnitude_vector": "DoRA",
    f"{NAME}.hada_w1_a": "LoHa",
    f"{NAME}.lokr_w1": "LoKr",
    f"{NAME}.lora_mid.weight": "a Tucker decomposition",
    f"{NAME}.diff": "a difference of whole weights",
    f"unet.{TO_Q}.lora_B.bias": "a change of a bias",
}


@pytest.mark.parametrize(("key", "kind"), NOT_LORA.items(), ids=NOT_LORA.values())
def test_other_kinds_of_changes_are_named(sd15: Any, tmp_path: Path, key: str, kind: str) -> None:
    path = write(tmp_path / "lora.safetensors", pair() | {key: torch.ones(2, 2)})

    with pytest.raises(ExportError, match=rf"{re.escape(f'{path}: {key}')}: is {kind}, only LoRA"):
        load_and_fuse(sd15, [LoraFile(path)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        ({"conv_in.weight": torch.ones(2, 2)}, "conv_in.weight: is no key of a LoRA"),
        (pair() | pair("lora_unet_no_such_layer"), "of its 2 layers, 1 are none that can be"),
        (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "of its 1 layers, 1 are none"),
        (pair("unet.no.such.layer"), "here: unet.no.such.layer (is it of another family?)"),
        (pair("to_q"), "here: to_q"),
        (pair(width=48), f"{NAME}: 2x48 and 48x2 do not fit unet.{TO_Q} of 32x32"),
        (
            pair("lora_unet_conv_in", 4),
            "lora_unet_conv_in: 2x4 and 4x2 do not fit unet.conv_in of 32x4x3x3",
        ),
        (
            {f"{NAME}.lora_down.weight": torch.ones(2, 32)},
            f"{NAME}: has no up weight",
        ),
        ({f"{NAME}.alpha": torch.tensor(1.0)}, f"{NAME}: has no down weight"),
        (
            {**pair(), f"{NAME}.lora_up.weight": torch.ones(32, 3)},
            f"{NAME}: 2x32 and 32x3 are no down and up weights",
        ),
        (
            {**pair(), f"{NAME}.lora_up.weight": torch.full((32, 2), torch.inf)},
            f"{NAME}.lora_up.weight: is not finite",
        ),
        (
            {**pair(), f"{NAME}.lora_A.weight": torch.ones(2, 32)},
            "has two of its kind",
        ),
        (pair() | pair(f"unet.{TO_Q}"), f"changes unet.{TO_Q} a second time"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    sd15: Any, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    good = write(tmp_path / "good.safetensors", pair())
    bad = write(tmp_path / "bad.safetensors", tensors)
    before = weights(sd15)

    with pytest.raises(ExportError, match=rf"^{re.escape(str(bad))}: .*") as caught:
        load_and_fuse(sd15, [LoraFile(good), LoraFile(bad)])

    assert message in str(caught.value)
    torch.testing.assert_close(weights(sd15), before, rtol=0, atol=0)


def test_a_lora_of_sdxl_is_refused_by_stable_diffusion_1(
    sd15: Any, sdxl: Any, tmp_path: Path
) -> None:
    tensors = kohya(random_changes(sdxl, {"unet": attention, "text_encoder_2": text_attention}))
    path = write(tmp_path / "xl.safetensors", tensors, ss_base_model_version="sdxl_base_v1-0")

    with pytest.raises(ExportError, match=r"xl\.safetensors: .*it was made for sdxl_base_v1-0"):
        load_and_fuse(sd15, [LoraFile(path)])


@pytest.mark.parametrize("name", ["lora.ckpt", "lora.pt", "lora.bin"])
def test_pickles_are_refused(sd15: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(pair(), path)

    with pytest.raises(ExportError, match=rf"{name}: a LoRA must be a \.safetensors file"):
        load_and_fuse(sd15, [LoraFile(path)])


def test_files_that_are_missing_or_damaged_are_named(sd15: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no safetensors")

    with pytest.raises(ExportError, match=r"missing\.safetensors: no such file"):
        load_and_fuse(sd15, [LoraFile(tmp_path / "missing.safetensors")])
    with pytest.raises(ExportError, match=r"damaged\.safetensors: "):
        load_and_fuse(sd15, [LoraFile(damaged)])


@pytest.mark.parametrize("metadata", ["{", "1"])
def test_settings_that_cannot_be_read_are_refused(sd15: Any, tmp_path: Path, metadata: str) -> None:
    path = write(tmp_path / "lora.safetensors", pair(), lora_adapter_metadata=metadata)

    with pytest.raises(ExportError, match=r"lora\.safetensors: lora_adapter_metadata: "):
        load_and_fuse(sd15, [LoraFile(path)])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -10.5])
def test_a_scale_out_of_range_is_refused(sd15: Any, tmp_path: Path, scale: float) -> None:
    path = write(tmp_path / "lora.safetensors", pair())

    with pytest.raises(ExportError, match=rf"scale {scale} is not allowed, -10 to 10 are"):
        load_and_fuse(sd15, [LoraFile(path, scale)])


# Mixed row by row.


def unet_spec(pipeline: Any) -> NetworkSpec:
    specs = network_specs(copy.deepcopy(pipeline), FAMILIES["sd1"])
    return next(spec for spec in specs if spec.name == "unet")


def is_adaptable(pipeline: Any) -> Callable[[str], bool]:
    return adaptable_layers(pipeline.unet).__contains__


ADAPTERS = {"ink": 2, "pixelart": 3, "relief": 1}
"""Their ranks."""


@pytest.fixture(scope="session")
def loras(sd15: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files for some or all of the layers."""
    folder = tmp_path_factory.mktemp("loras")
    files = {}
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        chosen = attention if name == "ink" else is_adaptable(sd15)
        tensors = kohya(random_changes(sd15, {"unet": chosen}, rank, seed))
        files[name] = write(folder / f"{name}.safetensors", tensors)
    return files


def test_all_linear_layers_around_attention_can_be_changed(sd15: Any, sd3: Any) -> None:
    unet, transformer = adaptable_layers(sd15.unet), adaptable_layers(sd3.transformer)

    block = "down_blocks.0.attentions.0"
    inner = f"{block}.transformer_blocks.0"
    expected = {f"{block}.proj_in", f"{block}.proj_out", f"{inner}.ff.net.0.proj"}
    expected |= {f"{inner}.ff.net.2"}
    expected |= {
        f"{inner}.attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {path for path in unet if path.startswith(block)} == expected
    block = "transformer_blocks.0"
    expected = {f"{block}.attn.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")}
    expected |= {f"{block}.attn.add_{end}_proj" for end in "qkv"} | {f"{block}.attn.to_add_out"}
    expected |= {f"{block}.{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", 2)}
    assert {path for path in transformer if path.startswith(f"{block}.")} == expected


def test_a_network_without_attention_cannot_have_lora_inputs(sd15: Any) -> None:
    specs = network_specs(copy.deepcopy(sd15), FAMILIES["sd1"])
    encoder = next(spec for spec in specs if spec.name == "text_encoder")

    with pytest.raises(ExportError, match="text_encoder: has no layer that a LoRA could change"):
        add_lora_inputs(encoder)


def test_examples_have_inputs_of_every_size(sd15: Any) -> None:
    plain = unet_spec(sd15)
    spec = add_lora_inputs(plain)

    inputs = spec.example(torch.Generator().manual_seed(0), InputShape(2, 8, 8))

    sizes = {
        tensor.name: tuple(made.shape) for tensor, made in zip(spec.inputs, inputs, strict=True)
    }
    assert list(sizes)[: len(plain.inputs)] == [tensor.name for tensor in plain.inputs]
    assert sizes["sample"] == (2, 4, 8, 8)
    assert sizes["lora_scale"] == (2, 3)
    assert sizes[f"{TO_Q}.lora_down"] == (3, 32)
    assert sizes[f"{TO_Q}.lora_up"] == (32, 3)


@pytest.fixture(scope="session")
def exported(sd15: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose UNet has LoRA inputs, without adapters."""
    root = tmp_path_factory.mktemp("adaptable") / "repository"
    spec = add_lora_inputs(unet_spec(sd15))
    export_onnx(spec, Precision.FP32, write_network_model(root, spec))
    manifest = {"format": 4, "denoiser": {"network": "unet"}, "loras": {}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    """A copy that shares the graph."""
    root = tmp_path / "repository"
    (root / "unet" / "1").mkdir(parents=True)
    for name in ("manifest.json", "unet/config.pbtxt"):
        (root / name).write_bytes((exported / name).read_bytes())
    (root / "unet" / "1" / "model.onnx").symlink_to(exported / "unet" / "1" / "model.onnx")
    return root


def start(folder: Path) -> Any:
    """What Triton runs, over a network's folder."""
    return start_network(folder, ROOT / "model_repository" / "onnx_network" / "1" / "model.py")


def ask(model: Any, **arrays: np.ndarray) -> np.ndarray:
    tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
    (response,) = model.execute([pb_utils.InferenceRequest(inputs=tensors)])
    assert not response.has_error(), response.error().message()
    return response.output_tensors()[0].as_numpy()


def test_rows_of_one_call_have_the_adapters_that_each_asks_for(
    sd15: Any, repository: Path, loras: dict[str, Path]
) -> None:
    rows = [{}, {"ink": 1.0}, {"pixelart": 0.6}, {"ink": -0.5, "relief": 1.0}, {"relief": 0.3}]
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(len(rows), 4, 8, 16, generator=generator)
    timestep = 999 * torch.rand(len(rows), generator=generator)
    hidden = torch.randn(len(rows), 77, 32, generator=generator)
    add_adapters(repository, loras)
    model = start(repository / "unet")
    scales = np.array([[row.get(name, 0) for name in sorted(loras)] for row in rows], np.float32)
    given = {"sample": sample, "timestep": timestep[:, None], "encoder_hidden_states": hidden}
    arrays = {name: tensor.numpy() for name, tensor in given.items()}

    mixed = ask(model, **arrays, lora_scale=scales)
    none = ask(model, **arrays)

    for number, row in enumerate(rows):
        fused = copy.deepcopy(sd15)
        load_and_fuse(fused, [LoraFile(loras[name], scale) for name, scale in row.items()])
        own = slice(number, number + 1)
        with torch.no_grad():
            expected = fused.unet(sample[own], timestep[own], hidden[own])[0].numpy()
        largest = np.abs(expected).max()
        assert np.abs(mixed[own] - expected).max() < 1e-4 * largest
        is_changed = np.abs(none[own] - expected).max() > 1e-2 * largest
        assert is_changed == bool(row)


def test_a_row_is_the_same_whichever_adapters_others_use(
    repository: Path, loras: dict[str, Path]
) -> None:
    rows = np.array([[1, 0, 0], [0, 0.6, 0], [0, 0, 0], [0, 0, 0.3]], np.float32)
    rng = np.random.default_rng(0)
    arrays = {
        "sample": rng.standard_normal((4, 4, 8, 16), np.float32),
        "timestep": np.array([[1], [20], [300], [900]], np.float32),
        "encoder_hidden_states": rng.standard_normal((4, 77, 32), np.float32),
    }
    add_adapters(repository, loras)
    model = start(repository / "unet")

    together = ask(model, **arrays, lora_scale=rows)

    for number in range(len(rows)):
        own = slice(number, number + 1)
        alone = {name: array[own] for name, array in arrays.items()}
        solo = ask(model, **alone, lora_scale=rows[own])
        np.testing.assert_allclose(together[own], solo, atol=1e-5)


def test_an_adapter_has_one_rank_in_all_layers(sd15: Any, tmp_path: Path) -> None:
    changes = random_changes(sd15, {"unet": attention}, rank=2)
    changes["unet"][TO_Q] = random_changes(sd15, {"unet": TO_Q.__eq__}, rank=5)["unet"][TO_Q]
    source = write(tmp_path / "lora.safetensors", kohya(changes, alpha=1.0))
    target = tmp_path / "adapters" / "it.safetensors"

    record = convert_adapter(source, sd15.unet, target)

    assert (record.rank, record.networks) == (5, ("unet",))
    written = load_file(target)
    assert {tensor.shape[0 if key.endswith("down") else 1] for key, tensor in written.items()} == {
        5
    }
    for path, (down, up) in changes["unet"].items():
        expected = up @ down / len(down)
        torch.testing.assert_close(written[f"{path}.up"] @ written[f"{path}.down"], expected)
    assert list(target.parent.iterdir()) == [target]


def test_a_network_with_lora_inputs_converts_as_one_without(
    sd15: Any, loras: dict[str, Path], tmp_path: Path
) -> None:
    spec = unet_spec(sd15)
    unet = spec.module.unet
    add_lora_inputs(spec)

    without = convert_adapter(loras["pixelart"], sd15.unet, tmp_path / "without.safetensors")
    with_inputs = convert_adapter(loras["pixelart"], unet, tmp_path / "with.safetensors")

    assert without == with_inputs


@pytest.mark.parametrize(
    "case",
    [
        (pair("lora_unet_conv_in", 4), "lora_unet_conv_in"),
        (pair("lora_unet_time_embedding_linear_2", 128), "lora_unet_time_embedding_linear_2"),
        (pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj"), "lora_te_text_model"),
        (pair() | {f"{NAME}.dora_scale": torch.ones(1)}, "is DoRA, only LoRA is supported"),
        (pair(width=48), "2x48 and 48x2 do not fit"),
    ],
)
def test_what_cannot_differ_from_row_to_row_is_named_and_leaves_the_repository_as_it_was(
    sd15: Any,
    repository: Path,
    loras: dict[str, Path],
    tmp_path: Path,
    case: tuple[dict[str, torch.Tensor], str],
) -> None:
    tensors, message = case
    bad = write(tmp_path / "bad.safetensors", tensors)
    before = contents(repository)

    with pytest.raises(ExportError, match=r"bad\.safetensors: ") as caught:
        add_adapters(repository, {"ink": loras["ink"], "other": bad})

    assert message in str(caught.value)
    assert ("at the export (--lora, --fuse-lora)" in str(caught.value)) == ("DoRA" not in message)
    assert contents(repository) == before
    with pytest.raises(ExportError, match=re.escape(str(caught.value))):
        check_adapters(sd15.unet, {"ink": loras["ink"], "other": bad})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("conv", r"conv\.safetensors: .*at the export"), ("an ink", "'an ink': is no name")],
)
def test_an_export_with_what_is_no_adapter_is_refused_before_it_begins(
    make_checkpoint: Callable[[str], Path],
    loras: dict[str, Path],
    tmp_path: Path,
    adapter: str,
    message: str,
) -> None:
    bad = write(tmp_path / "conv.safetensors", pair("lora_unet_conv_in", 4))
    adapters = {"ink": str(loras["ink"]), adapter: str(bad)}
    source = str(make_checkpoint("tiny-sd15"))
    tasks = []

    @contextlib.contextmanager
    def note(task: str) -> Iterator[None]:
        tasks.append(task)
        yield

    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, tmp_path / "target", loras=adapters, progress=note)
    assert tasks == ["loading the checkpoint"]
    assert list(tmp_path.iterdir()) == [bad]


def contents(repository: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(repository)): b"" if path.is_dir() else path.read_bytes()
        for path in repository.rglob("*")
    }


def test_adapters_are_written_down_in_the_manifest_and_the_config(
    repository: Path, loras: dict[str, Path]
) -> None:
    add_adapters(repository, {"pixelart": loras["pixelart"]})
    add_adapters(repository, {"ink": loras["ink"], "2.5-D_art": loras["relief"]})

    manifest = json.loads((repository / "manifest.json").read_text())
    assert {name: record["rank"] for name, record in manifest["loras"].items()} == {
        "pixelart": 3,
        "ink": 2,
        "2.5-D_art": 1,
    }
    for name, record in manifest["loras"].items():
        assert record["networks"] == ["unet"]
        assert list(record["files"]) == [f"unet/1/adapters/{name}.safetensors"]
    config = text_format.Parse(
        (repository / "unet" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    names = json.loads(config.parameters["lora_names"].string_value)
    assert names == sorted(manifest["loras"])
    assert "intra_op_thread_count" in config.parameters
    assert [entry.name for entry in config.input if entry.optional] == ["lora_scale"]
    assert "optional_inputs" not in config.parameters


@pytest.mark.parametrize("name", ["", "../it", ".it", "an adapter", "x" * 65])
def test_names_that_are_no_files_are_refused(
    sd15: Any, repository: Path, loras: dict[str, Path], name: str
) -> None:
    with pytest.raises(ExportError, match="is no name for a LoRA"):
        add_adapters(repository, {name: loras["ink"]})
    with pytest.raises(ExportError, match="is no name for a LoRA"):
        check_adapters(sd15.unet, {name: loras["ink"]})


def test_adapters_that_fit_pass_the_check(sd15: Any, sd3: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "lora.safetensors", peft(random_changes(sd3, {"transformer": attention}))
    )

    check_adapters(sd3.transformer, {"ink": path})
    with pytest.raises(ExportError, match=r"lora\.safetensors: "):
        check_adapters(sd15.unet, {"ink": path})


def test_the_denoisers_of_variants_take_the_same_adapters(
    repository: Path, loras: dict[str, Path]
) -> None:
    shutil.copytree(repository / "unet", repository / "unet_watercolor", symlinks=True)
    manifest = json.loads((repository / "manifest.json").read_text())
    manifest["variants"] = {
        "watercolor": {"unet": "unet_watercolor", "text_encoder": "text_encoder_watercolor"},
        "loud": {"text_encoder": "text_encoder_loud"},
    }
    (repository / "manifest.json").write_text(json.dumps(manifest))

    add_adapters(repository, {"ink": loras["ink"]})

    record = json.loads((repository / "manifest.json").read_text())["loras"]["ink"]
    files = [f"{name}/1/adapters/ink.safetensors" for name in ("unet", "unet_watercolor")]
    assert list(record["files"]) == files
    assert record["networks"] == ["unet"]
    own, other = (load_file(repository / file) for file in files)
    torch.testing.assert_close(own, other, rtol=0, atol=0)
    for network in ("unet", "unet_watercolor"):
        assert '[\\"ink\\"]' in (repository / network / "config.pbtxt").read_text()


def test_a_name_stands_for_one_adapter(repository: Path, loras: dict[str, Path]) -> None:
    add_adapters(repository, {"ink": loras["ink"]})
    before = contents(repository)

    with pytest.raises(ExportError, match=r"ink: .* has a LoRA of this name"):
        add_adapters(repository, {"relief": loras["relief"], "ink": loras["pixelart"]})
    assert contents(repository) == before


def test_a_failure_while_it_is_written_down_leaves_the_repository_as_it_was(
    repository: Path, loras: dict[str, Path]
) -> None:
    # A folder stands where the manifest's new text would be written.
    manifest = repository / "manifest.json"
    (repository / f".manifest.json.partial-{os.getpid()}").mkdir()
    before = contents(repository)

    with pytest.raises(ExportError, match=r"manifest\.json\.partial"):
        add_adapters(repository, {"ink": loras["ink"]})

    assert manifest.is_file()
    assert contents(repository) == before


def test_only_repositories_with_lora_inputs_take_adapters(
    repository: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="is no model repository of ours"):
        add_adapters(tmp_path, {"ink": loras["ink"]})

    graph = repository / "unet" / "1" / "model.onnx"
    graph.unlink()
    with pytest.raises(ExportError, match=r"model\.onnx: "):
        add_adapters(repository, {"ink": loras["ink"]})

    import onnx

    value = onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["sample"], ["out_sample"])
    output = onnx.helper.make_tensor_value_info("out_sample", onnx.TensorProto.FLOAT, [1])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "unet", [value], [output])), graph
    )
    with pytest.raises(ExportError, match="unet was exported without LoRA inputs"):
        add_adapters(repository, {"ink": loras["ink"]})
