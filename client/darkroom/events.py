"""What a stream tells of its request: Queued while it waits, Step and Preview, and Done at the end.

>>> from darkroom import Client, Done, Step
>>> with Client() as client, client.stream("a red circle") as events:    # doctest: +SKIP
...     for event in events:
...         match event:
...             case Step(step=step, num_steps=num_steps):
...                 print(f"step {step} of {num_steps}")
...             case Done(pictures=[picture]):
...                 picture.save("circle.png")
"""

from dataclasses import dataclass

from PIL import Image

from darkroom.picture import Picture


@dataclass(frozen=True)
class Queued:
    """The request waits; told when it has arrived, and whenever its place has changed."""

    position: int
    """0 is the next to start."""


@dataclass(frozen=True)
class Step:
    """A picture has made a denoising step."""

    index: int
    """Which picture of the request, from 0."""
    step: int
    """From 1 to `num_steps`."""
    num_steps: int


@dataclass(frozen=True)
class Preview:
    """What a picture looks like after a step, small and rough."""

    index: int
    """Which picture of the request, from 0."""
    step: int
    """From 1 to `num_steps`."""
    num_steps: int
    image: Image.Image


@dataclass(frozen=True)
class Done:
    """The end of the stream."""

    pictures: list[Picture]
    """One, or as many as `num_images_per_prompt` asked for."""


Event = Queued | Step | Preview | Done
"""Any event; a `match` over the four is complete."""
