"""Checkpoints of real architectures with random weights, to test with where none can be had."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from darkroom_export.quiet import quieten

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    # Stable Diffusion 1.x, full size: 860 M + 123 M + 84 M parameters.
    "sd15": {
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "sample_size": 512},
    },
    # The same classes and data flow, in seconds.
    "tiny-sd15": {
        "text_encoder": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "unet": {
            "sample_size": 16,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
        },
        "vae": {
            "block_out_channels": (8, 8, 16, 16),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "sample_size": 128,
        },
    },
}

_VOCAB_SIZE = 49408
_BOS, _EOS = _VOCAB_SIZE - 2, _VOCAB_SIZE - 1


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
    configs = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        vocab_size=_VOCAB_SIZE, bos_token_id=_BOS, eos_token_id=_EOS, **configs["text_encoder"]
    )
    pipeline = diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config),
        unet=diffusers.UNet2DConditionModel(**configs["unet"]),
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            **{"layers_per_block": 2, **configs["vae"]},
        ),
        tokenizer=_byte_tokenizer(directory / "tokenizer"),
        scheduler=diffusers.UniPCMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(directory)


def _byte_tokenizer(directory: Path) -> CLIPTokenizer:
    """CLIP's tokenizer without merges: one token per byte, special tokens at CLIP's ids."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"{letter}</w>": index + len(letters) for index, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": _BOS, "<|endoftext|>": _EOS}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(directory / "vocab.json"),
        str(directory / "merges.txt"),
        model_max_length=77,
        pad_token="<|endoftext|>",  # noqa: S106  a token of text
    )


def _byte_letters() -> list[str]:
    """The printable letter that GPT-2's and CLIP's vocabularies use for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
