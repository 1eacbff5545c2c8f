"""The synchronous client."""

from types import TracebackType
from typing import Self, Unpack, overload

from tritonclient.utils import InferenceServerException

from darkroom import protocol
from darkroom.exceptions import from_status
from darkroom.picture import Picture
from darkroom.protocol import Options
from darkroom.transport import open_transport

DEFAULT_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 10.0


class Client:
    """A connection to one Darkroom server; a gRPC one may be shared by threads.

    Args:
        url: "host:port" or "grpc://host:port" for gRPC, "http://host:port" for HTTP.
        timeout: seconds to wait for an answer, where a call does not say otherwise.
        model: the Triton model to ask.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        model: str = protocol.MODEL,
    ) -> None:
        self._transport = open_transport(url)
        self._timeout = timeout
        self._model = model

    @overload
    def generate(
        self, prompt: str, *, timeout: float | None = ..., **options: Unpack[Options]
    ) -> Picture: ...
    @overload
    def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int,
        timeout: float | None = ...,
        **options: Unpack[Options],
    ) -> list[Picture]: ...
    def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Picture | list[Picture]:
        """Generate a picture, or a list of them if `num_images_per_prompt` is given.

        Args:
            num_images_per_prompt: picture k of the list uses seed + k.
            timeout: seconds to wait; leaving then cancels the request on the server (gRPC).
            options: see `darkroom.Options`; what is left out takes the checkpoint's default.

        Raises:
            DarkroomError: one of its subclasses, see `darkroom.exceptions`.
            TypeError: there is no such option.
        """
        fields = protocol.fields(prompt, num_images_per_prompt, options)
        triton = self._transport.triton
        inputs = protocol.build_inputs(triton, fields)
        outputs = protocol.build_outputs(triton)
        try:
            result = self._transport.infer(
                self._model, inputs, outputs, self._timeout if timeout is None else timeout
            )
        except InferenceServerException as error:
            raise from_status(error.status(), error.message()) from error
        pictures = protocol.parse(result)
        return pictures[0] if num_images_per_prompt is None else pictures

    def is_ready(self) -> bool:
        """Whether the server answers and has the model loaded."""
        return self._transport.is_ready(self._model, min(self._timeout, READY_TIMEOUT_S))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
