"""Client of a Darkroom server: prompts in, pictures out.

>>> from darkroom import Client
>>> with Client("localhost:8001") as client:                    # doctest: +SKIP
...     client.generate("a large red circle", seed=1).save("circle.png")
...     for event in client.stream("a large red circle", seed=1):
...         print(event)
"""

from darkroom.aio import AsyncClient, AsyncEventStream
from darkroom.client import Client, EventStream
from darkroom.events import Done, Event, Preview, Queued, Step
from darkroom.exceptions import (
    DarkroomError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from darkroom.latents import Latents
from darkroom.model_info import ModelInfo
from darkroom.options import Options
from darkroom.picture import Picture
from darkroom.uploads import PictureSource

__all__ = [
    "AsyncClient",
    "AsyncEventStream",
    "Client",
    "DarkroomError",
    "Done",
    "Event",
    "EventStream",
    "InvalidRequest",
    "Latents",
    "ModelInfo",
    "Options",
    "Picture",
    "PictureSource",
    "Preview",
    "QueueFull",
    "Queued",
    "RequestCancelled",
    "RequestTimeout",
    "ServerError",
    "ServerUnavailable",
    "Step",
    "__version__",
]

__version__ = "0.1.0"
