"""The formulas of `FakeNetworks` as programs of PyTorch, which make the same of the same."""

from pathlib import Path
from typing import Any

import torch
from fake_networks import FACTOR, HIDDEN, LAYERS
from torch import nn
from torch.export import Dim
from torch_programs import write_program


class TextEncoder(nn.Module):
    def forward(self, input_ids: Any) -> Any:
        numbers = torch.arange(1, HIDDEN + 1, dtype=torch.float64)
        depths = 7 + torch.arange(LAYERS - 1, -1, -1, dtype=torch.float64)[:, None]
        angles = input_ids[:, None, :, None] * (numbers / depths)[None, :, None]
        layers = angles.sin().float()
        return layers[:, -1].clone(), layers


class Unet(nn.Module):
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        weights = torch.arange(1, HIDDEN + 1, dtype=torch.float32)
        bias = (encoder_hidden_states * weights).mean(dim=(1, 2))[:, None, None, None]
        return (sample * (1 + bias) + timestep[:, None, None, None] / 200 + bias).sin()


class VaeDecoder(nn.Module):
    def forward(self, latent_sample: Any) -> Any:
        pixels = latent_sample[:, :3].repeat_interleave(FACTOR, dim=2)
        return pixels.repeat_interleave(FACTOR, dim=3).tanh()


class VaeEncoder(nn.Module):
    def forward(self, sample: Any) -> Any:
        small = sample[:, :, ::FACTOR, ::FACTOR]
        mean = torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)
        return torch.cat([mean, mean - 3], dim=1)


def write_formulas(repository: Path) -> None:
    """Into the folders of the networks."""
    rows, height, width = Dim("rows", min=1, max=63), Dim("height", max=64), Dim("width", max=64)
    length = Dim("length", max=1024)
    latents = {0: rows, 2: height, 3: width}
    pixels = {0: rows, 2: FACTOR * height, 3: FACTOR * width}
    ids = torch.zeros(2, 77, dtype=torch.int64)
    small, large = torch.zeros(2, 4, 4, 6), torch.zeros(2, 3, 4 * FACTOR, 6 * FACTOR)
    unet = {
        "sample": small,
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 154, HIDDEN),
    }
    parts: list[tuple[str, nn.Module, Any, list[str], Any]] = [
        (
            "text_encoder",
            TextEncoder(),
            {"input_ids": ids},
            ["last_hidden_state", "hidden_states"],
            [{0: rows}],
        ),
        ("unet", Unet(), unet, ["out_sample"], [latents, {0: rows}, {0: rows, 1: length}]),
        ("vae_decoder", VaeDecoder(), {"latent_sample": small}, ["sample"], [latents]),
        ("vae_encoder", VaeEncoder(), {"sample": large}, ["latent_parameters"], [pixels]),
    ]
    for name, module, inputs, outputs, dynamic in parts:
        write_program(repository / name / "1" / "model.pt2", module, inputs, outputs, dynamic)
