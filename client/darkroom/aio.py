"""The asynchronous client, over gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, Unpack, overload

import grpc
import grpc.aio
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from darkroom import answers, protocol
from darkroom.client import DEFAULT_TIMEOUT_S, QUICK_TIMEOUT_S
from darkroom.events import Done, Event
from darkroom.exceptions import (
    DarkroomError,
    InvalidRequest,
    RequestCancelled,
    ServerError,
)
from darkroom.latents import Latents
from darkroom.model_info import ModelInfo
from darkroom.options import Options
from darkroom.picture import Picture
from darkroom.protocol import Request
from darkroom.transport import CHANNEL_OPTIONS, grpc_error, split_url


class AsyncClient:
    """`Client` for asyncio; cancelling the awaiting task cancels the request on the server."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        model: str = protocol.MODEL,
    ) -> None:
        scheme, address = split_url(url)
        if scheme != "grpc":
            raise InvalidRequest(f"url: {url!r} is not host:port or grpc://host:port")
        self._channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._timeout = timeout
        self._model = model

    async def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        request_id: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  gRPC's own deadline, which the server sees
        **options: Unpack[Options],
    ) -> list[Picture]:
        """Generate a list of `num_images_per_prompt` pictures; otherwise as `Client.generate`."""
        request = protocol.generate_request(
            self._model, prompt, num_images_per_prompt, request_id, options
        )
        return answers.parse(await self._infer(request, self._timeout_s(timeout)))

    async def generate_latents(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        request_id: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  gRPC's own deadline, which the server sees
        **options: Unpack[Options],
    ) -> list[Latents]:
        """A list of `num_images_per_prompt` latents; otherwise as `Client.generate_latents`."""
        request = protocol.latents_request(
            self._model, prompt, num_images_per_prompt, request_id, options
        )
        return answers.parse_latents(await self._infer(request, self._timeout_s(timeout)))

    def stream(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int | None = None,
        preview_interval: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> "AsyncEventStream":
        """`Client.stream` for `async for` and `async with`.

        >>> async with client.stream("a red circle") as events:      # doctest: +SKIP
        ...     async for event in events:
        ...         print(event)
        """
        request = protocol.stream_request(
            protocol.generate_request(
                self._model, prompt, num_images_per_prompt, request_id, options
            ),
            preview_interval,
        )
        call = self._stub.ModelStreamInfer(
            [protocol.to_grpc(request)], timeout=self._timeout_s(timeout)
        )
        return AsyncEventStream(call, request.request_id)

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request that waits or runs, whoever sent it, as `Client.cancel`."""
        request = protocol.cancel_request(self._model, request_id)
        return answers.parse_cancelled(await self._infer(request, self._quick_timeout_s()))

    @overload
    async def info(self, model: None = ...) -> list[ModelInfo]: ...
    @overload
    async def info(self, model: str) -> ModelInfo: ...
    async def info(self, model: str | None = None) -> ModelInfo | list[ModelInfo]:
        """What the server tells of a model, or of all that it has, as `Client.info`."""
        request = protocol.info_request(model)
        result = await self._infer(request, self._quick_timeout_s())
        return answers.parse_models(result) if model is None else answers.parse_model(result)

    async def is_ready(self) -> bool:
        """Whether the server answers and has the model loaded."""
        asked = service_pb2.ModelReadyRequest(name=self._model)
        try:
            answer = await self._stub.ModelReady(asked, timeout=self._quick_timeout_s())
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def close(self) -> None:
        """Close the connection; streams that are not over are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _infer(self, request: Request, timeout_s: float) -> InferResult:
        message = protocol.to_grpc(request)
        with _rpc_errors():
            return InferResult(await self._stub.ModelInfer(message, timeout=timeout_s))

    def _timeout_s(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout

    def _quick_timeout_s(self) -> float:
        return min(self._timeout, QUICK_TIMEOUT_S)


class AsyncEventStream(AsyncIterator[Event]):
    """The events of one request, as `AsyncClient.stream` returns them; `Done` is the last.

    Leaving it before the end (`aclose`, the end of its `async with`, a cancelled task, or dropping
    the last reference to it) cancels the request.
    """

    request_id: str
    """What `AsyncClient.cancel` takes."""

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call
        self._responses = aiter(call)
        self._is_over = False
        self.request_id = request_id

    async def __anext__(self) -> Event:
        """The next event, once there is one.

        Raises:
            DarkroomError: the request failed; RequestCancelled if another task closed the stream.
        """
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await self._read()
        except BaseException:
            self._close()
            raise
        if isinstance(event, Done):
            self._close()
        return event

    async def _read(self) -> Event:
        with _rpc_errors():
            async for response in self._responses:
                event = answers.parse_event(await self._result(response))
                if isinstance(event, Done):
                    await self._drain()
                if event is not None:
                    return event
        raise ServerError(answers.ENDED_EARLY)

    async def _result(self, response: Any) -> InferResult:
        try:
            return answers.from_grpc(response)
        except DarkroomError:
            # As of the synchronous call, see `GrpcCall`.
            await self._drain()
            raise

    async def _drain(self) -> None:
        """Let the server end the call: left now, it would still count as cancelled."""
        with contextlib.suppress(grpc.RpcError):
            async for _ in self._responses:
                pass

    def _close(self) -> None:
        self._is_over = True
        self._call.cancel()

    async def aclose(self) -> None:
        """Cancel the request if it is not over. To close twice is harmless."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._close()


@contextlib.contextmanager
def _rpc_errors() -> Iterator[None]:
    """Make errors of ours of gRPC's."""
    try:
        yield
    except grpc.RpcError as error:
        raise grpc_error(error) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # gRPC says so too when the call was cancelled and this task was not.
        raise RequestCancelled(answers.CLOSED) from error
