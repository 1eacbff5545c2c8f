"""From one runner of a repository's networks to another: Python, or Triton's own backends."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.progress import Progress, silent_progress
from darkroom_export import repository as repo
from darkroom_export.backend import Backend
from darkroom_export.config_check import check_config
from darkroom_export.configs import (
    CONFIG,
    MODEL_FILES,
    Description,
    OnnxRuntimeOptions,
    Options,
    PythonOptions,
    TensorRtOptions,
    config_text,
    native_config,
    read_config,
)
from darkroom_export.digest import file_sha256
from darkroom_export.errors import ExportError
from darkroom_export.manifest import MANIFEST_FORMAT
from darkroom_export.precision import Precision
from darkroom_export.profiles import (
    NetworkProfile,
    Networks,
    Plan,
    Wishes,
    make_plan,
    read_inputs,
)
from darkroom_export.tensorrt import EngineOptions, Tell, TensorRt
from darkroom_export.tensorrt_inputs import Inputs
from darkroom_export.tensorrt_verify import compare_profiles, graph_runner

EXPORT_LIMITS = "export_limits"
"""The manifest's own limits, where `limits` are what engines can do."""
ONNX = "model.onnx"
TIMING_CACHE = "timing.cache"
GRAPH_BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 63)
"""Of which CUDA graphs are captured, as far as there are such batches."""
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How the networks are to run."""

    backend: Backend
    wishes: Wishes = field(default_factory=Wishes)
    """Of TensorRT's engines, also of those that ONNX Runtime makes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    with_cuda_graphs: bool = True
    gpus: tuple[int, ...] = ()
    """Those that get an instance of every network; () is all that the server sees."""
    is_on_gpu: bool = True
    """Whether ONNX Runtime uses one."""
    accelerator: str = "cuda"
    """What it uses it by: cuda, or tensorrt."""
    engine_cache: str = ""
    """Where, with tensorrt, it keeps its engines."""


def build_repository(
    repository: Path,
    options: BuildOptions,
    *,
    progress: Progress = silent_progress,
    tell: Tell = lambda _: None,
    tensorrt: TensorRt | None = None,
) -> int:
    """Make the networks of an exported repository run by another backend, in place.

    The ONNX files stay beside the engines, so that these can be built again. Until all is built and
    compared, the repository is as it was.

    Args:
        tell: gets lines on how far an engine is, and notes.
        tensorrt: builds engines; None is this machine's.

    Returns:
        The largest number of rows of one call of the denoiser.

    Raises:
        ExportError: names the network or the option, and the reason; nothing has changed.
    """
    manifest = repo.read_manifest(repository)
    if manifest is None:
        raise ExportError(
            f"{repository}: no exported repository; darkroom export CHECKPOINT REPOSITORY makes one"
        )
    _check(repository, manifest, options)
    limits = manifest.get(EXPORT_LIMITS, manifest["limits"])
    needs_plan = options.backend is Backend.TENSORRT or _accelerates_by_tensorrt(options)
    plan = make_plan(options.wishes, limits) if needs_plan else None
    if options.backend is not Backend.TENSORRT:
        tensorrt = None
    else:
        tensorrt = tensorrt or TensorRt.here()
        if manifest["precision"] == Precision.FP32:
            tell("the export is in float32, and so will its engines be; fp16 is faster")
    with progress("checking the exported networks"):
        _check_files(repository, manifest)
    with _copy(repository) as partial:
        manifest["limits"] = plan.limits(limits) if plan else limits
        manifest.pop(EXPORT_LIMITS, None)
        if plan:
            manifest[EXPORT_LIMITS] = limits
        manifest["backend"] = str(options.backend)
        build = _Build(partial, manifest, options, plan, progress, tell, tensorrt)
        for name, record in manifest["networks"].items():
            build.network(name, record)
        # Polygraphy leaves it, so that nobody locks a file that is no more.
        (partial / f"{TIMING_CACHE}.lock").unlink(missing_ok=True)
        repo.write_python_models(partial, manifest)
        (partial / repo.MANIFEST).unlink()
        repo.write_manifest(partial, manifest)
    rows: int = manifest["networks"][manifest["denoiser"]["network"]]["max_batch_size"]
    return rows


@dataclass(frozen=True)
class _Build:
    """A build that is under way."""

    repository: Path
    manifest: dict[str, Any]
    options: BuildOptions
    plan: Plan | None
    progress: Progress
    tell: Tell
    tensorrt: TensorRt | None
    """Of the backend of that name."""

    def network(self, name: str, record: dict[str, Any]) -> None:
        """Write a network's engine and config, and bring its record of the manifest up to date."""
        version = self.repository / name / "1"
        description = Description.from_config(read_config(version.parent))
        plan_file = version / MODEL_FILES[Backend.TENSORRT]
        plan_file.unlink(missing_ok=True)
        record["files"].pop(str(plan_file.relative_to(self.repository)), None)
        record.pop("tensorrt", None)
        profiles: list[NetworkProfile] = []
        if self.plan:
            inputs = read_inputs(name, version / ONNX)
            profiles = Networks(self.manifest_as_exported).profiles(name, inputs, self.plan)
        config = native_config(description, self._config_options(name, record, profiles))
        check_config(config, version / ONNX)
        path = version.parent / CONFIG
        path.unlink()
        path.write_text(config_text(config))
        record["backend"] = str(self.options.backend)
        record["max_batch_size"] = config.max_batch_size
        if self.plan and name in self._denoisers:
            # Batches that an engine takes at some sizes only are of no use.
            record["max_batch_size"] = min(config.max_batch_size, self.plan.max_rows)
        if self.tensorrt:
            record["tensorrt"] = self._engine(self.tensorrt, name, record, profiles)
            record["files"] |= repo.hash_files(self.repository, [plan_file])

    @property
    def manifest_as_exported(self) -> dict[str, Any]:
        return {**self.manifest, "limits": self.manifest[EXPORT_LIMITS]}

    @property
    def _denoisers(self) -> set[str]:
        network = self.manifest["denoiser"]["network"]
        variants = self.manifest["variants"].values()
        return {network, *(variant[network] for variant in variants if network in variant)}

    def _engine(
        self,
        tensorrt: TensorRt,
        name: str,
        record: dict[str, Any],
        profiles: list[NetworkProfile],
    ) -> dict[str, Any]:
        version = self.repository / name / "1"
        onnx, plan = version / ONNX, version / MODEL_FILES[Backend.TENSORRT]
        options = self._engine_options()
        with self.progress(f"building the engine of {name} for {tensorrt.gpu.name}"):
            tensorrt.build(
                onnx,
                plan,
                [profile.shapes for profile in profiles],
                options,
                lambda line: self.tell(f"{name}: {line}"),
            )
        with self.progress(f"comparing the engine of {name} with its graph"):
            verification = compare_profiles(
                name,
                graph_runner(onnx),
                tensorrt.runners(plan),
                profiles,
                inputs=Inputs(name, self.manifest_as_exported, self.repository),
                tolerance=self.options.engine.tolerance or record["verification"]["tolerance"],
            )
        return {
            "gpu": tensorrt.gpu.name,
            "compute_capability": tensorrt.gpu.compute_capability,
            "version": tensorrt.version,
            **options.record(),
            "gpus": list(self.options.gpus),
            "profiles": [
                {input_name: vars(shape) for input_name, shape in profile.shapes.items()}
                for profile in profiles
            ],
            "verification": verification,
        }

    def _engine_options(self) -> EngineOptions:
        """With what earlier builds measured, which stays with the repository if nowhere else."""
        options = self.options.engine
        if options.timing_cache is not None:
            return options
        return EngineOptions(**{**vars(options), "timing_cache": self.repository / TIMING_CACHE})

    def _config_options(
        self, name: str, record: Mapping[str, Any], profiles: list[NetworkProfile]
    ) -> Options:
        options = self.options
        shapes = [profile.shapes for profile in profiles]
        if options.backend is Backend.TENSORRT:
            with_graphs = options.with_cuda_graphs and name in self._denoisers
            return TensorRtOptions(shapes, options.gpus, GRAPH_BATCHES if with_graphs else ())
        if options.backend is Backend.ONNXRUNTIME:
            return OnnxRuntimeOptions(
                is_on_gpu=options.is_on_gpu,
                gpus=options.gpus,
                accelerator=options.accelerator,
                profile=shapes[0] if shapes else None,
                engine_cache=options.engine_cache,
                is_half=record["precision"] == Precision.FP16,
            )
        return PythonOptions()


def _accelerates_by_tensorrt(options: BuildOptions) -> bool:
    return (
        options.backend is Backend.ONNXRUNTIME
        and options.is_on_gpu
        and options.accelerator == "tensorrt"
    )


def _check(repository: Path, manifest: Mapping[str, Any], options: BuildOptions) -> None:
    if options.backend is Backend.TORCH:
        raise ExportError(
            "backend: torch is chosen by darkroom export --backend torch, which writes programs of "
            "PyTorch in place of ONNX"
        )
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ExportError(
            f"{repository}: its manifest has format {manifest.get('format')}, but {MANIFEST_FORMAT}"
            " is needed; export the checkpoint again"
        )
    for name, record in manifest["networks"].items():
        if record["backend"] == Backend.TORCH:
            raise ExportError(
                f"{repository}: {name} is a program of PyTorch, from which nothing else is built; "
                "export the checkpoint again, with --backend python"
            )
    if manifest["loras"] and options.backend is not Backend.PYTHON:
        raise ExportError(
            f"{repository}: takes the adapters {', '.join(sorted(manifest['loras']))}, whose "
            f"weights {options.backend} cannot be given; export with --lora, which makes variants, "
            "or with --backend torch"
        )


def _check_files(repository: Path, manifest: Mapping[str, Any]) -> None:
    """See that the graphs are those that were compared with PyTorch."""
    for name, record in manifest["networks"].items():
        for file, expected in record["files"].items():
            if not file.endswith(MODEL_FILES[Backend.TENSORRT]) and (
                file_sha256(repository / file) != expected
            ):
                raise ExportError(
                    f"{name}: {repository / file} is not the file that was verified; export the "
                    "checkpoint again"
                )


@contextmanager
def _copy(repository: Path) -> Iterator[Path]:
    """A folder like `repository` that takes its place in the end, without copies of large files."""
    try:
        with repo.atomic_directory(repository) as partial:
            shutil.copytree(
                repository, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True
            )
            yield partial
    except OSError as error:
        is_volume = error.errno in (errno.EBUSY, errno.EXDEV)
        hint = "; it has to be a folder within a volume, since another takes its place"
        raise ExportError(f"{repository}: {error}{hint if is_volume else ''}") from error


def _link(source: str, target: str) -> str:
    """Have a large file twice without its bytes, where the file system can."""
    if Path(source).stat().st_size < _SMALL_BYTES or source.endswith(TIMING_CACHE):
        # These are written to.
        return str(shutil.copy2(source, target))
    try:
        os.link(source, target)
    except OSError:
        return str(shutil.copy2(source, target))
    return target
