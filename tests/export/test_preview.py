"""The colours of latents, as the embedded checkpoint's VAE has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from darkroom_export import ExportError
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint
from darkroom_export.families import vae_scale_factor
from darkroom_export.preview import fit_preview, synthetic_picture

EMBEDDED = Path(__file__).parents[2] / "shapes" / "checkpoint"


@pytest.fixture(scope="module")
def vae() -> Any:
    pipeline = load_checkpoint(find_checkpoint(str(EMBEDDED))).pipeline
    assert vae_scale_factor(pipeline) == 8
    return pipeline.vae.float()


@pytest.fixture(scope="module")
def preview(vae: Any) -> dict[str, Any]:
    return fit_preview(vae, 8, seed=3)


def colours_of(vae: Any, preview: dict[str, Any], picture: torch.Tensor) -> np.ndarray:
    """(h, w, 3) colours of a picture's latents."""
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode() * vae.config.scaling_factor
    return latents[0].movedim(0, -1).numpy() @ np.array(preview["matrix"]) + preview["bias"]


def plain(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).reshape(1, 3, 1, 1).repeat(1, 1, 128, 128)


@pytest.mark.parametrize(
    "colour",
    [(0.75, -0.75, -0.7), (-0.75, 0.2, -0.5), (-0.7, -0.4, 0.75), (0.95, 0.95, 0.95)],
    ids=["red", "green", "blue", "white"],
)
def test_the_preview_of_a_plain_picture_has_its_colour(
    vae: Any, preview: dict[str, Any], colour: tuple[float, float, float]
) -> None:
    mean = colours_of(vae, preview, plain(*colour)).mean(axis=(0, 1))

    assert np.abs(mean - colour).max() < 0.5
    if max(colour) != min(colour):
        assert mean.argmax() == np.argmax(colour)


def test_the_preview_shows_what_is_where(vae: Any, preview: dict[str, Any]) -> None:
    picture = plain(-0.7, -0.4, 0.75)
    picture[..., 64:] = plain(0.75, -0.75, -0.7)[..., 64:]
    colours = colours_of(vae, preview, picture)

    assert (colours[:, :6].argmax(axis=-1) == 2).mean() > 0.95
    assert (colours[:, -6:].argmax(axis=-1) == 0).mean() > 0.95


def test_the_map_explains_most_of_the_colours(preview: dict[str, Any]) -> None:
    assert np.shape(preview["matrix"]) == (4, 3)
    assert 0.5 < preview["r2"] <= 1


def test_the_fit_is_the_same_every_time(vae: Any, preview: dict[str, Any]) -> None:
    again = fit_preview(vae, 8, seed=3)

    assert np.allclose(again["matrix"], preview["matrix"], atol=1e-4)
    assert np.allclose(again["bias"], preview["bias"], atol=1e-4)


@pytest.mark.parametrize("index", range(6))
def test_synthetic_pictures_are_pictures(index: int) -> None:
    picture = synthetic_picture(index, 96, torch.Generator().manual_seed(1))

    assert picture.shape == (1, 3, 96, 96)
    assert picture.abs().max() <= 1
    assert picture.std() > 0.1


class ConstantVae(nn.Module):
    """A VAE that encodes and decodes everything to the same."""

    class config:  # noqa: N801  as diffusers names it
        scaling_factor = 0.5

    def __init__(self, latent: float, pixel: float) -> None:
        super().__init__()
        self.latent, self.pixel = latent, pixel
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, picture: torch.Tensor) -> Any:
        self.latents = torch.full((1, 4, picture.shape[2] // 8, picture.shape[3] // 8), self.latent)
        return self

    @property
    def latent_dist(self) -> "ConstantVae":
        return self

    def mode(self) -> torch.Tensor:
        return self.latents

    def decode(self, latents: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        height, width = latents.shape[2:]
        return (torch.full((1, 3, 8 * height, 8 * width), self.pixel),)


def test_a_vae_of_one_colour_has_a_preview_too() -> None:
    preview = fit_preview(ConstantVae(0.3, -0.25), 8, seed=0)

    colour = np.full(4, 0.15) @ np.array(preview["matrix"]) + preview["bias"]
    assert np.allclose(colour, -0.25, atol=1e-6)
    assert preview["r2"] == 0 or np.isfinite(preview["r2"])


@pytest.mark.parametrize(("latent", "pixel"), [(np.nan, 0), (np.inf, 0), (0, np.nan)])
def test_a_broken_vae_is_named(latent: float, pixel: float) -> None:
    with pytest.raises(ExportError, match=r"vae: the (encoder|decoder)'s output is not finite"):
        fit_preview(ConstantVae(latent, pixel), 8, seed=0)
