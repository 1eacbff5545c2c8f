"""The synchronous client."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self, Unpack, overload

from darkroom import answers, protocol
from darkroom.events import Done, Event
from darkroom.exceptions import DarkroomError, RequestCancelled, ServerError
from darkroom.latents import Latents
from darkroom.model_info import ModelInfo
from darkroom.options import Options
from darkroom.picture import Picture
from darkroom.transport import Call, open_transport

DEFAULT_TIMEOUT_S = 600.0
QUICK_TIMEOUT_S = 10.0
"""For what no picture has to be waited for."""


class Client:
    """A connection to one Darkroom server; a gRPC one may be shared by threads.

    Args:
        url: "host:port" or "grpc://host:port" for gRPC, "http://host:port" for HTTP.
        timeout: seconds to wait for an answer, where a call does not say otherwise.
        model: the Triton model to ask; its streams are those of MODEL_stream.
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
        self,
        prompt: str,
        *,
        request_id: str | None = ...,
        timeout: float | None = ...,
        **options: Unpack[Options],
    ) -> Picture: ...
    @overload
    def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int,
        request_id: str | None = ...,
        timeout: float | None = ...,
        **options: Unpack[Options],
    ) -> list[Picture]: ...
    def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Picture | list[Picture]:
        """Generate a picture, or a list of them if `num_images_per_prompt` is given.

        Args:
            num_images_per_prompt: picture k of the list uses seed + k.
            request_id: what `cancel` takes; a random one if left out.
            timeout: seconds to wait; leaving then, or by Ctrl-C, cancels the request on the server.
            options: see `darkroom.Options`; what is left out takes the checkpoint's default.

        Raises:
            DarkroomError: one of its subclasses, see `darkroom.exceptions`.
            TypeError: there is no such option.
        """
        request = protocol.generate_request(
            self._model, prompt, num_images_per_prompt, request_id, options
        )
        result = self._transport.infer(request, self._timeout if timeout is None else timeout)
        pictures = answers.parse(result)
        return pictures[0] if num_images_per_prompt is None else pictures

    @overload
    def generate_latents(
        self,
        prompt: str,
        *,
        request_id: str | None = ...,
        timeout: float | None = ...,
        **options: Unpack[Options],
    ) -> Latents: ...
    @overload
    def generate_latents(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int,
        request_id: str | None = ...,
        timeout: float | None = ...,
        **options: Unpack[Options],
    ) -> list[Latents]: ...
    def generate_latents(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Latents | list[Latents]:
        """As `generate`, without decoding: latents, from which another call goes on.

        So SDXL's refiner makes the last steps of what its base model began:

        >>> latents = base.generate_latents("a lion", denoising_end=0.8)         # doctest: +SKIP
        >>> refiner.generate("a lion", image=latents, denoising_start=0.8)       # doctest: +SKIP
        """
        request = protocol.latents_request(
            self._model, prompt, num_images_per_prompt, request_id, options
        )
        result = self._transport.infer(request, self._timeout if timeout is None else timeout)
        latents = answers.parse_latents(result)
        return latents[0] if num_images_per_prompt is None else latents

    def stream(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int | None = None,
        preview_interval: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> "EventStream":
        """Generate pictures, and tell what happens meanwhile.

        The request is sent at once, and cancelled on the server if the stream is left before its
        end. One client may have many streams at a time.

        >>> with client.stream("a red circle", preview_interval=5) as events:  # doctest: +SKIP
        ...     for event in events:
        ...         print(event)

        Args:
            num_images_per_prompt: picture k uses seed + k; one picture if left out.
            preview_interval: a preview every so many steps; 0, or left out, for none.
            request_id: what `cancel` takes; a random one if left out.
            timeout: seconds for the whole stream.
            options: see `darkroom.Options`; what is left out takes the checkpoint's default.

        Raises:
            DarkroomError: by this call or by the stream; one of its subclasses, see
                `darkroom.exceptions`.
            TypeError: there is no such option.
        """
        request = protocol.stream_request(
            protocol.generate_request(
                self._model, prompt, num_images_per_prompt, request_id, options
            ),
            preview_interval,
        )
        call = self._transport.stream(request, self._timeout if timeout is None else timeout)
        return EventStream(call, request.request_id)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request that waits or runs, whoever sent it.

        Returns:
            False if the server has no such request in flight.

        Raises:
            InvalidRequest: several requests in flight have this id; none is cancelled.
            DarkroomError: the server cannot be asked.
        """
        request = protocol.cancel_request(self._model, request_id)
        result = self._transport.infer(request, min(self._timeout, QUICK_TIMEOUT_S))
        return answers.parse_cancelled(result)

    @overload
    def info(self, model: None = ...) -> list[ModelInfo]: ...
    @overload
    def info(self, model: str) -> ModelInfo: ...
    def info(self, model: str | None = None) -> ModelInfo | list[ModelInfo]:
        """What the server tells of a model, or of all that it has.

        Args:
            model: as `Client` takes it.

        Raises:
            InvalidRequest: the server has no such model.
            DarkroomError: the server cannot be asked.
        """
        request = protocol.info_request(model)
        result = self._transport.infer(request, min(self._timeout, QUICK_TIMEOUT_S))
        return answers.parse_models(result) if model is None else answers.parse_model(result)

    def is_ready(self) -> bool:
        """Whether the server answers and has the model loaded."""
        return self._transport.is_ready(self._model, min(self._timeout, QUICK_TIMEOUT_S))

    def close(self) -> None:
        """Close the connection; streams that are not over are cancelled."""
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


class EventStream(Iterator[Event]):
    """The events of one request, as `Client.stream` returns them; `Done` is the last.

    One thread reads it. Leaving it before the end (`close`, the end of its `with`, or dropping the
    last reference to it) cancels the request.
    """

    request_id: str
    """What `Client.cancel` takes."""

    def __init__(self, call: Call, request_id: str) -> None:
        self._call = call
        self._is_over = False
        self.request_id = request_id

    def __next__(self) -> Event:
        """The next event, once there is one.

        Raises:
            DarkroomError: the request failed; RequestCancelled if another thread closed the stream.
        """
        if self._is_over:
            raise StopIteration
        try:
            event = self._read()
        except DarkroomError as error:
            was_closed = self._is_over
            self.close()
            if was_closed:
                raise RequestCancelled(answers.CLOSED) from error
            raise
        except BaseException:  # Ctrl-C, say
            self.close()
            raise
        if isinstance(event, Done):
            self.close()
        return event

    def _read(self) -> Event:
        for result in self._call:
            event = answers.parse_event(result)
            if isinstance(event, Done):
                # Left now, the call would still count as cancelled.
                self._call.drain()
            if event is not None:
                return event
        raise ServerError(answers.ENDED_EARLY)

    def close(self) -> None:
        """Cancel the request if it is not over. Any thread may; to close twice is harmless."""
        self._is_over = True
        self._call.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
