"""TensorRT engines out of ONNX graphs, by Polygraphy.

Networks are strongly typed: every operation computes in the types of the graph, so that what the
export keeps in float32 stays there, and no other precision is chosen.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polygraphy import util
from polygraphy.backend import trt
from polygraphy.backend.base import BaseRunner
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from darkroom.engine_fit import Gpu, Machine
from darkroom_export.errors import ExportError, first_line
from darkroom_export.profiles import ShapeRange

Tell = Callable[[str], None]
"""What shows one line of progress."""
MAX_OPTIMIZATION_LEVEL = 5


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built; None and False leave it to TensorRT."""

    version_compatible: bool = False
    """Newer TensorRTs of the same major version can run it, if perhaps not as fast."""
    weight_streaming: bool = False
    """Weights may stay in the host's memory, if what runs the engine asks for that."""
    optimization_level: int | None = None
    """0 to 5: how long TensorRT looks for faster kernels."""
    workspace_bytes: int | None = None
    """Memory that a kernel may take beside its inputs and outputs; None is all of the GPU's."""
    timing_cache: Path | None = None
    """The file with what earlier builds measured, which this one adds to."""
    tolerance: float | None = None
    """How far an engine may be from its graph, of an output's range; None is the export's own."""

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
            raise ExportError(
                f"optimization-level: {level} is not between 0 and {MAX_OPTIMIZATION_LEVEL}"
            )
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ExportError(f"tolerance: {self.tolerance:g} is not between 0 and 1")

    def record(self) -> dict[str, Any]:
        """What of it a manifest keeps."""
        # The tolerance stands with what was measured.
        left_out = ("timing_cache", "tolerance")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class TensorRt:
    """The TensorRT of this machine, which builds engines and runs them to see what they give."""

    gpu: Gpu
    """What engines are built for."""
    version: str
    """Such as 10.5.0."""

    @classmethod
    def here(cls) -> "TensorRt":
        """Find it.

        Raises:
            ExportError: it is not installed, or there is no GPU, or there are several models of it.
        """
        if importlib.util.find_spec("tensorrt") is None:
            raise ExportError(
                "TensorRT is not installed for this Python: run darkroom build inside the "
                "container that will serve, see docs/tensorrt.md"
            )
        try:
            import tensorrt  # noqa: PLC0415  only containers have it
        except ImportError as error:
            # Its libraries are no part of its Python package, and may be of another version.
            raise ExportError(f"TensorRT is installed, but cannot be loaded: {error}") from error
        return cls(one_gpu(Machine.here()), tensorrt.__version__)

    def build(
        self,
        onnx: Path,
        plan: Path,
        profiles: Sequence[Mapping[str, ShapeRange]],
        options: EngineOptions,
        tell: Tell,
    ) -> None:
        """Build the engine of a graph, and write it to `plan`.

        Raises:
            ExportError: TensorRT cannot parse the graph, or cannot build the engine.
        """
        # By path, since weights may lie beside the graph.
        network = trt.NetworkFromOnnxPath(str(onnx), strongly_typed=True)
        cache = str(options.timing_cache) if options.timing_cache else None
        try:
            # It logs why before it gives up.
            with G_LOGGER.verbosity(G_LOGGER.ERROR):
                config = build_config(profiles, options, tell)
                engine = trt.engine_bytes_from_network(network, config, save_timing_cache=cache)
                util.save_file(engine, str(plan))
        except PolygraphyException as error:
            raise ExportError(f"{onnx}: no TensorRT engine, {first_line(error)}") from error

    def runners(self, plan: Path) -> Callable[[int], BaseRunner]:
        """What runs an engine in its profiles, by their numbers.

        Raises:
            ExportError: TensorRT cannot load the engine.
        """
        try:
            with G_LOGGER.verbosity(G_LOGGER.ERROR):
                engine = trt.engine_from_bytes(plan.read_bytes())
        except PolygraphyException as error:
            raise ExportError(f"{plan}: cannot be loaded, {first_line(error)}") from error
        return lambda profile: trt.TrtRunner(engine, name="TensorRT", optimization_profile=profile)


def one_gpu(machine: Machine) -> Gpu:
    """The model of GPU that engines are built for.

    Raises:
        ExportError: there is none, or there are several.
    """
    models = list(dict.fromkeys(machine.gpus))
    if not models:
        raise ExportError(
            "no GPU is here (nvidia-smi lists none): run darkroom build on the machine that will "
            "serve, in its container, with its GPUs"
        )
    if len(models) > 1:
        raise ExportError(
            f"there are several models of GPU, {', '.join(map(str, models))}: choose those of one "
            "by CUDA_VISIBLE_DEVICES, with the UUIDs that nvidia-smi -L lists"
        )
    return models[0]


def build_config(
    profiles: Sequence[Mapping[str, ShapeRange]], options: EngineOptions, tell: Tell
) -> trt.CreateConfig:
    """What Polygraphy makes TensorRT's configuration of, once it has a builder."""
    cache = options.timing_cache
    return trt.CreateConfig(
        profiles=[polygraphy_profile(profile) for profile in profiles],
        # It warns of one that is not there yet.
        load_timing_cache=str(cache) if cache and cache.exists() else None,
        version_compatible=options.version_compatible,
        weight_streaming=options.weight_streaming,
        builder_optimization_level=options.optimization_level,
        memory_pool_limits=_pools(options),
        progress_monitor=_monitor(tell),
    )


def polygraphy_profile(shapes: Mapping[str, ShapeRange]) -> trt.Profile:
    profile = trt.Profile()
    for name, shape in shapes.items():
        profile.add(name, min=shape.min, opt=shape.opt, max=shape.max)
    return profile


class PhaseProgress:
    """TensorRT's phases as lines, one for every tenth of those that take long.

    Its methods are those of TensorRT's IProgressMonitor, which calls them from several threads.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._depths: dict[str, int] = {}
        self._num_steps: dict[str, int] = {}
        """Of the phases that are told of."""

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        depth = self._depths.get(parent_phase, 0) + 1 if parent_phase else 0
        self._depths[phase_name] = depth
        # Those further in are short, and there are thousands of them.
        if depth <= 1 and num_steps >= 10:
            self._num_steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Return whether the build is to go on."""
        num_steps = self._num_steps.get(phase_name)
        if num_steps and 10 * (step + 1) // num_steps > 10 * step // num_steps:
            self._tell(f"{phase_name}: {100 * (step + 1) // num_steps}%")
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._depths.pop(phase_name, None)
        self._num_steps.pop(phase_name, None)


def _monitor(tell: Tell) -> Any:
    import tensorrt  # noqa: PLC0415  only containers have it

    class Monitor(PhaseProgress, tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            PhaseProgress.__init__(self, tell)

    return Monitor()


def _pools(options: EngineOptions) -> dict[Any, int] | None:
    if options.workspace_bytes is None:
        return None
    import tensorrt  # noqa: PLC0415  only containers have it

    return {tensorrt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
