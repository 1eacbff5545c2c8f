"""Checkpoints of real architectures with random weights, to test with where none can be had."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import tokenizers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn

from darkroom_export.quiet import quieten
from darkroom_export.weights import default_dtype


class Part(NamedTuple):
    """A component of a pipeline: its class and what its config says."""

    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A checkpoint to be: its pipeline class, its components and the rest of its index.

    A ControlNet has no pipeline: its only part, named "", is the checkpoint.
    """

    pipeline: str | None
    parts: Mapping[str, Part]
    index: Mapping[str, Any] = field(default_factory=dict)


_VOCAB_SIZE = 49408
_BOS, _EOS = _VOCAB_SIZE - 2, _VOCAB_SIZE - 1

_T5_WORDS = ("a", "an", "blue", "circle", "cat", "dog", "of", "on", "photograph", "red", "the")
_T5_LETTERS = tuple(chr(code) for code in range(33, 127))
_T5_PIECES = (
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    *((f"▁{word}", -3.0) for word in _T5_WORDS),
    *((ending, -4.0) for ending in ("ed", "ing", "s")),
    *((letter, -6.0) for letter in _T5_LETTERS if letter != "s"),
)
_T5_LENGTH = 512

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEADING = _BETAS | {"steps_offset": 1, "timestep_spacing": "leading"}
_TRAILING = _BETAS | {"steps_offset": 1, "timestep_spacing": "trailing"}
_NO_CLIP = {"clip_sample": False, "set_alpha_to_one": False}
_NO_SAFETY_CHECKER = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    # Of 24: the last is not used.
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPENCLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TINY_OPENCLIP = _TINY_CLIP | {"hidden_act": "gelu"}
# Two widths, neither of them that of the pooled embeddings, so that none is taken for another.
_TINY_CLIP_1 = _TINY_CLIP | {"projection_dim": 24}
_TINY_CLIP_2 = _TINY_OPENCLIP | {"hidden_size": 48, "projection_dim": 40}

_VAE = {"block_out_channels": (128, 256, 512, 512)}
_TINY_VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 128,
}
_SD3_LATENTS = {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

_TINY_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
_TINY_SD2_UNET = _TINY_UNET | {"attention_head_dim": (4, 8), "use_linear_projection": True}
_TINY_SDXL_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 32 + 48,
    "attention_head_dim": (4, 8),
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    # Of the pooled embeddings and six numbers.
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
_TINY_REFINER_UNET = _TINY_SDXL_UNET | {
    "cross_attention_dim": 48,
    "projection_class_embeddings_input_dim": 40 + 5 * 8,
}
_INPAINT = {"in_channels": 9}
_NOT_OF_A_CONTROLNET = ("sample_size", "up_block_types")
_SD3_TRANSFORMER = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 768 + 1280,
    "pos_embed_max_size": 192,
}
_TINY_TRANSFORMER = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24 + 40,
    "pos_embed_max_size": 24,
}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    # Of T5's own tokenizer, which has more pieces than that which is written here.
    "vocab_size": 32128,
}
_TINY_T5 = {"d_model": 96, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 32,
}


def _sd1(
    text_encoder: Mapping[str, Any],
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Part,
    *,
    pipeline: str = "StableDiffusionPipeline",
    padding: str = "<|endoftext|>",
) -> Architecture:
    """Stable Diffusion 1 and 2: one text encoder, a UNet and a VAE."""
    parts = {
        "text_encoder": Part("CLIPTextModel", text_encoder),
        "unet": Part("UNet2DConditionModel", unet),
        "vae": Part("AutoencoderKL", vae),
        "tokenizer": Part("CLIPTokenizer", {"padding": padding}),
        "scheduler": scheduler,
    }
    return Architecture(pipeline, parts, _NO_SAFETY_CHECKER)


def _sdxl(
    text_encoder: Mapping[str, Any],
    text_encoder_2: Mapping[str, Any],
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Part,
    *,
    pipeline: str = "StableDiffusionXLPipeline",
) -> Architecture:
    parts = {
        "text_encoder": Part("CLIPTextModel", text_encoder),
        "text_encoder_2": Part("CLIPTextModelWithProjection", text_encoder_2),
        "unet": Part("UNet2DConditionModel", unet),
        "vae": Part("AutoencoderKL", {**vae, "scaling_factor": 0.13025}),
        "tokenizer": Part("CLIPTokenizer", {"padding": "<|endoftext|>"}),
        "tokenizer_2": Part("CLIPTokenizer", {"padding": "!"}),
        "scheduler": scheduler,
    }
    return Architecture(pipeline, parts, {"force_zeros_for_empty_prompt": True})


def _sd3(
    text_encoder: Mapping[str, Any],
    text_encoder_2: Mapping[str, Any],
    text_encoder_3: Mapping[str, Any],
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
) -> Architecture:
    parts = {
        "text_encoder": Part("CLIPTextModelWithProjection", text_encoder),
        "text_encoder_2": Part("CLIPTextModelWithProjection", text_encoder_2),
        "text_encoder_3": Part("T5EncoderModel", text_encoder_3),
        "transformer": Part("SD3Transformer2DModel", transformer),
        "vae": Part("AutoencoderKL", {**vae, **_SD3_LATENTS}),
        "tokenizer": Part("CLIPTokenizer", {"padding": "<|endoftext|>"}),
        "tokenizer_2": Part("CLIPTokenizer", {"padding": "!"}),
        "tokenizer_3": Part("T5TokenizerFast", {}),
        "scheduler": Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
    return Architecture("StableDiffusion3Pipeline", parts)


def _without(
    architecture: Architecture, *parts: str, pipeline: str | None = None, **index: Any
) -> Architecture:
    """The architecture with some components null."""
    return Architecture(
        pipeline or architecture.pipeline,
        {name: part for name, part in architecture.parts.items() if name not in parts},
        {**architecture.index, **{name: [None, None] for name in parts}, **index},
    )


def _with_safety_checker(architecture: Architecture) -> Architecture:
    checker = Part("StableDiffusionSafetyChecker", _TINY_VISION)
    extractor = Part("CLIPImageProcessor", {})
    parts = {**architecture.parts, "safety_checker": checker, "feature_extractor": extractor}
    index = {"image_encoder": [None, None], "requires_safety_checker": True}
    return Architecture(architecture.pipeline, parts, index)


def _controlnet(unet: Mapping[str, Any]) -> Architecture:
    """A ControlNet for pipelines with such a UNet."""
    config = {key: value for key, value in unet.items() if key not in _NOT_OF_A_CONTROLNET}
    config["conditioning_embedding_out_channels"] = (8, 8, 16, 16)
    return Architecture(None, {"": Part("ControlNetModel", config)})


_UNIPC = Part("UniPCMultistepScheduler", _LEADING)
_EULER = Part("EulerDiscreteScheduler", _LEADING)
_TINY_SD15 = _sd1(_TINY_CLIP, _TINY_UNET, _TINY_VAE, _UNIPC)
_TINY_SDXL = (_TINY_CLIP_1, _TINY_CLIP_2, _TINY_SDXL_UNET, _TINY_VAE)
_TINY_SD3 = (_TINY_CLIP_1, _TINY_CLIP_2, _TINY_T5)

ARCHITECTURES: dict[str, Architecture] = {
    # Stable Diffusion 1.x, full size: 860 M + 123 M + 84 M parameters.
    "sd15": _sd1(
        _CLIP_L,
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _VAE | {"sample_size": 512},
        _UNIPC,
    ),
    # Stable Diffusion 2.1 of 768 pixels, full size: 866 M + 340 M + 84 M parameters.
    "sd21": _sd1(
        _OPENCLIP_H,
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        _VAE | {"sample_size": 768},
        Part("DDIMScheduler", _LEADING | _NO_CLIP | {"prediction_type": "v_prediction"}),
        padding="!",
    ),
    # Stable Diffusion XL, full size: 2567 M + 123 M + 695 M + 84 M parameters.
    "sdxl": _sdxl(
        _CLIP_L,
        _OPENCLIP_G,
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        _VAE | {"sample_size": 1024},
        _EULER,
    ),
    # Stable Diffusion 3 medium, full size: 2028 M + 123 M + 695 M + 4762 M + 84 M parameters.
    "sd3": _sd3(_CLIP_L, _OPENCLIP_G, _T5_XXL, _SD3_TRANSFORMER, _VAE | {"sample_size": 1024}),
    # The same classes and data flow, in seconds.
    "tiny-sd15": _TINY_SD15,
    "tiny-sd15-safety": _with_safety_checker(_TINY_SD15),
    "tiny-sd15-inpaint": _sd1(
        _TINY_CLIP,
        _TINY_UNET | _INPAINT,
        _TINY_VAE,
        Part("DDIMScheduler", _LEADING | _NO_CLIP),
        pipeline="StableDiffusionInpaintPipeline",
    ),
    "tiny-lcm": _sd1(
        _TINY_CLIP,
        _TINY_UNET | {"time_cond_proj_dim": 32},
        _TINY_VAE,
        Part("LCMScheduler", _LEADING | {"original_inference_steps": 50}),
        pipeline="LatentConsistencyModelPipeline",
    ),
    "tiny-sd21": _sd1(
        _TINY_OPENCLIP,
        _TINY_SD2_UNET,
        _TINY_VAE,
        Part(
            "DDIMScheduler",
            _TRAILING
            | _NO_CLIP
            | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        padding="!",
    ),
    "tiny-turbo": _sd1(
        _TINY_OPENCLIP,
        _TINY_SD2_UNET,
        _TINY_VAE,
        Part("EulerDiscreteScheduler", _TRAILING),
        padding="!",
    ),
    "tiny-sdxl": _sdxl(*_TINY_SDXL, _EULER),
    "tiny-sdxl-turbo": _sdxl(*_TINY_SDXL, Part("EulerAncestralDiscreteScheduler", _TRAILING)),
    "tiny-sdxl-inpaint": _sdxl(
        _TINY_CLIP_1,
        _TINY_CLIP_2,
        _TINY_SDXL_UNET | _INPAINT,
        _TINY_VAE,
        _EULER,
        pipeline="StableDiffusionXLInpaintPipeline",
    ),
    "tiny-sdxl-refiner": _without(
        _sdxl(_TINY_CLIP_1, _TINY_CLIP_2, _TINY_REFINER_UNET, _TINY_VAE, _EULER),
        "text_encoder",
        "tokenizer",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ),
    "tiny-sd3": _sd3(*_TINY_SD3, _TINY_TRANSFORMER, _TINY_VAE),
    "tiny-sd3-no-t5": _without(
        _sd3(*_TINY_SD3, _TINY_TRANSFORMER, _TINY_VAE), "text_encoder_3", "tokenizer_3"
    ),
    # Of the second generation: normalised queries and keys, a second attention of the picture.
    "tiny-sd35": _sd3(
        *_TINY_SD3,
        _TINY_TRANSFORMER | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        _TINY_VAE,
    ),
    "tiny-sd15-controlnet": _controlnet(_TINY_UNET),
    "tiny-sdxl-controlnet": _controlnet(_TINY_SDXL_UNET),
}


def make_random_checkpoint(architecture: str, directory: Path, seed: int = 0) -> None:
    """Write a diffusers folder of the given architecture with seeded random fp16 weights.

    Raises:
        ValueError: there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture: {architecture!r} does not exist, there are {', '.join(ARCHITECTURES)}"
        )
    quieten()
    described = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    # One after the other: of a large checkpoint, memory never holds more than one part.
    for name, part in described.parts.items():
        _save(part, directory / name)
    if described.pipeline is not None:
        components = {
            name: [_library(part), part.class_name] for name, part in described.parts.items()
        }
        index = {
            "_class_name": described.pipeline,
            "_diffusers_version": diffusers.__version__,
            **described.index,
            **components,
        }
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _library(part: Part) -> str:
    if part.class_name == "StableDiffusionSafetyChecker":
        return "stable_diffusion"
    return "diffusers" if hasattr(diffusers, part.class_name) else "transformers"


def _save(part: Part, directory: Path) -> None:
    name, config = part
    match name:
        case "CLIPTokenizer":
            _clip_tokenizer(directory, **config)
            return
        case "T5TokenizerFast":
            _t5_tokenizer(directory)
            return
    # At once, for there may be no memory for a large one in fp32.
    with default_dtype(torch.float16):
        made = make_part(part)
    if isinstance(made, nn.Module):
        # Tables that are computed are float32 still.
        made.to(torch.float16)
    made.save_pretrained(directory)


def make_part(part: Part) -> Any:
    """Any component but a tokenizer, with random weights."""
    name, config = part
    match name:
        case "CLIPTextModel" | "CLIPTextModelWithProjection":
            made = _clip_text_encoder(name, config)
        case "T5EncoderModel":
            made = _t5_encoder(config)
        case "AutoencoderKL":
            made = _vae(config)
        case "ControlNetModel":
            made = _controlnet_model(config)
        case "StableDiffusionSafetyChecker":
            made = _safety_checker(config)
        case "CLIPImageProcessor":
            made = transformers.CLIPImageProcessor(**config)
        case _:
            made = getattr(diffusers, name)(**config)
    return made


def _clip_text_encoder(class_name: str, config: Mapping[str, Any]) -> Any:
    kind = getattr(transformers, class_name)
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=_VOCAB_SIZE, bos_token_id=_BOS, eos_token_id=_EOS, **config
        )
    )


def _t5_encoder(config: Mapping[str, Any]) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            **{"vocab_size": len(_T5_PIECES), **config},
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def _vae(config: Mapping[str, Any]) -> Any:
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
    }
    return diffusers.AutoencoderKL(**{**defaults, **config})


def _controlnet_model(config: Mapping[str, Any]) -> Any:
    model = diffusers.ControlNetModel(**config)
    # They start at zero, as if there were no ControlNet.
    zeroed = (
        *model.controlnet_down_blocks,
        model.controlnet_mid_block,
        model.controlnet_cond_embedding.conv_out,
    )
    for convolution in zeroed:
        convolution.reset_parameters()
    return model


def _safety_checker(vision: Mapping[str, Any]) -> Any:
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(vision_config=dict(vision), projection_dim=16)
    )
    # Directions to all sides, of which a picture may be near one or none.
    for embeddings in (checker.concept_embeds, checker.special_care_embeds):
        nn.init.normal_(embeddings)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        nn.init.constant_(thresholds, 0.5)
    return checker


def _clip_tokenizer(directory: Path, padding: str) -> None:
    """CLIP's tokenizer without merges: one token per byte, special tokens at CLIP's ids."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"{letter}</w>": index + len(letters) for index, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": _BOS, "<|endoftext|>": _EOS}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(
        str(directory / "vocab.json"),
        str(directory / "merges.txt"),
        model_max_length=77,
        pad_token=padding,
    ).save_pretrained(directory)


def _t5_tokenizer(directory: Path) -> None:
    """T5's kind of tokenizer: the likeliest pieces of each word, an end token, no start token."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(list(_T5_PIECES), unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    end = ("</s>", 1)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    transformers.T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, model_max_length=_T5_LENGTH
    ).save_pretrained(directory)


def _byte_letters() -> list[str]:
    """The printable letter that GPT-2's and CLIP's vocabularies use for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
