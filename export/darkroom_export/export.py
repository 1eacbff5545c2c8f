"""The whole way from a checkpoint to a model repository."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from darkroom.progress import Progress, silent_progress
from darkroom_export import repository as repo
from darkroom_export.backend import Backend
from darkroom_export.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from darkroom_export.configs import MODEL_FILES, Options, PythonOptions, TorchOptions, served_inputs
from darkroom_export.controlnet import (
    ControlNet,
    check_controlnets,
    check_name,
    controlnet_spec,
    find_controlnets,
)
from darkroom_export.device import find_device, in_full_float32
from darkroom_export.digest import file_sha256
from darkroom_export.errors import ExportError
from darkroom_export.families import FAMILIES, Family, vae_scale_factor
from darkroom_export.loop import loop_reference, verify_loop
from darkroom_export.lora import (
    LoraFile,
    add_adapters,
    add_lora_inputs,
    check_adapters,
    load_and_fuse,
)
from darkroom_export.manifest import MANIFEST_FORMAT, Defaults, describe, describe_text
from darkroom_export.memory import free
from darkroom_export.networks import MAX_BATCH_SIZE, NetworkSpec, network_specs
from darkroom_export.precision import Precision, in_float32
from darkroom_export.preview import fit_preview
from darkroom_export.safety import describe_safety_checker, safety_checker_spec
from darkroom_export.to_onnx import export_onnx
from darkroom_export.to_program import export_program
from darkroom_export.verify import input_shapes, network_reference, verify_network

SEED = 20
_OPTIONS: Mapping[Backend, Options] = {
    Backend.PYTHON: PythonOptions(),
    Backend.TORCH: TorchOptions(
        parameters={
            "compile": "0",
            "cuda_graphs": "1",
            "row_buckets": "1,2,4,6,8,12,16,24,32",
        }
    ),
}
"""What there are exports to, and how these are run."""


def export_checkpoint(
    source: str,
    target: Path,
    *,
    backend: Backend = Backend.PYTHON,
    precision: Precision = Precision.FP32,
    config: str | None = None,
    force: bool = False,
    progress: Progress = silent_progress,
    controlnets: Mapping[str, str] | None = None,
    safety_checker: bool = False,
    loras: Mapping[str, str] | None = None,
    variants: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    fused_loras: Sequence[tuple[str, float]] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    device: str = "cpu",
) -> bool:
    """Export a checkpoint into the model repository `target`.

    Args:
        source: a diffusers folder, a single .safetensors file, or a hub id.
        backend: what is to run the networks, python or torch; `darkroom build` makes the others of
            what python runs.
        config: for a single file, the diffusers folder that describes its architecture.
        force: replace a repository that was made from something else.
        controlnets: diffusers folders or .safetensors files, by the names that requests will use.
        safety_checker: export the checkpoint's safety checker too.
        loras: files by name, of which each row of a call may take its own share.
        variants: files with their scales by name, that become part of further networks.
        fused_loras: files with their scales, that become part of all that is exported.
        num_inference_steps, guidance_scale, sampler: what a request that does not say so gets, in
            place of what the checkpoint was made for.
        device: where PyTorch computes what the networks are compared with, cpu or cuda; and, with
            the backend torch, where they are run to be compared.

    Returns:
        False if `target` was made from the same checkpoint before: then its networks are kept, and
        only the Python models are brought up to date. An older manifest format, which this
        engine cannot serve, is no such repository: it is exported again.

    Raises:
        ExportError: names the file and the reason; `target` is as it was before.
    """
    _check_choices(backend, precision)
    place = find_device(device)
    existing = _existing(target)
    files = find_checkpoint(source, config)
    defaults = Defaults(num_inference_steps, guidance_scale, sampler)
    extras = _Extras(
        find_controlnets(controlnets or {}),
        safety_checker,
        {name: Path(path) for name, path in (loras or {}).items()},
        {name: _lora_files(pairs) for name, pairs in (variants or {}).items()},
        _lora_files(fused_loras),
    )
    identity = {
        "sha256": files.sha256,
        "backend": str(backend),
        "precision": str(precision),
        **extras.identity(),
    }
    if given := defaults.given():
        identity["defaults"] = given
    if existing is not None and not force:
        is_same = _identity(existing) == identity
        if is_same and _is_complete(target, existing):
            repo.write_python_models(target, existing)
            return False
        if not (is_same and _is_outdated(existing)):
            raise ExportError(
                f"{target}: holds {existing.get('name')} in {existing.get('precision')}, made from "
                "another checkpoint or with other options, or is damaged; --force replaces it"
            )

    def load() -> Checkpoint:
        checkpoint = load_checkpoint(files, config, with_safety_checker=safety_checker)
        load_and_fuse(checkpoint.pipeline, extras.fused_loras)
        return checkpoint

    with progress("loading the checkpoint"):
        checkpoint = load()
    family = FAMILIES[checkpoint.family]
    check_controlnets(extras.controlnets, checkpoint.pipeline, family)
    check_adapters(getattr(checkpoint.pipeline, family.denoiser), extras.loras)
    with repo.atomic_directory(target) as partial, in_full_float32():
        manifest = describe(checkpoint, backend, precision, defaults, extras.controlnets)
        manifest |= {"name": target.resolve().name, "identity": identity}
        manifest["text"] = describe_text(checkpoint.pipeline, family, partial)
        if safety_checker:
            manifest["safety_checker"] = describe_safety_checker(checkpoint.pipeline)
        export = _Export(family, extras, partial, backend, precision, place, progress, manifest)
        export.checkpoint(checkpoint.pipeline)
        del checkpoint
        for name, variant in extras.variants.items():
            with progress(f"loading the checkpoint again, for the variant {name}"):
                pipeline = load().pipeline
                changed = load_and_fuse(pipeline, variant)
            export.variant(name, pipeline, changed)
        repo.write_python_models(partial, manifest)
        repo.write_manifest(partial, manifest)
        if extras.loras:
            add_adapters(partial, extras.loras)
    return True


@dataclass(frozen=True)
class _Extras:
    """What is exported with a checkpoint's own networks, or into them."""

    controlnets: list[ControlNet]
    safety_checker: bool
    loras: Mapping[str, Path]
    variants: Mapping[str, Sequence[LoraFile]]
    fused_loras: Sequence[LoraFile]

    def __post_init__(self) -> None:
        for name in self.variants:
            check_name("variant", name)

    def identity(self) -> dict[str, Any]:
        """What of it there is, pinned by contents."""
        parts = {
            "controlnets": {net.name: net.files.sha256 for net in self.controlnets},
            "safety_checker": self.safety_checker,
            "loras": {name: file_sha256(path) for name, path in self.loras.items()},
            "variants": {
                name: [_pinned(lora) for lora in loras] for name, loras in self.variants.items()
            },
            "fused_loras": [_pinned(lora) for lora in self.fused_loras],
        }
        return {key: value for key, value in parts.items() if value}


def _lora_files(pairs: Sequence[tuple[str, float]]) -> list[LoraFile]:
    return [LoraFile(Path(path), scale) for path, scale in pairs]


def _pinned(lora: LoraFile) -> list[Any]:
    return [file_sha256(lora.path), lora.scale]


@dataclass(frozen=True)
class _Export:
    """An export under way: networks are written, compared, and noted in the manifest.

    Only the network that is being exported is in float32, or converted; then it is freed.
    """

    family: Family
    extras: _Extras
    target: Path
    backend: Backend
    precision: Precision
    device: torch.device
    progress: Progress
    manifest: dict[str, Any]
    specs: dict[str, NetworkSpec] = field(default_factory=dict)
    """Of the networks that were exported, without their modules."""
    paths: dict[str, Path] = field(default_factory=dict)

    def checkpoint(self, pipeline: Any) -> None:
        """Export all networks, and compare the loop over them."""
        with self.progress("running the checkpoint in PyTorch, to compare with"):
            loop = loop_reference(pipeline, self.family, SEED, self.device)
        fitting = "fitting the colours of the latents, for previews"
        with self.progress(fitting), in_float32(pipeline.vae, device=self.device):
            preview = fit_preview(pipeline.vae, vae_scale_factor(pipeline), SEED + 2)
        self.manifest["preview"] = preview
        for spec in self._specs(pipeline):
            self._network(spec, pipeline)
        with self.progress("comparing the whole loop with diffusers"):
            record = verify_loop(loop, self.specs, self.paths, self.precision, self.device)
        self.manifest["verification"] = record

    def variant(self, name: str, pipeline: Any, changed: Sequence[str]) -> None:
        """Export the networks that a variant's LoRAs changed, and compare the loop over them."""
        with self.progress(f"running the variant {name} in PyTorch, to compare with"):
            loop = loop_reference(pipeline, self.family, SEED, self.device)
        names = {network: f"{network}_{name}" for network in changed}
        for spec in self._own_specs(pipeline):
            if spec.name in names:
                self._network(replace(spec, name=names[spec.name]), pipeline)
        paths = self.paths | {network: self.paths[other] for network, other in names.items()}
        with self.progress(f"comparing the whole loop of the variant {name} with diffusers"):
            verify_loop(loop, self.specs, paths, self.precision, self.device)
        self.manifest["variants"][name] = names

    def _specs(self, pipeline: Any) -> Iterator[NetworkSpec]:
        """All networks; a ControlNet is loaded when its turn comes."""
        yield from self._own_specs(pipeline)
        if self.extras.safety_checker:
            yield safety_checker_spec(pipeline)
        for controlnet in self.extras.controlnets:
            yield controlnet_spec(controlnet, pipeline, self.family)

    def _own_specs(self, pipeline: Any) -> Iterator[NetworkSpec]:
        is_controlled = bool(self.extras.controlnets)
        for spec in network_specs(pipeline, self.family, is_controlled=is_controlled):
            is_adaptable = spec.name == self.family.denoiser and self.extras.loras
            yield add_lora_inputs(spec) if is_adaptable else spec

    def _network(self, spec: NetworkSpec, pipeline: Any) -> None:
        folder = repo.write_network_model(self.target, spec, _OPTIONS[self.backend]).parent
        path = folder / MODEL_FILES[self.backend]
        with self.progress(f"running {spec.name} in PyTorch, to compare with"):
            shapes = input_shapes(pipeline, self.family)
            reference = network_reference(spec, shapes, SEED + 1, self.device)
        export = export_program if self.backend is Backend.TORCH else export_onnx
        own = spec.precision(self.precision)
        with self.progress(f"exporting {spec.name} to {path.name} in {own}"):
            files = export(spec, self.precision, path)
            free(spec.module)
        with self.progress(f"comparing {spec.name} with PyTorch"):
            verification = verify_network(spec, reference, path, self.precision, self.device)
        self.manifest["networks"][spec.name] = {
            "backend": str(self.backend),
            "files": repo.hash_files(self.target, files),
            "inputs": [tensor.name for tensor in served_inputs(spec)],
            "outputs": [tensor.name for tensor in spec.outputs],
            "max_batch_size": MAX_BATCH_SIZE,
            "precision": str(own),
            "verification": verification,
        }
        self.specs[spec.name] = replace(spec, module=nn.Identity())
        self.paths[spec.name] = path


def _check_choices(backend: Backend, precision: Precision) -> None:
    if backend not in _OPTIONS:
        raise ExportError(
            f"backend: {backend} is not exported to, but {' or '.join(_OPTIONS)}; darkroom build "
            f"makes {backend} of a repository of {Backend.PYTHON}"
        )
    if backend is not Backend.TORCH and precision is Precision.BF16:
        raise ExportError(
            f"precision: {precision} needs the backend {Backend.TORCH}; allowed with {backend} are "
            f"{Precision.FP32}, {Precision.FP16}"
        )


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


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a repository was made from; older ones do not name their backend, there was but one."""
    return {"backend": str(Backend.PYTHON), **manifest.get("identity", {})}


def _is_outdated(manifest: dict[str, Any]) -> bool:
    version = manifest.get("format")
    return isinstance(version, int) and version < MANIFEST_FORMAT


def _is_complete(target: Path, manifest: dict[str, Any]) -> bool:
    records = [*manifest.get("networks", {}).values(), *manifest.get("loras", {}).values()]
    return manifest.get("format") == MANIFEST_FORMAT and all(
        (target / file).is_file() and file_sha256(target / file) == sha256
        for record in records
        for file, sha256 in record["files"].items()
    )
