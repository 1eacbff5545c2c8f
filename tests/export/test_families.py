"""Every family: what the engine is told of it, and what its networks take and give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from darkroom_engine.samplers import Samplers
from darkroom_export import Backend, ExportError, Precision, export_checkpoint
from darkroom_export.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from darkroom_export.config_check import check_config
from darkroom_export.configs import (
    Description,
    OnnxRuntimeOptions,
    TensorRtOptions,
    native_config,
    read_config,
)
from darkroom_export.families import FAMILIES
from darkroom_export.loop import loop_reference
from darkroom_export.manifest import Defaults, describe, describe_text
from darkroom_export.memory import free
from darkroom_export.networks import network_specs
from darkroom_export.profiles import NetworkProfile, Span, read_inputs
from darkroom_export.verify import input_shapes, network_reference

Make = Callable[[str], Path]
TIME_IDS = ["original_size", "crops_coords_top_left", "target_size"]
DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_sampler")


def loaded(make_checkpoint: Make, architecture: str) -> Checkpoint:
    return load_checkpoint(find_checkpoint(str(make_checkpoint(architecture))))


def described(checkpoint: Checkpoint, folder: Path, **defaults: Any) -> dict[str, Any]:
    """The manifest as far as no network has to be exported for it."""
    manifest = describe(checkpoint, Backend.PYTHON, Precision.FP32, Defaults(**defaults), [])
    family = FAMILIES[checkpoint.family]
    return manifest | {"text": describe_text(checkpoint.pipeline, family, folder)}


@pytest.mark.parametrize(
    ("architecture", "family", "defaults"),
    [
        ("tiny-sd15", "sd1", (25, 7.5, "unipc")),
        ("tiny-sd15-inpaint", "sd1", (25, 7.5, "unipc")),
        ("tiny-lcm", "sd1", (4, 8.5, "lcm")),
        ("tiny-sd21", "sd2", (25, 7.5, "unipc")),
        ("tiny-turbo", "sd2", (4, 0.0, "euler")),
        ("tiny-sdxl", "sdxl", (25, 6.0, "unipc")),
        ("tiny-sdxl-turbo", "sdxl", (4, 0.0, "euler_ancestral")),
        ("tiny-sdxl-inpaint", "sdxl", (25, 6.0, "unipc")),
        ("tiny-sdxl-refiner", "sdxl-refiner", (25, 6.0, "unipc")),
        ("tiny-sd3", "sd3", (28, 7.0, "euler")),
    ],
)
def test_a_request_that_does_not_say_gets_what_the_checkpoint_was_made_for(
    make_checkpoint: Make,
    tmp_path: Path,
    architecture: str,
    family: str,
    defaults: tuple[int, float, str],
) -> None:
    manifest = described(loaded(make_checkpoint, architecture), tmp_path)

    assert (manifest["format"], manifest["family"]) == (4, family)
    assert tuple(manifest["limits"][key] for key in DEFAULTS) == defaults


def test_a_consistency_model_without_guidance_input_is_unguided(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    own = loaded(make_checkpoint, "tiny-lcm").own_scheduler
    plain = loaded(make_checkpoint, "tiny-sd15")
    manifest = described(Checkpoint(plain.files, "sd1", plain.pipeline, own), tmp_path)

    assert tuple(manifest["limits"][key] for key in DEFAULTS) == (4, 1.0, "lcm")


def test_the_exports_options_come_before_the_checkpoints_defaults(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    given = {"num_inference_steps": 7, "guidance_scale": 0.0, "sampler": "ddim"}
    manifest = described(loaded(make_checkpoint, "tiny-sd15"), tmp_path, **given)

    assert tuple(manifest["limits"][key] for key in DEFAULTS) == (7, 0.0, "ddim")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not between 1 and 150"),
        ({"num_inference_steps": 151}, "num_inference_steps: 151 is not between 1 and 150"),
        ({"guidance_scale": -0.1}, "guidance_scale: -0.1 is not between 0 and 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is not between 0 and 50"),
    ],
)
def test_defaults_that_no_request_could_have_are_refused(
    make_checkpoint: Make, tmp_path: Path, defaults: dict[str, Any], message: str
) -> None:
    source = str(make_checkpoint("tiny-sd15"))

    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, tmp_path / "target", **defaults)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("architecture", ["tiny-sd15", "tiny-sdxl", "tiny-sd3"])
def test_the_samplers_are_the_engines(
    make_checkpoint: Make, tmp_path: Path, architecture: str
) -> None:
    manifest = described(loaded(make_checkpoint, architecture), tmp_path)
    engines = Samplers.from_config(manifest["noise_schedule"], manifest["solver"])

    assert set(engines.names) == set(FAMILIES[manifest["family"]].samplers)


@pytest.mark.parametrize(
    ("architecture", "sampler", "message"),
    [
        ("tiny-sd15", "magic", "'magic' does not exist for this checkpoint, there are unipc, "),
        ("tiny-sd3", "lcm", "'lcm' does not exist for this checkpoint, there are euler, unipc, d"),
    ],
)
def test_a_default_sampler_that_the_checkpoint_cannot_have_is_refused(
    make_checkpoint: Make, tmp_path: Path, architecture: str, sampler: str, message: str
) -> None:
    with pytest.raises(ExportError, match=f"sampler: {message}"):
        export_checkpoint(str(make_checkpoint(architecture)), tmp_path / "target", sampler=sampler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("tiny-sd15-inpaint", {"network": "unet", "extra_channels": 5, "time_ids": []}),
        ("tiny-lcm", {"extra_channels": 0, "guidance_embedding_size": 32, "residuals": []}),
        ("tiny-sdxl", {"time_ids": TIME_IDS, "sample": "sample", "output": "out_sample"}),
        ("tiny-sdxl-inpaint", {"time_ids": TIME_IDS, "extra_channels": 5}),
        ("tiny-sdxl-refiner", {"time_ids": [*TIME_IDS[:2], "aesthetic_score"]}),
        (
            "tiny-sd3",
            {
                "network": "transformer",
                "sample": "hidden_states",
                "output": "out_hidden_states",
                "extra_channels": 0,
                "time_ids": [],
                "guidance_embedding_size": 0,
            },
        ),
    ],
)
def test_the_denoiser_is_described(
    make_checkpoint: Make, tmp_path: Path, architecture: str, expected: dict[str, Any]
) -> None:
    denoiser = described(loaded(make_checkpoint, architecture), tmp_path)["denoiser"]

    assert denoiser | expected == denoiser


@pytest.mark.parametrize(
    ("architecture", "networks", "expected"),
    [
        (
            "tiny-sd21",
            {"text_encoder": ("last_hidden_state", None)},
            {"hidden_size": 32, "pooled_input": None, "empty_negative": "encode"},
        ),
        (
            "tiny-sdxl",
            {
                "text_encoder": ("penultimate_hidden_state", None),
                "text_encoder_2": ("penultimate_hidden_state", "text_embeds"),
            },
            {"hidden_size": 80, "pooled_input": "text_embeds", "empty_negative": "zeros"},
        ),
        (
            "tiny-sdxl-refiner",
            {"text_encoder_2": ("penultimate_hidden_state", "text_embeds")},
            {"hidden_size": 48, "pooled_input": "text_embeds", "empty_negative": "encode"},
        ),
        (
            "tiny-sd3",
            {
                "text_encoder": ("penultimate_hidden_state", "text_embeds"),
                "text_encoder_2": ("penultimate_hidden_state", "text_embeds"),
                "text_encoder_3": ("last_hidden_state", None),
            },
            {"hidden_size": 96, "pooled_input": "pooled_projections", "num_blank_tokens": 0},
        ),
        (
            "tiny-sd3-no-t5",
            {
                "text_encoder": ("penultimate_hidden_state", "text_embeds"),
                "text_encoder_2": ("penultimate_hidden_state", "text_embeds"),
            },
            {"hidden_size": 96, "num_blank_tokens": 256},
        ),
    ],
)
def test_the_text_is_described(
    make_checkpoint: Make,
    tmp_path: Path,
    architecture: str,
    networks: dict[str, tuple[str, str | None]],
    expected: dict[str, Any],
) -> None:
    text = described(loaded(make_checkpoint, architecture), tmp_path)["text"]

    assert text | expected == text
    assert {
        encoder["network"]: (encoder["hidden"], encoder["pooled"]) for encoder in text["encoders"]
    } == networks
    for encoder in text["encoders"]:
        is_t5 = encoder["network"] == "text_encoder_3"
        assert encoder["kind"] == ("t5" if is_t5 else "clip")
        assert encoder["layers"] == (None if is_t5 else "hidden_states")
        assert encoder["tokenizer"]["max_length"] == (256 if is_t5 else 77)
        assert (tmp_path / encoder["tokenizer"]["file"]).is_file()


def test_the_schedule_of_flow_matching_is_its_shift(make_checkpoint: Make, tmp_path: Path) -> None:
    manifest = described(loaded(make_checkpoint, "tiny-sd3"), tmp_path)

    assert manifest["noise_schedule"] == {
        "prediction_type": "flow_prediction",
        "shift": 3.0,
        "num_train_timesteps": 1000,
    }
    assert manifest["latents"]["vae_shift_factor"] == 0.0609
    assert manifest["limits"]["max_embeddings_multiples"] == 1


def test_positions_that_were_never_learnt_bound_the_size(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    checkpoint = loaded(make_checkpoint, "tiny-sd3")
    checkpoint.pipeline.transformer.register_to_config(pos_embed_max_size=12)
    limits = described(checkpoint, tmp_path)["limits"]

    assert (limits["default_width"], limits["max_size"]) == (128, 12 * 16)


def test_a_unet_with_other_inputs_than_its_family_is_refused(make_checkpoint: Make) -> None:
    pipeline = loaded(make_checkpoint, "tiny-sd15").pipeline
    pipeline.unet.register_to_config(addition_embed_type="text")

    with pytest.raises(ExportError, match="unet: addition_embed_type 'text' is not supported"):
        network_specs(pipeline, FAMILIES["sd1"])


def test_networks_are_as_they_were_after_the_loop(make_checkpoint: Make) -> None:
    """So that only the one that is exported takes the memory of float32."""
    pipeline = loaded(make_checkpoint, "tiny-sdxl-inpaint").pipeline
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    loop_reference(pipeline, FAMILIES["sdxl"], 1)

    for name, tensor in pipeline.unet.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, before[name])
    assert {pipeline.vae.dtype, pipeline.text_encoder_2.dtype} == {torch.float16}


def test_weights_are_freed_whoever_holds_them_but_not_those_of_others() -> None:
    module = nn.Linear(4, 4)
    held = module.weight.detach()
    file = torch.arange(8.0)
    module.bias.data = file[4:]
    free(module)

    assert held.untyped_storage().nbytes() == 0
    assert {tensor.device.type for tensor in module.parameters()} == {"meta"}
    assert file.tolist() == list(range(8))


@pytest.mark.parametrize(
    "options",
    [
        {"loras": {"ink": "nowhere.safetensors"}},
        {"variants": {"ink": [("nowhere.safetensors", 1.0)]}},
        {"fused_loras": [("nowhere.safetensors", 1.0)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_missing_lora_is_named_before_anything_is_loaded(
    make_checkpoint: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = str(make_checkpoint("tiny-sd15"))

    with pytest.raises(ExportError, match=r"nowhere\.safetensors: No such file or directory"):
        export_checkpoint(source, tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_for_what_does_not_overflow_in_it(make_checkpoint: Make) -> None:
    checkpoints = {
        architecture: loaded(make_checkpoint, architecture)
        for architecture in ("tiny-sd15", "tiny-sdxl", "tiny-sd3")
    }
    specs = {
        (name, spec.name): spec
        for name, checkpoint in checkpoints.items()
        for spec in network_specs(checkpoint.pipeline, FAMILIES[checkpoint.family])
    }

    float32 = [key for key, spec in specs.items() if spec.precision(Precision.FP16) == "fp32"]
    assert float32 == [("tiny-sdxl", "vae_decoder"), ("tiny-sdxl", "vae_encoder")]
    t5 = specs["tiny-sd3", "text_encoder_3"]
    t5.convert(Precision.FP16)
    dtypes = {
        name.rpartition(".")[0].endswith("wo"): tensor.dtype
        for name, tensor in t5.module.state_dict().items()
    }
    assert dtypes == {True: torch.float32, False: torch.float16}


def test_the_same_shapes_are_compared_for_every_network_of_a_checkpoint(
    make_checkpoint: Make,
) -> None:
    pipeline = loaded(make_checkpoint, "tiny-lcm").pipeline
    shapes = input_shapes(pipeline, FAMILIES["sd1"])
    for spec in network_specs(pipeline, FAMILIES["sd1"]):
        for (inputs, outputs), shape in zip(
            network_reference(spec, shapes, 1).cases, shapes, strict=True
        ):
            assert {len(tensor) for tensor in (*inputs, *outputs)} == {shape.batch}
            for tensor, made in zip(spec.inputs, inputs, strict=True):
                assert tuple(made.shape) == spec.size(tensor, shape)


HALF = "tiny-sdxl"
EXPORTED = (HALF, "tiny-sd3", "tiny-sdxl-refiner", "tiny-lcm", "tiny-sd15-inpaint")
"""Between them, every input and output that there is."""


@pytest.fixture(scope="module")
def exported(
    make_checkpoint: Make, workshop: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The repository of an architecture, exported when it is first asked for."""
    half = tmp_path_factory.mktemp("exported") / HALF

    def exported(architecture: str) -> Path:
        if architecture != HALF:
            return workshop.repository(architecture)
        if not half.exists():
            controlnets = {"canny": str(make_checkpoint("tiny-sdxl-controlnet"))}
            source = str(make_checkpoint(HALF))
            assert export_checkpoint(
                source, half, precision=Precision.FP16, controlnets=controlnets
            )
        return half

    return exported


SDXL = {
    "text_encoder": (["input_ids"], ["penultimate_hidden_state", "hidden_states"]),
    "text_encoder_2": (
        ["input_ids"],
        ["penultimate_hidden_state", "hidden_states", "text_embeds"],
    ),
    "unet": (
        ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
        ["out_sample"],
    ),
}
VAE = {
    "vae_decoder": (["latent_sample"], ["sample"]),
    "vae_encoder": (["sample"], ["latent_parameters"]),
}
RESIDUALS = [*(f"down_block_res_sample_{n}" for n in range(4)), "mid_block_res_sample"]
SD1 = {"text_encoder": (["input_ids"], ["last_hidden_state", "hidden_states"])}
UNET = ["sample", "timestep", "encoder_hidden_states"]
NETWORKS = {
    "tiny-sdxl": {
        **SDXL,
        "unet": ([*SDXL["unet"][0], *RESIDUALS], ["out_sample"]),
        **VAE,
        "controlnet_canny": (
            [*SDXL["unet"][0], "controlnet_cond", "conditioning_scale"],
            RESIDUALS,
        ),
    },
    "tiny-sdxl-refiner": {
        "text_encoder_2": SDXL["text_encoder_2"],
        "unet": SDXL["unet"],
        **VAE,
    },
    "tiny-sd3": {
        "text_encoder": SDXL["text_encoder_2"],
        "text_encoder_2": SDXL["text_encoder_2"],
        "text_encoder_3": (["input_ids"], ["last_hidden_state"]),
        "transformer": (
            ["hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"],
            ["out_hidden_states"],
        ),
        **VAE,
    },
    "tiny-lcm": {**SD1, "unet": ([*UNET, "timestep_cond"], ["out_sample"]), **VAE},
    "tiny-sd15-inpaint": {**SD1, "unet": (UNET, ["out_sample"]), **VAE},
}


@pytest.mark.parametrize("architecture", EXPORTED)
def test_an_exported_family_is_verified_and_agrees_with_its_graphs(
    exported: Make, architecture: str
) -> None:
    repository = exported(architecture)
    manifest = json.loads((repository / "manifest.json").read_text())
    networks = manifest["networks"]

    assert {
        name: (record["inputs"], record["outputs"]) for name, record in networks.items()
    } == NETWORKS[architecture]
    for record in networks.values():
        verification = record["verification"]
        assert 0 < verification["error"] <= verification["tolerance"]
        assert len(verification["input_shapes"]) == 4
    loop = manifest["verification"]
    assert 0 < loop["error"] <= loop["tolerance"]
    assert loop["picture_error"] <= loop["picture_tolerance"]
    assert len(manifest["preview"]["matrix"]) == manifest["latents"]["channels"]
    for name in networks:
        assert_config_agrees(repository, name)


def assert_config_agrees(repository: Path, network: str) -> None:
    """With the graph, and that of each native backend too."""
    path = repository / network / "1" / "model.onnx"
    config = read_config(repository / network)
    check_config(config, path)

    description = Description.from_config(config)
    assert native_config(description) == config
    for is_on_gpu in (False, True):
        check_config(native_config(description, OnnxRuntimeOptions(is_on_gpu=is_on_gpu)), path)
    inputs = read_inputs(network, path)
    sizes = dict.fromkeys(
        (side.name for sides in inputs.values() for side in sides if side.name), Span(1, 2, 4)
    )
    profile = NetworkProfile(inputs, sizes).shapes
    with_graphs = TensorRtOptions([profile], graph_batches=(1, 2, 4))
    check_config(native_config(description, with_graphs), path)

    optional = [entry.name for entry in config.input if entry.optional]
    fillers = config.parameters.get("optional_inputs")
    assert list(json.loads(fillers.string_value) if fillers else {}) == optional


def test_residuals_that_are_left_out_are_described(exported: Make) -> None:
    repository = exported("tiny-sdxl")
    manifest = json.loads((repository / "manifest.json").read_text())
    text = (repository / "unet" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())

    assert manifest["controlnets"] == {"canny": {"network": "controlnet_canny"}}
    assert [record["name"] for record in manifest["denoiser"]["residuals"]] == RESIDUALS
    fillers = json.loads(config.parameters["optional_inputs"].string_value)
    assert fillers == {
        record["name"]: {
            "channels": record["channels"],
            "divisor": record["divisor"],
            "like": "sample",
        }
        for record in manifest["denoiser"]["residuals"]
    }
    assert [record["precision"] for record in manifest["networks"].values()] == [
        *["fp16"] * 3,
        *["fp32"] * 2,
        "fp16",
    ]


def test_what_is_exported_with_a_checkpoint_counts(exported: Make, make_checkpoint: Make) -> None:
    """A repository with a ControlNet is another than one without, but up to date with the same."""
    repository = exported("tiny-sdxl")
    source = str(make_checkpoint("tiny-sdxl"))
    controlnets = {"canny": str(make_checkpoint("tiny-sdxl-controlnet"))}

    def again(**options: Any) -> bool:
        return export_checkpoint(source, repository, precision=Precision.FP16, **options)

    assert again(controlnets=controlnets) is False
    for options in (
        {},
        {"controlnets": {"depth": controlnets["canny"]}},
        {"controlnets": controlnets, "sampler": "ddim"},
    ):
        with pytest.raises(ExportError, match="--force replaces it"):
            again(**options)


def test_the_transformers_positions_are_right_at_every_size(exported: Make) -> None:
    """They are cut out of the middle of a grid, whose size the graph must not have fixed."""
    manifest = json.loads((exported("tiny-sd3") / "manifest.json").read_text())
    record = manifest["networks"]["transformer"]
    sizes = {tuple(shapes[0][2:]) for shapes in record["verification"]["input_shapes"]}

    assert sizes == {(16, 16), (4, 8), (8, 4), (4, 4)}
    assert record["verification"]["errors"]["out_hidden_states"] < 1e-5
