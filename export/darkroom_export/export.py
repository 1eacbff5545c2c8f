"""The whole way from a checkpoint to a model repository."""

import gc
from importlib import metadata
from pathlib import Path
from typing import Any

from darkroom.progress import Progress, silent_progress
from darkroom_export import repository as repo
from darkroom_export.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from darkroom_export.errors import ExportError
from darkroom_export.networks import (
    MAX_BATCH_SIZE,
    network_specs,
    unet_size_factor,
    vae_scale_factor,
)
from darkroom_export.precision import Precision
from darkroom_export.preview import fit_preview
from darkroom_export.to_onnx import export_onnx
from darkroom_export.verify import (
    Reference,
    loop_reference,
    network_reference,
    verify_loop,
    verify_network,
)

MANIFEST_FORMAT = 2
SEED = 20
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


def export_checkpoint(
    source: str,
    target: Path,
    *,
    precision: Precision = Precision.FP32,
    config: str | None = None,
    force: bool = False,
    progress: Progress = silent_progress,
) -> bool:
    """Export a checkpoint into the model repository `target`.

    Args:
        source: a diffusers folder, a single .safetensors file, or a hub id.
        config: for a single file, the diffusers folder that describes its architecture.
        force: replace a repository that was made from something else.

    Returns:
        False if `target` was made from the same checkpoint before: then its networks are kept, and
        only the Python models are brought up to date. An older manifest format, which this
        engine cannot serve, is no such repository: it is exported again.

    Raises:
        ExportError: names the file and the reason; `target` is as it was before.
    """
    existing = _existing(target)
    files = find_checkpoint(source, config)
    identity = {"sha256": files.sha256, "precision": str(precision)}
    if existing is not None and not force:
        is_same = existing.get("identity") == identity
        if is_same and _is_complete(target, existing):
            repo.write_python_models(target, existing["networks"])
            return False
        if not (is_same and _is_outdated(existing)):
            raise ExportError(
                f"{target}: holds {existing.get('name')} in {existing.get('precision')}, made from "
                "another checkpoint or in another precision, or is damaged; --force replaces it"
            )
    with progress("loading the checkpoint"):
        checkpoint = load_checkpoint(files, config)
    with repo.atomic_directory(target) as partial:
        manifest = _export_networks(checkpoint, partial, precision, progress)
        manifest["name"] = target.resolve().name
        manifest["identity"] = identity
        repo.write_python_models(partial, manifest["networks"])
        repo.write_manifest(partial, manifest)
    return True


def _export_networks(
    checkpoint: Checkpoint, target: Path, precision: Precision, progress: Progress
) -> dict[str, Any]:
    pipeline = checkpoint.pipeline
    manifest = _describe(checkpoint, precision)
    manifest["tokenizer"] = _write_tokenizer(pipeline.tokenizer, target)
    specs = network_specs(pipeline)
    # PyTorch answers first: exporting converts the weights in place, and then frees them.
    with progress("running the checkpoint in PyTorch, to compare with"):
        loop = loop_reference(pipeline, SEED)
        references: dict[str, Reference] = {
            spec.name: network_reference(spec, pipeline, SEED + 1) for spec in specs
        }
    with progress("fitting the colours of the latents, for previews"):
        manifest["preview"] = fit_preview(pipeline.vae, vae_scale_factor(pipeline), SEED + 2)
    scheduler, scaling_factor = pipeline.scheduler, float(pipeline.vae.config.scaling_factor)

    paths: dict[str, Path] = {}
    for spec in specs:
        path = paths[spec.name] = repo.write_network_model(target, spec)
        with progress(f"exporting {spec.name} to {precision} ONNX"):
            files = export_onnx(spec, precision, path)
            spec.module.to("meta")
            gc.collect()
        with progress(f"comparing {spec.name} with PyTorch"):
            verification = verify_network(spec, references.pop(spec.name), path, precision)
        manifest["networks"][spec.name] = {
            "files": repo.hash_files(target, files),
            "inputs": [tensor.name for tensor in spec.inputs],
            "outputs": [tensor.name for tensor in spec.outputs],
            "max_batch_size": MAX_BATCH_SIZE,
            "verification": verification,
        }
    with progress("comparing the whole loop with diffusers"):
        manifest["verification"] = verify_loop(loop, scheduler, scaling_factor, paths, precision)
    return manifest


def _describe(checkpoint: Checkpoint, precision: Precision) -> dict[str, Any]:
    """All of the manifest that is known before the networks are exported."""
    pipeline = checkpoint.pipeline
    scheduler = pipeline.scheduler
    scheduler_config = scheduler.config
    alphas_cumprod = scheduler.alphas_cumprod
    vae_factor = vae_scale_factor(pipeline)
    size_multiple = vae_factor * unet_size_factor(pipeline)
    native_size = pipeline.unet.config.sample_size * vae_factor
    return {
        "format": MANIFEST_FORMAT,
        "family": checkpoint.family,
        "checkpoint": {"source": checkpoint.files.source, "sha256": checkpoint.files.sha256},
        "precision": str(precision),
        "backend": "python-onnxruntime",
        "latents": {
            "channels": pipeline.vae.config.latent_channels,
            "vae_scale_factor": vae_factor,
            "vae_scaling_factor": float(pipeline.vae.config.scaling_factor),
        },
        "noise_schedule": {
            "train_sigmas": (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).tolist(),
            "prediction_type": scheduler_config.prediction_type,
            "timestep_spacing": scheduler_config.timestep_spacing,
            "steps_offset": scheduler_config.steps_offset,
            # A key of DDIM's, which other schedulers carry along.
            "set_alpha_to_one": bool(scheduler_config.get("set_alpha_to_one", True)),
        },
        "solver": {
            key: scheduler_config[key]
            for key in (
                "solver_order",
                "solver_type",
                "predict_x0",
                "lower_order_final",
                "disable_corrector",
                "use_karras_sigmas",
                "final_sigmas_type",
            )
        },
        "limits": {
            "default_width": native_size,
            "default_height": native_size,
            "default_num_inference_steps": 25,
            "default_guidance_scale": 7.5,
            "size_multiple": size_multiple,
            "min_size": 2 * size_multiple if 2 * size_multiple <= 128 else size_multiple,
            "max_size": 2 * native_size,
            "max_num_inference_steps": 150,
            "max_guidance_scale": 50.0,
            "max_num_images_per_prompt": 16,
            # At least one layer reads the prompt.
            "max_clip_skip": pipeline.text_encoder.config.num_hidden_layers - 1,
        },
        "networks": {},
        "versions": {tool: metadata.version(tool) for tool in ("darkroom", *_TOOLS)},
    }


def _write_tokenizer(tokenizer: Any, target: Path) -> dict[str, Any]:
    """Write the tokenizer in the one file that the engine reads; returns its manifest record."""
    file = "tokenizer/tokenizer.json"
    (target / file).parent.mkdir()
    tokenizer.backend_tokenizer.save(str(target / file))
    return {
        "file": file,
        "max_length": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _existing(target: Path) -> dict[str, Any] | None:
    """The manifest of the repository that stands at `target`, None if nothing does."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise ExportError(f"{target}: is a file, not a folder")
    manifest = repo.read_manifest(target)
    if manifest is None and any(target.iterdir()):
        raise ExportError(f"{target}: is not empty, and no model repository of ours")
    return manifest


def _is_outdated(manifest: dict[str, Any]) -> bool:
    version = manifest.get("format")
    return isinstance(version, int) and version < MANIFEST_FORMAT


def _is_complete(target: Path, manifest: dict[str, Any]) -> bool:
    networks = manifest.get("networks", {})
    return manifest.get("format") == MANIFEST_FORMAT and all(
        (target / file).is_file() and repo.hash_files(target, [target / file])[file] == sha256
        for record in networks.values()
        for file, sha256 in record["files"].items()
    )
