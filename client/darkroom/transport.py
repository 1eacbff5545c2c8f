"""The one place that knows how Triton is called over gRPC and over HTTP."""

import contextlib
import http.client
import importlib
import re
import socket
import time
import weakref
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import quote

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from darkroom import answers, protocol
from darkroom.exceptions import (
    DarkroomError,
    InvalidRequest,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    from_status,
)
from darkroom.protocol import Request

CHANNEL_OPTIONS = [  # pictures outgrow gRPC's own 4 MB
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
CHUNK_BYTES = 65_536
CANCEL_TIMEOUT_S = 1.0
"""For a cancel that nobody has asked for and nobody must wait for."""


class Call(Protocol):
    """The answers to one streamed request, as they come."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any:
        """The next result, whose `as_numpy` gives the outputs; raises DarkroomError."""

    def drain(self) -> None:
        """Wait until the server has ended the call, for nothing more is expected of it."""

    def close(self) -> None:
        """Cancel the call if it is not over; any thread may, whoever waits for the next result."""


class Transport(Protocol):
    """A connection."""

    def infer(self, request: Request, timeout: float) -> Any:
        """The one result, whose `as_numpy` gives the outputs; raises DarkroomError."""

    def stream(self, request: Request, timeout: float) -> Call:
        """Send the request; raises DarkroomError. The timeout is that of the whole stream."""

    def is_ready(self, model: str, timeout: float) -> bool: ...

    def close(self) -> None: ...


def open_transport(url: str) -> Transport:
    """Connect to "host:port", "grpc://host:port" or "http://host:port".

    Raises:
        InvalidRequest: the URL is none of these.
        DarkroomError: HTTP is asked for, but its extra is not installed.
    """
    scheme, address = split_url(url)
    return GrpcTransport(address) if scheme == "grpc" else HttpTransport(address)


def split_url(url: str) -> tuple[str, str]:
    """The scheme, "grpc" or "http", and the address behind it.

    Raises:
        InvalidRequest: the URL is none that a client takes.
    """
    match = _URL.fullmatch(url)
    if match is None or int(match["port"]) > 65535 or (match["path"] and match["scheme"] != "http"):
        raise InvalidRequest(f"url: {url!r} is not host:port, grpc://host:port or http://host:port")
    return match["scheme"] or "grpc", match["address"]


_URL = re.compile(
    r"((?P<scheme>grpc|http)://)?(?P<address>[^/\s]+:(?P<port>[0-9]{1,5})(?P<path>/\S*)?)"
)


def grpc_error(error: grpc.RpcError) -> DarkroomError:
    """The error for a failed call, of the synchronous or the asynchronous gRPC."""
    return from_status(error.code().name, error.details() or "")


class GrpcTransport:
    """gRPC: a call that the client leaves is cancelled on the server by gRPC itself."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(self, request: Request, timeout: float) -> Any:
        try:
            return InferResult(self._stub.ModelInfer(protocol.to_grpc(request), timeout=timeout))
        except grpc.RpcError as error:
            raise grpc_error(error) from error

    def stream(self, request: Request, timeout: float) -> Call:
        # A call of its own for each: tritonclient allows a client one stream at a time. Asked to
        # end it with a status (triton_grpc_error), Triton 2.51 crashes: errors come as texts.
        return GrpcCall(
            self._stub.ModelStreamInfer(iter([protocol.to_grpc(request)]), timeout=timeout)
        )

    def is_ready(self, model: str, timeout: float) -> bool:
        try:
            asked = service_pb2.ModelReadyRequest(name=model)
            return bool(self._stub.ModelReady(asked, timeout=timeout).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        self._channel.close()


class GrpcCall:
    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            response = next(self._call)
        except grpc.RpcError as error:
            raise grpc_error(error) from error
        try:
            return answers.from_grpc(response)
        except DarkroomError:
            # It is the server's last word. A call that is left before the server has ended it costs
            # Triton 2.51 memory that it never gets back.
            self.drain()
            raise

    def drain(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass

    def close(self) -> None:
        self._call.cancel()


class HttpTransport:
    """Plain HTTP: Triton tells no model that the client has left, unless it was a stream."""

    def __init__(self, address: str) -> None:
        try:
            self._triton = importlib.import_module("tritonclient.http")
        # tritonclient makes a RuntimeError of a missing package.
        except (ModuleNotFoundError, RuntimeError) as error:
            raise DarkroomError("HTTP needs an extra: pip install 'darkroom[http]'") from error
        self._address = address
        self._calls: weakref.WeakSet[HttpCall] = weakref.WeakSet()

    def infer(self, request: Request, timeout: float) -> Any:
        client = self._open(timeout)
        inputs = []
        for name, array in request.inputs.items():
            tensor = self._triton.InferInput(
                name, list(array.shape), np_to_triton_dtype(array.dtype)
            )
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        outputs = [self._triton.InferRequestedOutput(name) for name in request.outputs]
        try:
            with _http_errors(self._address, timeout):
                return client.infer(
                    request.model, inputs, outputs=outputs, request_id=request.request_id
                )
        except InferenceServerException as error:
            raise from_status(error.status(), error.message()) from error
        except RequestTimeout:
            self._cancel(request)
            raise
        except DarkroomError:
            raise
        except ValueError as error:
            raise ServerError(f"the server's answer cannot be read: {error!r}") from error
        except BaseException:  # Ctrl-C, say
            self._cancel(request)
            raise
        finally:
            client.close()

    def stream(self, request: Request, timeout: float) -> Call:
        call = HttpCall(self._address, request, timeout)
        self._calls.add(call)
        return call

    def is_ready(self, model: str, timeout: float) -> bool:
        client = self._open(timeout)
        try:
            return bool(client.is_model_ready(model))
        except (OSError, HTTPException, InferenceServerException):
            return False
        finally:
            client.close()

    def close(self) -> None:
        for call in list(self._calls):
            call.close()

    def _open(self, timeout: float) -> Any:
        # tritonclient sets the timeouts of a connection, not of a call.
        return self._triton.InferenceServerClient(
            self._address, connection_timeout=timeout, network_timeout=timeout
        )

    def _cancel(self, request: Request) -> None:
        """Tell the server that nobody waits for the answer; whether that works is all the same."""
        if request.request_id:
            cancel = protocol.cancel_request(request.model, request.request_id)
            with contextlib.suppress(Exception):
                self.infer(cancel, CANCEL_TIMEOUT_S)


class HttpCall:
    """Server-sent events, on a connection of their own, whose end cancels the request."""

    def __init__(self, address: str, request: Request, timeout: float) -> None:
        body = protocol.to_json(request)
        self._address = address
        self._timeout = timeout
        self._give_up_at = time.monotonic() + timeout
        self._response: http.client.HTTPResponse | None = None
        self._events = answers.server_sent_events(self._chunks())
        self._is_closed = False
        host, _, base = address.partition("/")
        prefix = f"/{base.rstrip('/')}" if base else ""
        self._connection = http.client.HTTPConnection(host, timeout=timeout)
        try:
            with _http_errors(address, timeout):
                self._connection.request(
                    "POST",
                    f"{prefix}/v2/models/{quote(request.model)}/generate_stream",
                    body,
                    {"Content-Type": "application/json"},
                )
                # The connection lets go of it, should the server not want to keep it open.
                self._socket: socket.socket = self._connection.sock
        except BaseException:
            self._connection.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        text = self._next_event()
        if text is None:
            raise StopIteration
        return answers.from_json(text)

    def drain(self) -> None:
        with contextlib.suppress(DarkroomError):
            while self._next_event() is not None:
                pass

    def close(self) -> None:
        self._is_closed = True
        # Wakes whoever reads, which closing alone does not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        if self._response is not None:
            self._response.close()

    def _next_event(self) -> bytes | None:
        """The data of the next event; None at the end."""
        try:
            with _http_errors(self._address, self._timeout):
                text = next(self._events, None)
        except Exception as error:
            # Whatever http.client ran into when its socket was closed.
            if self._is_closed:
                raise RequestCancelled(answers.CLOSED) from error
            raise
        if text is None and self._is_closed:
            raise RequestCancelled(answers.CLOSED)
        return text

    def _chunks(self) -> Iterator[bytes]:
        """The body of the answer, as it comes."""
        self._limit_wait()
        self._response = response = self._connection.getresponse()
        # Triton answers 400 where a model's first word is an error of whatever kind, and then tells
        # it as an event.
        if (
            response.status != http.HTTPStatus.OK
            and response.headers.get_content_type() != "text/event-stream"
        ):
            raise answers.http_error(response.status, response.read())
        self._limit_wait()
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk
            self._limit_wait()

    def _limit_wait(self) -> None:
        remaining = self._give_up_at - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)


@contextlib.contextmanager
def _http_errors(address: str, timeout: float) -> Iterator[None]:
    """Make errors of ours of what sockets and http.client raise."""
    try:
        yield
    except DarkroomError:  # some are OSErrors, too
        raise
    except TimeoutError as error:
        raise RequestTimeout(f"no answer within {timeout:g} s") from error
    except OSError as error:
        raise ServerUnavailable(f"{address}: {error}") from error
    except HTTPException as error:
        raise ServerUnavailable(f"{address}: no HTTP answer, {error}") from error
