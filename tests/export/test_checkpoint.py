"""Checkpoints of every family load as what they are, with the weights that are stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom_export import ExportError
from darkroom_export.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_controlnet,
    load_checkpoint,
    load_controlnet,
)
from darkroom_export.random_checkpoint import ARCHITECTURES, make_random_checkpoint

SD, XL, SD3 = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3"
EXPECTED = {
    "tiny-sd15": ("sd1", f"{SD}Pipeline", "UniPCMultistepScheduler"),
    "tiny-sd15-safety": ("sd1", f"{SD}Pipeline", "UniPCMultistepScheduler"),
    "tiny-sd15-inpaint": ("sd1", f"{SD}InpaintPipeline", "DDIMScheduler"),
    "tiny-lcm": ("sd1", "LatentConsistencyModelPipeline", "LCMScheduler"),
    "tiny-sd21": ("sd2", f"{SD}Pipeline", "DDIMScheduler"),
    "tiny-turbo": ("sd2", f"{SD}Pipeline", "EulerDiscreteScheduler"),
    "tiny-sdxl": ("sdxl", f"{XL}Pipeline", "EulerDiscreteScheduler"),
    "tiny-sdxl-turbo": ("sdxl", f"{XL}Pipeline", "EulerAncestralDiscreteScheduler"),
    "tiny-sdxl-inpaint": ("sdxl", f"{XL}InpaintPipeline", "EulerDiscreteScheduler"),
    "tiny-sdxl-refiner": ("sdxl-refiner", f"{XL}Img2ImgPipeline", "EulerDiscreteScheduler"),
    "tiny-sd3": ("sd3", f"{SD3}Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "tiny-sd3-no-t5": ("sd3", f"{SD3}Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "tiny-sd35": ("sd3", f"{SD3}Pipeline", "FlowMatchEulerDiscreteScheduler"),
}
CONTROLNETS = ("tiny-sd15-controlnet", "tiny-sdxl-controlnet")
UNET = "diffusion_pytorch_model"
Make = Callable[[str], Path]
Edit = Callable[..., None]


def load(source: Path, config: Path | None = None, **options: Any) -> Checkpoint:
    given = None if config is None else str(config)
    return load_checkpoint(find_checkpoint(str(source), given), given, **options)


def modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {k: m for k, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


@pytest.fixture
def copy(make_checkpoint: Make, tmp_path: Path) -> Make:
    """A copy of a checkpoint, to change."""

    def copy(architecture: str) -> Path:
        return shutil.copytree(make_checkpoint(architecture), tmp_path / architecture)

    return copy


def test_every_small_architecture_is_tested() -> None:
    small = {name for name in ARCHITECTURES if name.startswith("tiny-")}

    assert small == {*EXPECTED, *CONTROLNETS}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_family_is_recognised(make_checkpoint: Make, architecture: str) -> None:
    loaded = load(make_checkpoint(architecture))

    kinds = (type(loaded.pipeline).__name__, type(loaded.own_scheduler).__name__)
    assert (loaded.family, *kinds) == EXPECTED[architecture]
    modules = modules_of(loaded.pipeline)
    assert len(modules) >= 3
    assert not any(module.training for module in modules.values())


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_weights_are_the_stored_ones(make_checkpoint: Make, architecture: str) -> None:
    folder = make_checkpoint(architecture)
    for name, module in modules_of(load(folder).pipeline).items():
        (file,) = (folder / name).glob("*.safetensors")
        stored = {key.removeprefix("text_model."): t for key, t in load_file(file).items()}
        loaded = {key.removeprefix("text_model."): t for key, t in module.state_dict().items()}
        # Tied weights are stored once.
        assert stored.keys() <= loaded.keys() <= {*stored, "encoder.embed_tokens.weight"}
        for key, tensor in stored.items():
            assert torch.equal(loaded[key].to(tensor.dtype), tensor), key
        assert {t.dtype for t in loaded.values() if t.is_floating_point()} <= {
            torch.float16,
            torch.float32,
        }


@pytest.mark.parametrize("architecture", ["tiny-sdxl", "tiny-sd3", "tiny-turbo"])
def test_the_weights_stay_in_half_precision(make_checkpoint: Make, architecture: str) -> None:
    pipeline = load(make_checkpoint(architecture)).pipeline
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer

    for module in (denoiser, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}


def test_weights_in_full_precision_stay_so(copy: Make) -> None:
    folder = copy("tiny-sd15")
    file = folder / "vae" / f"{UNET}.safetensors"
    save_file({k: t.float() + 1e-6 for k, t in load_file(file).items()}, file, {"format": "pt"})
    pipeline = load(folder).pipeline

    assert (pipeline.vae.dtype, pipeline.unet.dtype) == (torch.float32, torch.float16)
    assert torch.equal(pipeline.vae.encoder.conv_in.bias, load_file(file)["encoder.conv_in.bias"])


def test_mixed_weights_lose_nothing(copy: Make) -> None:
    folder = copy("tiny-sd15")
    file = folder / "unet" / f"{UNET}.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = tensors["conv_out.bias"].float() + 1e-6
    tensors["conv_in.bias"] = tensors["conv_in.bias"].bfloat16()
    save_file(tensors, file, {"format": "pt"})
    unet = load(folder).pipeline.unet

    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_out.bias, tensors["conv_out.bias"])


@pytest.mark.parametrize(
    "architecture", ["tiny-sd15", "tiny-sd21", "tiny-sdxl", "tiny-sdxl-turbo", "tiny-lcm"]
)
def test_unipc_has_the_checkpoints_own_schedule(make_checkpoint: Make, architecture: str) -> None:
    loaded = load(make_checkpoint(architecture))
    scheduler, own = loaded.pipeline.scheduler, loaded.own_scheduler

    assert type(scheduler).__name__ == "UniPCMultistepScheduler"
    for key in ("prediction_type", "timestep_spacing", "beta_schedule", "steps_offset"):
        assert scheduler.config[key] == own.config[key]
    # The last is infinite noise where the signal is rescaled to zero.
    assert torch.allclose(scheduler.alphas_cumprod[:-1], own.alphas_cumprod[:-1])


def test_the_flow_matching_scheduler_is_kept(make_checkpoint: Make) -> None:
    loaded = load(make_checkpoint("tiny-sd3"))

    assert loaded.pipeline.scheduler is loaded.own_scheduler
    assert loaded.own_scheduler.config.shift == 3.0


@pytest.mark.parametrize("architecture", ["tiny-sd15", "tiny-sd21", "tiny-sdxl", "tiny-sd35"])
def test_the_picture_is_that_of_diffusers_own_loading(
    make_checkpoint: Make, architecture: str
) -> None:
    folder = make_checkpoint(architecture)
    ours = load(folder)
    ours.pipeline.scheduler = ours.own_scheduler
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)

    pictures = []
    for pipeline in (ours.pipeline, theirs):
        pipeline.to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}
        pictures.append(pipeline("a red cat", generator=generator, **options).images)
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("architecture", "other", "family"),
    [
        ("tiny-sd15", "StableDiffusionImg2ImgPipeline", "sd1"),
        ("tiny-sd15", "StableDiffusionInpaintPipeline", "sd1"),
        ("tiny-sd21", "StableDiffusionImg2ImgPipeline", "sd2"),
        ("tiny-sdxl", "StableDiffusionXLImg2ImgPipeline", "sdxl"),
        ("tiny-sdxl", "StableDiffusionXLInpaintPipeline", "sdxl"),
        ("tiny-sdxl-inpaint", "StableDiffusionXLPipeline", "sdxl"),
    ],
)
def test_what_it_can_do_is_told_by_the_unet_not_by_the_pipelines_name(
    copy: Make, edit: Edit, architecture: str, other: str, family: str
) -> None:
    folder = copy(architecture)
    edit(folder / "model_index.json", _class_name=other)
    loaded = load(folder)

    assert (loaded.family, type(loaded.pipeline).__name__) == (family, EXPECTED[architecture][1])


def test_t5_may_be_null_or_not_be_copied(make_checkpoint: Make, copy: Make) -> None:
    folder = copy("tiny-sd3")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)

    for loaded in (load(folder), load(make_checkpoint("tiny-sd3-no-t5"))):
        assert loaded.family == "sd3"
        assert loaded.pipeline.text_encoder_3 is None
        assert loaded.pipeline.tokenizer_3 is None


def test_options_of_the_index_reach_the_pipeline(make_checkpoint: Make) -> None:
    base, refiner = (load(make_checkpoint(f"tiny-sdxl{n}")).pipeline for n in ("", "-refiner"))

    assert base.config.force_zeros_for_empty_prompt is True
    assert refiner.config.force_zeros_for_empty_prompt is False
    assert refiner.config.requires_aesthetics_score is True
    assert base.watermark is None


@pytest.mark.parametrize("architecture", ["tiny-sdxl", "tiny-sd21", "tiny-sd3"])
def test_the_second_generations_tokenizers_pad_with_zero(
    make_checkpoint: Make, architecture: str
) -> None:
    pipeline = load(make_checkpoint(architecture)).pipeline
    padding = [
        getattr(pipeline, name).pad_token_id for name in pipeline.components if "izer" in name
    ]

    expected = {"tiny-sd21": [0], "tiny-sdxl": [49407, 0], "tiny-sd3": [49407, 0, 0]}
    assert padding == expected[architecture]


def test_the_small_t5_tokenizer_takes_the_likeliest_pieces(make_checkpoint: Make) -> None:
    tokenizer = load(make_checkpoint("tiny-sd3")).pipeline.tokenizer_3
    ids = tokenizer("a red cats", max_length=256, padding="max_length", truncation=True).input_ids

    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == 256
    assert pieces[:6] == ["▁a", "▁red", "▁cat", "s", "</s>", "<pad>"]
    assert (ids[4], ids[-1]) == (1, 0)


def test_the_safety_checker_is_loaded_when_asked_for(make_checkpoint: Make) -> None:
    folder = make_checkpoint("tiny-sd15-safety")
    without, loaded = load(folder).pipeline, load(folder, with_safety_checker=True).pipeline

    assert without.safety_checker is None
    assert without.feature_extractor is None
    assert type(loaded.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert loaded.feature_extractor.crop_size == {"height": 224, "width": 224}
    stored = load_file(folder / "safety_checker" / "model.safetensors")
    assert torch.equal(loaded.safety_checker.concept_embeds, stored["concept_embeds"])


@pytest.mark.parametrize("architecture", ["tiny-sd15", "tiny-sdxl"])
def test_a_safety_checker_that_is_not_there_is_named(
    make_checkpoint: Make, architecture: str
) -> None:
    with pytest.raises(ExportError, match=r"safety_checker: no such folder, so the checkpoint has"):
        load(make_checkpoint(architecture), with_safety_checker=True)


def test_a_safety_checker_without_its_preprocessor_is_refused(copy: Make) -> None:
    folder = copy("tiny-sd15-safety")
    (folder / "feature_extractor" / "preprocessor_config.json").unlink()

    with pytest.raises(ExportError, match=r"preprocessor_config\.json: no such file"):
        load(folder, with_safety_checker=True)


def rename_to_variant(folder: Path, variant: str) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("architecture", ["tiny-sdxl", "tiny-sd3"])
def test_a_folder_of_variants_alone_loads(
    make_checkpoint: Make, copy: Make, architecture: str, variant: str
) -> None:
    folder = copy(architecture)
    rename_to_variant(folder, variant)
    expected = modules_of(load(make_checkpoint(architecture)).pipeline)

    actual = modules_of(load(folder).pipeline)
    assert actual.keys() == expected.keys()
    for name, module in actual.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, expected[name].state_dict()[key]), (name, key)


def shard(folder: Path, stem: str, variant: str = "") -> list[Path]:
    """Spread weights over two files, as the hub's largest checkpoints do; returns them."""
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [folder / f"{stem}{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, file, {"format": "pt"})
    weight_map = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    whole.unlink()
    return files


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize(
    ("name", "stem"), [("transformer", UNET), ("text_encoder_3", "model")], ids=["first", "second"]
)
def test_weights_in_several_files_load(
    make_checkpoint: Make, copy: Make, name: str, stem: str, variant: str
) -> None:
    folder = copy("tiny-sd3")
    shard(folder / name, stem, variant)
    expected = getattr(load(make_checkpoint("tiny-sd3")).pipeline, name).state_dict()

    actual = getattr(load(folder).pipeline, name).state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "stem"), [("transformer", UNET), ("text_encoder_3", "model")], ids=["first", "second"]
)
def test_a_missing_file_of_several_is_named(copy: Make, name: str, stem: str) -> None:
    folder = copy("tiny-sd3")
    files = shard(folder / name, stem)
    files[1].unlink()

    with pytest.raises(ExportError, match=f"{files[1].name}: no such file, but {stem}.*names it"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_malformed_index_of_weights_is_named(copy: Make, content: str) -> None:
    folder = copy("tiny-sd15")
    shard(folder / "unet", UNET)
    (folder / "unet" / f"{UNET}.safetensors.index.json").write_text(content)

    with pytest.raises(ExportError, match=r"safetensors\.index\.json: malformed"):
        load(folder)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("tiny-sd15", {"unet": [None, None]}, "unet: is missing, UNet2DConditionModel is needed"),
        ("tiny-sd15", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae: AutoencoderTiny is not sup"),
        ("tiny-sd15", {"vae": "AutoencoderKL"}, "vae: malformed"),
        ("tiny-sd15", {"text_encoder": ["transformers", "Magic"]}, "text_encoder: Magic is not"),
        ("tiny-sdxl", {"text_encoder": [None, None]}, "text_encoder: is missing, CLIPTextModel is"),
        ("tiny-sd3", {"text_encoder_2": [None, None]}, "text_encoder_2: is missing"),
        ("tiny-sd3", {"transformer": ["diffusers", "Flux"]}, "Flux is not supported, there is SD3"),
        ("tiny-sdxl-refiner", {"requires_aesthetics_score": False}, "requires_aesthetics_score is"),
        ("tiny-sd15", {"_class_name": ["custom", "StableDiffusionPipeline"]}, "malformed, _class"),
    ],
)
def test_an_index_of_something_else_is_refused(
    copy: Make, edit: Edit, architecture: str, values: dict[str, Any], message: str
) -> None:
    folder = copy(architecture)
    edit(folder / "model_index.json", **values)

    with pytest.raises(ExportError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae", {"latents_mean": [0.0] * 4}, "vae: config latents_mean is not"),
        ("vae", {"latents_std": [1.0] * 4}, "vae: config latents_std is not"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny is not support"),
        ("unet", {"_class_name": "UNet2DModel"}, "UNet2DModel is not supported"),
        ("unet", {"quantization_config": {"bits": 4}}, "quantization_config is not"),
    ],
)
def test_a_component_of_another_kind_is_refused(
    copy: Make, edit: Edit, part: str, values: dict[str, Any], message: str
) -> None:
    folder = copy("tiny-sdxl")
    edit(folder / part / "config.json", **values)

    with pytest.raises(ExportError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        ({"invert_sigmas": True}, "invert_sigmas is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling is not supported"),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler is not supported here"),
    ],
)
def test_flow_matching_that_the_engine_cannot_do_is_refused(
    copy: Make, edit: Edit, values: dict[str, Any], message: str
) -> None:
    folder = copy("tiny-sd3")
    edit(folder / "scheduler" / "scheduler_config.json", **values)

    with pytest.raises(ExportError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("path", "donor", "message"),
    [
        ("tiny-sdxl/unet", "tiny-sd15", "cross_attention_dim is 32, but .* 80 wide"),
        ("tiny-sd15/unet", "tiny-sdxl-refiner", "cross_attention_dim is 48, but .* 32 wide"),
        ("tiny-sd15/vae", "tiny-sd3", "UNet of 4 in_channels is not supported for sd1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    make_checkpoint: Make, copy: Make, path: str, donor: str, message: str
) -> None:
    architecture, _, part = path.partition("/")
    folder = copy(architecture)
    shutil.rmtree(folder / part)
    shutil.copytree(make_checkpoint(donor) / part, folder / part)

    with pytest.raises(ExportError, match=message):
        load(folder)


def test_a_refusal_leaves_pytorch_as_it_was(copy: Make, edit: Edit) -> None:
    folder = copy("tiny-sd15")
    edit(folder / "unet" / "config.json", block_out_channels=[32, 128])

    with pytest.raises(ExportError, match="expected shape"):
        load(folder)
    assert torch.get_default_dtype() == torch.float32


def test_a_refiner_by_accident_is_refused(copy: Make, edit: Edit) -> None:
    folder = copy("tiny-sdxl")
    edit(
        folder / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        requires_aesthetics_score=True,
    )
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")

    with pytest.raises(ExportError, match=r"cross_attention_dim is 80, but .* 48 wide"):
        load(folder)


def test_a_text_encoder_without_its_projection_is_refused(copy: Make) -> None:
    folder = copy("tiny-sdxl")
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(ExportError, match=r"text_encoder_2: weights are missing: text_projection"):
        load(folder)


@pytest.mark.parametrize("architecture", CONTROLNETS)
def test_a_controlnet_loads_with_the_stored_weights(
    make_checkpoint: Make, architecture: str
) -> None:
    folder = make_checkpoint(architecture)
    file = folder / f"{UNET}.safetensors"
    stored = load_file(file)

    for source in (folder, file):
        files = find_controlnet(str(source))
        model = load_controlnet(files)
        assert len(files.sha256) == 64
        assert model.dtype == torch.float16
        assert model.state_dict().keys() == stored.keys()
        assert all(torch.equal(model.state_dict()[key], stored[key]) for key in stored)


@pytest.mark.parametrize("architecture", CONTROLNETS)
def test_a_random_controlnet_has_an_effect(make_checkpoint: Make, architecture: str) -> None:
    model = load_controlnet(find_controlnet(str(make_checkpoint(architecture))))

    convolutions = [*model.controlnet_down_blocks, model.controlnet_mid_block]
    assert all(float(module.weight.detach().std()) > 0.01 for module in convolutions)


def test_a_controlnet_of_variants_alone_loads(copy: Make) -> None:
    folder = copy(CONTROLNETS[0])
    rename_to_variant(folder, "fp16")

    assert load_controlnet(find_controlnet(str(folder))).dtype == torch.float16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel is not supported, there"),
        ({"global_pool_conditions": True}, "global_pool_conditions is not supported"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is not supported"),
        ({"block_out_channels": [32, 128]}, "expected shape"),
    ],
)
def test_a_controlnet_of_another_kind_is_refused(
    copy: Make, edit: Edit, values: dict[str, Any], message: str
) -> None:
    folder = copy(CONTROLNETS[0])
    edit(folder / "config.json", **values)

    with pytest.raises(ExportError, match=message):
        load_controlnet(find_controlnet(str(folder)))


def test_a_controlnet_that_is_broken_or_missing_is_named(copy: Make, tmp_path: Path) -> None:
    folder = copy(CONTROLNETS[0])
    file = folder / f"{UNET}.safetensors"
    content = file.read_bytes()

    for source in ("nowhere", "nowhere.safetensors"):
        with pytest.raises(ExportError, match=f"{source}: no such file"):
            find_controlnet(str(tmp_path / source))
    file.write_bytes(content[:-100])
    for source in (folder, file):
        with pytest.raises(ExportError, match=f"{UNET}.safetensors: SafetensorError"):
            load_controlnet(find_controlnet(str(source)))


def test_a_controlnet_with_a_missing_weight_is_refused(copy: Make) -> None:
    folder = copy(CONTROLNETS[0])
    file = folder / f"{UNET}.safetensors"
    tensors = load_file(file)
    del tensors["controlnet_mid_block.weight"]
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(ExportError, match="weights are missing: controlnet_mid_block"):
        load_controlnet(find_controlnet(str(folder)))
    with pytest.raises(ExportError, match="weights are missing"):
        load_controlnet(find_controlnet(str(file)))


def test_a_checkpoint_is_no_controlnet_and_the_other_way_round(make_checkpoint: Make) -> None:
    with pytest.raises(ExportError, match=r"config\.json: no such file"):
        load_controlnet(find_controlnet(str(make_checkpoint("tiny-sd15"))))
    with pytest.raises(ExportError, match="is one component, not a checkpoint"):
        find_checkpoint(str(make_checkpoint(CONTROLNETS[0])))


def test_the_hash_is_of_the_contents(make_checkpoint: Make, copy: Make) -> None:
    original, copied = make_checkpoint("tiny-sd3"), copy("tiny-sd3")
    before = find_checkpoint(str(copied)).sha256

    assert before == find_checkpoint(str(original)).sha256
    with (copied / "tokenizer_3" / "tokenizer.json").open("a") as stream:
        stream.write("\n")
    assert find_checkpoint(str(copied)).sha256 != before


def test_a_hub_id_is_downloaded_as_safetensors_and_in_half_precision_if_need_be(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(source: str, *, variant: str | None, use_safetensors: bool) -> str:
        asked.append((source, variant, use_safetensors))
        if variant is None:
            raise OSError("no file named diffusion_pytorch_model.safetensors")
        return str(make_checkpoint("tiny-sd15"))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)

    assert find_checkpoint("owner/name").path == make_checkpoint("tiny-sd15")
    assert asked == [("owner/name", None, True), ("owner/name", "fp16", True)]


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)

    with pytest.raises(ExportError, match=r"owner/name: not a folder here, and OSError: offline$"):
        find_checkpoint("owner/name")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")

    for find in (find_checkpoint, find_controlnet):
        with pytest.raises(ExportError, match=rf"{name}: is a pickle, .* convert it to safetensor"):
            find(str(tmp_path / name))
        with pytest.raises(ExportError, match=r"nowhere\.ckpt: no such file"):
            find(str(tmp_path / "nowhere.ckpt"))


def test_a_random_checkpoint_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_random_checkpoint(CONTROLNETS[0], tmp_path / name, seed)
    one, two, three = (
        (tmp_path / name / f"{UNET}.safetensors").read_bytes() for name in ("one", "two", "three")
    )

    assert one == two
    assert one != three
