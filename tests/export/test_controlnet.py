"""ControlNets are exported where they fit, and refused by name and reason where they do not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from darkroom_export import ExportError, export_checkpoint
from darkroom_export.checkpoint import find_checkpoint, load_checkpoint, load_controlnet
from darkroom_export.controlnet import controlnet_spec, find_controlnets
from darkroom_export.families import FAMILIES
from darkroom_export.networks import InputShape, network_specs, residuals

Make = Callable[[str], Path]


@pytest.mark.parametrize(
    ("architecture", "controlnet", "message"),
    [
        (
            "tiny-sd15",
            "tiny-sdxl-controlnet",
            "controlnet canny: does not fit the UNet: its cross_attention_dim is 80, but 32 is",
        ),
        ("tiny-sdxl", "tiny-sd15-controlnet", "its cross_attention_dim is 32, but 80 is needed"),
        ("tiny-sd3", "tiny-sd15-controlnet", "controlnet canny: not supported, this family has no"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(
    make_checkpoint: Make, tmp_path: Path, architecture: str, controlnet: str, message: str
) -> None:
    controlnets = {"canny": str(make_checkpoint(controlnet))}

    with pytest.raises(ExportError, match=message):
        export_checkpoint(
            str(make_checkpoint(architecture)), tmp_path / "target", controlnets=controlnets
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "Canny", "../unet", "a b", "x" * 65])
def test_a_name_that_no_network_could_have_is_refused(
    make_checkpoint: Make, tmp_path: Path, name: str
) -> None:
    source = str(make_checkpoint("tiny-sd15"))

    with pytest.raises(ExportError, match="a name has 1 to 64 lower-case letters, digits"):
        export_checkpoint(source, tmp_path / "target", controlnets={name: "anywhere"})
    with pytest.raises(ExportError, match="a name has 1 to 64 lower-case letters, digits"):
        export_checkpoint(source, tmp_path / "target", variants={name: [("anywhere", 1.0)]})


@pytest.mark.parametrize(
    ("architecture", "controlnet"),
    [("tiny-sd15", "tiny-sd15-controlnet"), ("tiny-sdxl", "tiny-sdxl-controlnet")],
)
def test_the_residuals_are_those_of_diffusers_times_each_rows_scale(
    make_checkpoint: Make, architecture: str, controlnet: str
) -> None:
    checkpoint = load_checkpoint(find_checkpoint(str(make_checkpoint(architecture))))
    family, pipeline = FAMILIES[checkpoint.family], checkpoint.pipeline
    (files,) = find_controlnets({"canny": str(make_checkpoint(controlnet))})
    spec = controlnet_spec(files, pipeline, family)
    spec.module.float()
    inputs = spec.example(torch.Generator().manual_seed(1), InputShape(3, 4, 8))
    given = {tensor.name: made for tensor, made in zip(spec.inputs, inputs, strict=True)}
    theirs = load_controlnet(files.files).float()
    with torch.no_grad():
        ours = spec.module(*inputs)
        for row in range(3):
            added = {
                name: given[name][row : row + 1]
                for name in ("text_embeds", "time_ids")
                if name in given
            }
            down, middle = theirs(
                given["sample"][row : row + 1],
                given["timestep"][row],
                given["encoder_hidden_states"][row : row + 1],
                given["controlnet_cond"][row : row + 1],
                conditioning_scale=float(given["conditioning_scale"][row]),
                added_cond_kwargs=added or None,
                return_dict=False,
            )
            for mine, expected in zip(ours, (*down, middle), strict=True):
                assert expected.abs().max() > 0
                assert torch.allclose(mine[row], expected[0], atol=1e-4)
    shapes = [spec.size(tensor, InputShape(3, 4, 8)) for tensor in spec.outputs]
    assert [tuple(tensor.shape) for tensor in ours] == shapes


def test_a_unet_adds_the_residuals_as_diffusers_does(make_checkpoint: Make) -> None:
    pipeline = load_checkpoint(find_checkpoint(str(make_checkpoint("tiny-sd15")))).pipeline
    specs = network_specs(pipeline, FAMILIES["sd1"], is_controlled=True)
    spec = next(spec for spec in specs if spec.name == "unet")
    spec.module.float()
    shape = InputShape(2, 4, 8)
    inputs = spec.example(torch.Generator().manual_seed(1), shape)
    names = [residual.name for residual in residuals(pipeline)]
    plain, maps = inputs[: -len(names)], inputs[-len(names) :]
    with torch.no_grad():
        controlled = spec.module(*inputs)
        without = spec.module(*plain, *spec.zeros(shape).values())
        expected = pipeline.unet(
            *plain,
            down_block_additional_residuals=maps[:-1],
            mid_block_additional_residual=maps[-1],
        ).sample
        uncontrolled = pipeline.unet(*plain).sample

    assert list(spec.zeros(shape)) == names
    assert torch.allclose(controlled, expected, atol=1e-5)
    assert torch.allclose(without, uncontrolled, atol=1e-5)
    assert not torch.allclose(controlled, uncontrolled, atol=1e-2)
