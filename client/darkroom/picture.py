"""The picture a request returns."""

from io import BytesIO
from typing import Any

from PIL import Image


class Picture(Image.Image):
    """A `PIL.Image.Image` that knows how it came about."""

    seed: int
    """Generating with this seed makes this picture again."""
    timings: dict[str, float]
    """Milliseconds by phase: queue_ms, denoise_ms, decode_ms, total_ms."""
    queue_steps: int
    """Steps of other requests that began between the arrival of this one and its first."""
    model: str
    notes: list[str]
    """What the server wants known, for instance that the prompt was truncated."""
    nsfw_content_detected: bool | None
    """What the server's safety checker found; None if it has none, or one that is off."""
    encoded: bytes
    """The file as the server sent it, with its provenance."""

    @classmethod
    def from_bytes(cls, encoded: bytes, seed: int, info: dict[str, Any]) -> "Picture":
        """Decode a PNG, JPEG or WebP file as the server sent it."""
        with Image.open(BytesIO(encoded)) as opened:
            opened.load()
        picture = cls()
        # What PIL's own methods do to make a new image of existing pixels.
        picture.im = opened.im
        picture._mode = opened.mode
        picture._size = opened.size
        picture.info = dict(opened.info)
        picture.seed = seed
        picture.timings = info["timings"]
        picture.queue_steps = info["queue_steps"]
        picture.model = info["model"]
        picture.notes = info["notes"]
        picture.nsfw_content_detected = info.get("nsfw_content_detected")
        picture.encoded = encoded
        return picture

    # PIL's own would drop what a picture knows beside its pixels.
    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), {name: getattr(self, name) for name in _FACTS}]

    def __setstate__(self, state: list[Any]) -> None:
        *pixels, facts = state
        super().__setstate__(pixels)
        for name in _FACTS:
            setattr(self, name, facts[name])


_FACTS = (
    *("seed", "timings", "queue_steps", "model", "notes"),
    *("nsfw_content_detected", "encoded"),
)
