"""The part of the module `tensorrt` that builds engines, for Polygraphy's own code to call.

An "engine" is a JSON text of what it was built with. A graph whose file says so cannot be parsed or
built.
"""

import json
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

__version__ = "10.5.0"
__spec__ = ModuleSpec("tensorrt", None)

UNPARSABLE, UNBUILDABLE = "unparsable", "unbuildable"


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    FP16 = 0
    TF32 = 1
    VERSION_COMPATIBLE = 2
    WEIGHT_STREAMING = 3


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class DeviceType(IntEnum):
    GPU = 0
    DLA = 1


class ILogger:
    pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProgressMonitor:
    def __init__(self) -> None:
        self.is_initialized = True


class _Input:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.dtype, self.is_shape_tensor = "FLOAT", False


class _Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.inputs: list[_Input] = []
        self.path = ""

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> _Input:
        return self.inputs[index]

    def get_flag(self, flag: int) -> bool:
        return bool(self.flags & 1 << flag)

    def __iter__(self) -> Any:
        return iter(())


class OnnxParser:
    def __init__(self, network: _Network, _logger: ILogger) -> None:
        self._network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        import onnx

        self._network.path = path
        if UNPARSABLE in path:
            self.num_errors = 1
            return False
        for tensor in onnx.load(path, load_external_data=False).graph.input:
            sizes = (
                -1 if size.dim_param else size.dim_value
                for size in tensor.type.tensor_type.shape.dim
            )
            self._network.inputs.append(_Input(tensor.name, tuple(sizes)))
        return True

    def get_error(self, _index: int) -> str:
        return "an operator is not known"


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, other: "_TimingCache", ignore_mismatch: bool) -> bool:
        assert ignore_mismatch
        self.content += other.content
        return True

    def serialize(self) -> Any:
        return memoryview(self.content + b"measured;")


class _Config:
    DLA_core = -1
    default_device_type = DeviceType.GPU
    builder_optimization_level: int | None = None
    progress_monitor: IProgressMonitor | None = None

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[_Profile] = []
        self.pools: dict[int, int] = {}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self.flags

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        self.pools[pool] = size

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.cache = cache

    def get_timing_cache(self) -> _TimingCache:
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)

    def create_network(self, flags: int) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        if UNBUILDABLE in network.path:
            return None
        monitor = config.progress_monitor
        if monitor is not None:
            assert monitor.is_initialized
            monitor.phase_start("Building Engine", None, 20)
            for step in range(20):
                assert monitor.step_complete("Building Engine", step)
            monitor.phase_finish("Building Engine")
        engine = {
            "strongly_typed": network.get_flag(NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            "flags": sorted(flag.name for flag in config.flags),
            "profiles": [profile.shapes for profile in config.profiles],
            "optimization_level": config.builder_optimization_level,
            "pools": {MemoryPoolType(pool).name: size for pool, size in config.pools.items()},
            "measured_before": config.cache.content.decode(),
        }
        return json.dumps(engine).encode()


class Runtime:
    def __init__(self, _logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, content: bytes) -> None:
        """None: there is no GPU."""
        assert content


def init_libnvinfer_plugins(_logger: ILogger, _namespace: str) -> bool:
    return True


def read_engine(path: Path) -> dict[str, Any]:
    engine: dict[str, Any] = json.loads(path.read_bytes())
    return engine
