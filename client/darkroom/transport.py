"""The one place that knows how tritonclient is called over gRPC and over HTTP."""

import importlib
from types import ModuleType
from typing import Any, Protocol

from tritonclient.utils import InferenceServerException

from darkroom.exceptions import DarkroomError, InvalidRequest, ServerUnavailable


class Transport(Protocol):
    """A connection, and the tritonclient module whose tensors it takes."""

    triton: ModuleType

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        """Raises InferenceServerException, or DarkroomError where the cause is plain."""

    def is_ready(self, model: str) -> bool: ...

    def close(self) -> None: ...


def open_transport(url: str) -> Transport:
    """Connect to "host:port", "grpc://host:port" or "http://host:port".

    Raises:
        InvalidRequest: the URL is none of these.
        DarkroomError: HTTP is asked for, but its extra is not installed.
    """
    scheme, separator, address = url.rpartition("://")
    if not separator:
        scheme = "grpc"
    if scheme not in ("grpc", "http") or ":" not in address:
        raise InvalidRequest(f"url: {url!r} is not host:port, grpc://host:port or http://host:port")
    return GrpcTransport(address) if scheme == "grpc" else HttpTransport(address)


class GrpcTransport:
    def __init__(self, address: str) -> None:
        self.triton = importlib.import_module("tritonclient.grpc")
        self._client = self.triton.InferenceServerClient(address)

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        return self._client.infer(model, inputs, outputs=outputs, client_timeout=timeout)

    def is_ready(self, model: str) -> bool:
        try:
            return bool(self._client.is_model_ready(model))
        except InferenceServerException:
            return False

    def close(self) -> None:
        self._client.close()


class HttpTransport:
    """Plain HTTP: Triton does not notice when the client leaves, and work runs to its end."""

    def __init__(self, address: str) -> None:
        try:
            self.triton = importlib.import_module("tritonclient.http")
        except ModuleNotFoundError as error:
            raise DarkroomError(
                f"HTTP needs the package {error.name}: pip install 'darkroom[http]'"
            ) from error
        self._address = address

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        # tritonclient sets the timeout of a connection, not of a call.
        client = self.triton.InferenceServerClient(self._address, network_timeout=timeout)
        try:
            return client.infer(model, inputs, outputs=outputs)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise InferenceServerException(
                    f"no answer within {timeout:g} s", status="504"
                ) from error
            raise ServerUnavailable(f"{self._address}: {error}") from error
        finally:
            client.close()

    def is_ready(self, model: str) -> bool:
        client = self.triton.InferenceServerClient(self._address)
        try:
            return bool(client.is_model_ready(model))
        except (OSError, InferenceServerException):
            return False
        finally:
            client.close()

    def close(self) -> None:
        pass
