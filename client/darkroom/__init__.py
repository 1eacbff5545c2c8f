"""Client of a Darkroom server: prompts in, pictures out.

>>> from darkroom import Client
>>> with Client("localhost:8001") as client:                    # doctest: +SKIP
...     client.generate("a large red circle", seed=1).save("circle.png")
"""

from darkroom.aio import AsyncClient
from darkroom.client import Client
from darkroom.exceptions import (
    DarkroomError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from darkroom.picture import Picture
from darkroom.protocol import Options

__all__ = [
    "AsyncClient",
    "Client",
    "DarkroomError",
    "InvalidRequest",
    "Options",
    "Picture",
    "QueueFull",
    "RequestCancelled",
    "RequestTimeout",
    "ServerError",
    "ServerUnavailable",
    "__version__",
]

__version__ = "0.1.0"
