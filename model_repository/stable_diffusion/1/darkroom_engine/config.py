"""The engine's settings, read once at start from the `parameters` of its config.pbtxt."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from darkroom_engine.profiles import MemoryProfile
from darkroom_engine.safety import SafetyMode
from darkroom_settings import TorchSettings, read

TORCH = "torch"
"""The backend of networks that can run in the engine's process."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. A bad value stops the start with the key, the value and the range."""

    max_rows: int | None = 16
    """Rows of one UNet call at the checkpoint's default size, and in proportion fewer of larger
    ones; a picture takes one row, or two with classifier-free guidance. `auto`, which is None
    here, takes as many as fit into memory, found out at the start."""
    max_queue_size: int = 256
    """Pictures that may wait; one more is refused at once."""
    max_decode_rows: int = 1
    """Pictures decoded by one call of the VAE decoder."""
    overlap_decode: int = 1
    """1 decodes beside the steps of other pictures; 0 between them, which takes less memory."""
    warmup_rows: int = 2
    """The networks are warmed up with every batch size from 1 to this before the first request."""
    prompt_cache_bytes: int = 64 * 2**20
    """Memory for prompt embeddings kept between requests; 0 keeps none."""
    seconds_per_priority: int = 10
    """A level of `priority` counts as having arrived so much earlier."""
    vae_tile_size: int = 1536
    """Pictures with a longer side, in pixels, are encoded and decoded in tiles of this size; 0
    takes all in one piece."""
    vae_tile_overlap: int = 128
    """Over how many pixels neighbouring tiles are faded into each other."""
    heal_timeout_s: int = 60
    """How long requests wait for a network whose process died to be there again."""
    safety_checker: str = "off"
    """What the checkpoint's safety checker is for: `flag` tells of its findings, `blank` makes
    those pictures black besides."""
    memory_profile: str = "full"
    """`full` keeps all networks loaded, `balanced` the denoiser and the VAE decoder, and `low`
    loads one after the other."""
    in_process: int = 1
    """1 runs networks that are PyTorch's in the engine's process; 0 as Triton's models, like all
    others."""
    num_engines: int = 1
    """Running batches, each with networks of its own, of which each has its GPU."""
    device: str = "auto"
    """Of networks in the engine's process, as are the next three: see `TorchSettings`."""
    compile: int = 0
    cuda_graphs: int = 1
    row_buckets: tuple[int, ...] = TorchSettings.row_buckets

    def __post_init__(self) -> None:
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{key}: {value} is outside {low} to {high}")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"{key}: {getattr(self, key)!r} does not exist, there are {', '.join(choices)}"
                )
        if self.num_engines > 1 and self.memory_profile != MemoryProfile.FULL:
            raise ValueError(
                f"num_engines: {self.num_engines} engines share what is loaded, which they cannot "
                f"with memory_profile {self.memory_profile!r}, but with {MemoryProfile.FULL}"
            )
        if self.vae_tile_size and 2 * self.vae_tile_overlap > self.vae_tile_size:
            raise ValueError(
                f"vae_tile_overlap: {self.vae_tile_overlap} is above half of vae_tile_size, which "
                f"is {self.vae_tile_size}"
            )
        if self.max_rows is not None and self.warmup_rows > self.max_rows:
            raise ValueError(
                f"warmup_rows: {self.warmup_rows} is above max_rows, which is {self.max_rows}"
            )
        # Which checks them.
        _ = self.torch

    @property
    def torch(self) -> TorchSettings:
        """How networks in the engine's process are run."""
        return TorchSettings(**{name: getattr(self, name) for name in _TORCH})

    def is_in_process(self, backends: Iterable[str]) -> bool:
        """Whether networks of these backends are to run in the engine's process.

        Raises:
            ValueError: a setting is for networks that run elsewhere.
        """
        if self.in_process and set(backends) == {TORCH}:
            if self.memory_profile != MemoryProfile.FULL:
                raise ValueError(
                    f"memory_profile: {self.memory_profile!r} is for networks that are Triton's "
                    f"models; with in_process 1 there is {MemoryProfile.FULL}"
                )
            return True
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _TORCH and value != field.default:
                raise ValueError(
                    f"{field.name}: {value} is for networks in the engine's process; these are "
                    "Triton's models, and have the setting in their own config.pbtxt"
                )
        return False

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Mapping[str, str]]) -> "EngineConfig":
        """Read Triton's `parameters { key: "max_rows" value { string_value: "16" } }`.

        Raises:
            ValueError: a key that does not exist, or a value that is no whole number in range.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, entry in parameters.items():
            if key not in known:
                raise ValueError(f"{key}: no such engine parameter; there are {sorted(known)}")
            text = entry["string_value"]
            if key in _CHOICES:
                values[key] = text
                continue
            if key in _TORCH:
                values[key] = read(key, text)
                continue
            try:
                values[key] = None if (key, text) == ("max_rows", "auto") else int(text)
            except ValueError:
                raise ValueError(f"{key}: {text!r} is not a whole number") from None
        return cls(**values)


_RANGES = {
    # Two rows is one guided picture: with fewer, such a request could never run.
    "max_rows": (2, 1024),
    "max_queue_size": (1, 1_000_000),
    "max_decode_rows": (1, 1024),
    "overlap_decode": (0, 1),
    "vae_tile_size": (0, 65_536),
    "vae_tile_overlap": (0, 32_768),
    "warmup_rows": (0, 1024),
    "prompt_cache_bytes": (0, 2**40),
    "seconds_per_priority": (0, 86_400),
    "heal_timeout_s": (0, 3600),
    "in_process": (0, 1),
    "num_engines": (1, 64),
}
_TORCH = tuple(field.name for field in fields(TorchSettings))
_CHOICES = {"safety_checker": tuple(SafetyMode), "memory_profile": tuple(MemoryProfile)}
