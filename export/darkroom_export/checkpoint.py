"""Load a checkpoint, recognise its family and pin it by hash."""

import hashlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from darkroom_export.digest import file_sha256
from darkroom_export.errors import ExportError, first_line
from darkroom_export.quiet import quieten
from darkroom_export.schedulers import check_scheduler, load_scheduler, unipc
from darkroom_export.single_file import load_single_file
from darkroom_export.weights import (
    PICKLES,
    default_dtype,
    find_weights,
    pickle_refusal,
    read_header,
    read_json,
    refuse_pickles,
    stored_dtype,
)


@dataclass(frozen=True)
class Component:
    """One of a pipeline's components: what it is called, and as which classes it is supported."""

    name: str
    classes: tuple[str, ...]
    """The first is loaded."""
    is_optional: bool = False


def _component(name: str, *classes: str) -> Component:
    return Component(name, classes)


def _optional(name: str, *classes: str) -> Component:
    return Component(name, classes, is_optional=True)


_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_UNET = _component("unet", "UNet2DConditionModel")
_VAE = _component("vae", "AutoencoderKL")
_BIG_CLIP = (
    _component("text_encoder_2", "CLIPTextModelWithProjection"),
    _component("tokenizer_2", *_CLIP_TOKENIZERS),
)
_SD = (
    _component("text_encoder", "CLIPTextModel"),
    _component("tokenizer", *_CLIP_TOKENIZERS),
    _UNET,
    _VAE,
)
_SDXL = (*_SD, *_BIG_CLIP)
_SDXL_IMAGE_TO_IMAGE = (
    _optional("text_encoder", "CLIPTextModel"),
    _optional("tokenizer", *_CLIP_TOKENIZERS),
    _UNET,
    _VAE,
    *_BIG_CLIP,
)
_SD3 = (
    _component("text_encoder", "CLIPTextModelWithProjection"),
    _component("tokenizer", *_CLIP_TOKENIZERS),
    *_BIG_CLIP,
    _optional("text_encoder_3", "T5EncoderModel"),
    _optional("tokenizer_3", "T5TokenizerFast", "T5Tokenizer"),
    _component("transformer", "SD3Transformer2DModel"),
    _VAE,
)

PIPELINES: Mapping[str, tuple[Component, ...]] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL_IMAGE_TO_IMAGE,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
}
"""Supported pipeline classes of diffusers, and the components that are taken from each."""

_TEXT_TO_IMAGE = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
_INPAINT = {
    "sd1": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
}
_CONTROLNET = Component("", ("ControlNetModel",))
_SAFETY_CHECKER = Component("safety_checker", ("StableDiffusionSafetyChecker",))
_OPTIONS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""Parameters of the pipelines that stand in model_index.json."""


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on disk, pinned by its contents."""

    source: str
    """What the user named: a folder, a file or a hub id."""
    path: Path
    """The diffusers folder, or the single .safetensors file."""
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint on the CPU, in the precision in which its weights are stored."""

    files: CheckpointFiles
    family: str
    """sd1, sd2, sdxl, sdxl-refiner or sd3."""
    pipeline: Any
    """Of the family's text-to-image class, or of its inpainting class if the UNet is made for that.

    Its scheduler is UniPC with the checkpoint's noise schedule, or the flow-matching one.
    """
    own_scheduler: Any
    """The scheduler that the checkpoint comes with."""


def find_checkpoint(source: str, config: str | None = None) -> CheckpointFiles:
    """Find a diffusers folder, a single .safetensors file, or a hub id, and hash it.

    Args:
        config: for a single file, what describes its architecture; a folder counts into the hash.

    Raises:
        ExportError: there is no such checkpoint, or it is of a family that is not supported.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or path.suffix in PICKLES:
        _check_single_file(path)
        # The scheduler and the tokenizer come from the architecture's folder.
        described = sorted(Path(config).rglob("*")) if config and Path(config).is_dir() else []
        parts = [file for file in described if file.suffix in (".json", ".txt")]
        return CheckpointFiles(source, path, _sha256([path, *parts]))
    folder = path if path.is_dir() else _download(source)
    read_index(folder)
    parts = sorted(file for file in folder.rglob("*") if _is_part(file))
    return CheckpointFiles(source, folder, _sha256(parts))


def load_checkpoint(
    files: CheckpointFiles, config: str | None = None, *, with_safety_checker: bool = False
) -> Checkpoint:
    """Load what `find_checkpoint` found, in the precision in which the weights are stored.

    Args:
        config: for a single file, the diffusers folder or hub id that describes its architecture;
            left out, diffusers infers it and may have to ask the hub.

    Raises:
        ExportError: a part is missing or broken, or the family is not supported.
    """
    quieten()
    path = files.path
    if path.is_file():
        class_name, parts, options = load_single_file(path, config, _class_of_config(config))
    else:
        class_name, parts, options = _load_folder(path)
    if with_safety_checker:
        parts |= _load_safety_checker(path)
    family = family_of(path, class_name, parts, options)
    _check_vae(path, parts["vae"])
    _check_widths(path, family, parts)
    own_scheduler = parts.pop("scheduler")
    is_flow = family == "sd3"
    check_scheduler(str(path), type(own_scheduler), own_scheduler.config, is_flow=is_flow)
    scheduler = own_scheduler if is_flow else unipc(str(path), own_scheduler)
    kind = getattr(diffusers, _pipeline_class(path, class_name, family, parts))
    pipeline = _make_pipeline(kind, {**parts, "scheduler": scheduler}, options)
    return Checkpoint(files, family, pipeline, own_scheduler)


def find_controlnet(source: str) -> CheckpointFiles:
    """Find a ControlNet, a diffusers folder or a single .safetensors file, and hash it.

    Raises:
        ExportError: there is no such thing.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_part(file))
        return CheckpointFiles(source, path, _sha256(files))
    _check_single_file(path)
    config = path.with_name("config.json")
    return CheckpointFiles(source, path, _sha256([path, *([config] if config.is_file() else [])]))


def load_controlnet(files: CheckpointFiles, config: str | None = None) -> Any:
    """Load what `find_controlnet` found, in the precision in which the weights are stored.

    Args:
        config: for a single file, the folder or hub id with its config.json; left out, the file's
            own folder if there is one, and otherwise the hub.

    Raises:
        ExportError: the weights are missing or broken, or it is another kind of network.
    """
    quieten()
    path = files.path
    model = _load_single_controlnet(path, config) if path.is_file() else _load(path, _CONTROLNET)
    for key in ("global_pool_conditions", "class_embed_type", "encoder_hid_dim_type"):
        if model.config.get(key):
            raise ExportError(f"{path}: ControlNet config {key} is not supported")
    if model.config.controlnet_conditioning_channel_order != "rgb":
        raise ExportError(
            f"{path}: ControlNet config controlnet_conditioning_channel_order is not supported, "
            "but as rgb"
        )
    return model


def _load_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The folder's pipeline class, its components, and the pipeline's options."""
    index = read_index(folder)
    class_name = index["_class_name"]
    # Before any weights are loaded, which takes long.
    present = {part: is_present(folder, index, part) for part in PIPELINES[class_name]}
    is_flow = class_name == _TEXT_TO_IMAGE["sd3"]
    parts: dict[str, Any] = {"scheduler": load_scheduler(folder / "scheduler", is_flow=is_flow)}
    for part, is_there in present.items():
        parts[part.name] = _load(folder / part.name, part) if is_there else None
    return class_name, parts, {key: index[key] for key in _OPTIONS if key in index}


def is_present(folder: Path, index: Mapping[str, Any], part: Component) -> bool:
    """Whether the folder has this component.

    Raises:
        ExportError: it has another in its place, or none where one is needed.
    """
    where = f"{folder / 'model_index.json'}: {part.name}"
    match index.get(part.name):
        case [str(), str(class_name)]:
            if class_name not in part.classes:
                raise ExportError(
                    f"{where}: {class_name} is not supported, there is {part.classes[0]}"
                )
            # What is optional may be left out by not copying it.
            return not part.is_optional or (folder / part.name).is_dir()
        case None | [None, None]:
            if part.is_optional:
                return False
            raise ExportError(f"{where}: is missing, {part.classes[0]} is needed")
        case other:
            raise ExportError(f"{where}: malformed, {other!r}")


def _load(folder: Path, part: Component) -> Any:
    class_name = part.classes[0]
    if class_name in ("CLIPTokenizer", "T5TokenizerFast"):
        return _load_tokenizer(folder, class_name)
    return _load_module(folder, class_name)


def _load_tokenizer(folder: Path, class_name: str) -> Any:
    needed = ("spiece.model" if class_name.startswith("T5") else "vocab.json", "tokenizer.json")
    # transformers makes an empty tokenizer of a missing one.
    if not any((folder / file).is_file() for file in needed):
        raise ExportError(f"{folder}: has neither {' nor '.join(needed)}")
    try:
        return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ExportError(f"{folder}: {first_line(error)}") from error


def _load_module(folder: Path, class_name: str) -> Any:
    file = folder / "config.json"
    config = read_json(file)
    if config.get("quantization_config"):
        raise ExportError(f"{file}: quantization_config is not supported")
    is_transformers = hasattr(transformers, class_name) or class_name == _SAFETY_CHECKER.classes[0]
    if is_transformers:
        kind = getattr(transformers, class_name, StableDiffusionSafetyChecker)
    else:
        kind = getattr(diffusers, class_name)
        if config.get("_class_name") != class_name:
            raise ExportError(
                f"{file}: {config.get('_class_name')} is not supported, there is {class_name}"
            )
    weights = find_weights(folder, "model" if is_transformers else "diffusion_pytorch_model")
    # The libraries name the type differently, and transformers' error of a shape names no weight.
    options: dict[str, Any] = (
        {"dtype": weights.dtype, "ignore_mismatched_sizes": True}
        if is_transformers
        else {"torch_dtype": weights.dtype}
    )
    try:
        # diffusers changes the default type, and leaves it changed if it fails.
        with default_dtype(weights.dtype), warnings.catch_warnings():
            # Of the name of the type's argument.
            warnings.simplefilter("ignore", FutureWarning)
            # Pickles run code when they are read: weights are safetensors or nothing.
            module, report = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=weights.variant,
                **options,
            )
    except Exception as error:  # diffusers and transformers raise many kinds
        raise ExportError(f"{folder}: {first_line(error)}") from error
    # Both would be random numbers.
    for problem, key in (("missing", "missing_keys"), ("of another shape", "mismatched_keys")):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            raise ExportError(f"{folder}: weights are {problem}: {', '.join(names[:3])}")
    return module


def _load_safety_checker(folder: Path) -> dict[str, Any]:
    """The safety checker of a diffusers folder, and what prepares pictures for it."""
    where = folder / _SAFETY_CHECKER.name
    if not where.is_dir():
        raise ExportError(f"{where}: no such folder, so the checkpoint has no safety checker")
    extractor = folder / "feature_extractor"
    read_json(extractor / "preprocessor_config.json")
    try:
        prepare = transformers.CLIPImageProcessor.from_pretrained(extractor, local_files_only=True)
    except Exception as error:  # as above
        raise ExportError(f"{extractor}: {first_line(error)}") from error
    return {"safety_checker": _load(where, _SAFETY_CHECKER), "feature_extractor": prepare}


def _load_single_controlnet(path: Path, config: str | None) -> Any:
    dtype = stored_dtype(path, read_header(path).values())
    if config is None and path.with_name("config.json").is_file():
        config = str(path.parent)
    try:
        with default_dtype(dtype):
            model = diffusers.ControlNetModel.from_single_file(
                str(path),
                config=config,
                local_files_only=config is not None and Path(config).is_dir(),
            )
    except NotImplementedError as error:
        # What diffusers says of a weight that is still without a value.
        raise ExportError(f"{path}: weights are missing") from error
    except Exception as error:  # as above
        raise ExportError(f"{path}: {first_line(error)}") from error
    return model


def family_of(
    path: Path, class_name: str, parts: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    """sd1, sd2, sdxl, sdxl-refiner or sd3.

    Raises:
        ExportError: it is none of them.
    """
    if class_name == "StableDiffusion3Pipeline":
        return "sd3"
    unet = parts["unet"].config
    if class_name.startswith("StableDiffusionXL"):
        if parts["text_encoder"] is not None:
            return "sdxl"
        if not options.get("requires_aesthetics_score"):
            raise ExportError(
                f"{path}: has no text_encoder, as a refiner, but requires_aesthetics_score is false"
            )
        return "sdxl-refiner"
    is_sd2 = unet.use_linear_projection or unet.cross_attention_dim == 1024
    return "sd2" if is_sd2 else "sd1"


def _pipeline_class(path: Path, class_name: str, family: str, parts: Mapping[str, Any]) -> str:
    if family == "sd3":
        return _TEXT_TO_IMAGE[family]
    channels, latents = parts["unet"].config.in_channels, parts["vae"].config.latent_channels
    # The latents, the mask, and the latents of the picture under it.
    if channels == 2 * latents + 1 and family in _INPAINT:
        return _INPAINT[family]
    if channels != latents:
        raise ExportError(f"{path}: a UNet of {channels} in_channels is not supported for {family}")
    is_consistency_model = class_name == "LatentConsistencyModelPipeline"
    return class_name if is_consistency_model else _TEXT_TO_IMAGE[family]


def _check_vae(path: Path, vae: Any) -> None:
    for key in ("latents_mean", "latents_std"):
        if vae.config.get(key) is not None:
            raise ExportError(f"{path}: vae: config {key} is not supported")


def _check_widths(path: Path, family: str, parts: Mapping[str, Any]) -> None:
    """Refuse text encoders that do not fit what they condition, which would fail much later."""
    texts = [parts.get(name) for name in ("text_encoder", "text_encoder_2")]
    width = sum(text.config.hidden_size for text in texts if text is not None)
    if family != "sd3":
        expected = parts["unet"].config.cross_attention_dim
        if expected not in (width, [width], (width,)):
            raise ExportError(
                f"{path}: the unet's cross_attention_dim is {expected}, but the text encoders are "
                f"{width} wide"
            )
        return
    expected = parts["transformer"].config.joint_attention_dim
    t5 = parts["text_encoder_3"]
    if width > expected or (t5 is not None and t5.config.d_model != expected):
        raise ExportError(
            f"{path}: the transformer's joint_attention_dim is {expected}, but the text encoders "
            f"are {width} and {t5.config.d_model if t5 is not None else 0} wide"
        )


def _make_pipeline(kind: Any, parts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": parts.get("safety_checker") is not None,
        # It would draw on the pictures that exports are compared with.
        "add_watermarker": False,
    }
    given = {**defaults, **parts, **options}
    return kind(**{key: value for key, value in given.items() if key in parameters})


def _class_of_config(config: str | None) -> str | None:
    """The pipeline class that a folder describes; what a hub id describes is not known here."""
    if config is None or not Path(config).is_dir():
        return None
    class_name: str = read_index(Path(config))["_class_name"]
    return class_name


def read_index(folder: Path) -> dict[str, Any]:
    """A diffusers folder's model_index.json, of a supported pipeline class.

    Raises:
        ExportError: it is missing or malformed, or of another class.
    """
    file = folder / "model_index.json"
    if not file.exists():
        if (folder / "config.json").is_file():
            raise ExportError(f"{file}: missing, {folder} is one component, not a checkpoint")
        refuse_pickles(folder)
        raise ExportError(f"{file}: missing, so {folder} is no diffusers folder")
    index = read_json(file)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ExportError(f"{file}: malformed, _class_name is {class_name!r}")
    if class_name not in PIPELINES:
        raise ExportError(
            f"{file}: {class_name} is not supported, there are {', '.join(PIPELINES)}"
        )
    return index


def _check_single_file(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    if path.suffix in PICKLES:
        raise ExportError(pickle_refusal(path))


def _download(source: str) -> Path:
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise ExportError(
            f"{source}: no such folder, and not a hub id of the form owner/name either"
        )
    failures = []
    # Without a variant, diffusers finds nothing where there is half precision alone.
    for variant in (None, "fp16"):
        try:
            return Path(
                diffusers.DiffusionPipeline.download(source, variant=variant, use_safetensors=True)
            )
        except Exception as error:  # noqa: BLE001  network, authorisation, missing: all end the same way
            failures.append(error)
    raise ExportError(f"{source}: not a folder here, and {first_line(failures[0])}")


def _is_part(file: Path) -> bool:
    suffixes = (".json", ".txt", ".model", ".safetensors")
    return file.suffix in suffixes and not file.name.startswith(".")


def _sha256(files: list[Path]) -> str:
    """Of the files' contents in order; names do not count, so that a copy is the same thing."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()
