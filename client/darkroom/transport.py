"""The one place that knows how tritonclient is called over gRPC and over HTTP."""

import importlib
import re
from http.client import HTTPException
from types import ModuleType
from typing import Any, Protocol

from tritonclient.utils import InferenceServerException

from darkroom.exceptions import DarkroomError, InvalidRequest, ServerError, ServerUnavailable


class Transport(Protocol):
    """A connection, and the tritonclient module whose tensors it takes."""

    triton: ModuleType

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        """Raises InferenceServerException, or DarkroomError where the cause is plain."""

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


class GrpcTransport:
    def __init__(self, address: str) -> None:
        self.triton = importlib.import_module("tritonclient.grpc")
        self._client = self.triton.InferenceServerClient(address)

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        return self._client.infer(model, inputs, outputs=outputs, client_timeout=timeout)

    def is_ready(self, model: str, timeout: float) -> bool:
        try:
            return bool(self._client.is_model_ready(model, client_timeout=timeout))
        except InferenceServerException:
            return False

    def close(self) -> None:
        self._client.close()


class HttpTransport:
    """Plain HTTP: Triton does not notice when the client leaves, and work runs to its end."""

    def __init__(self, address: str) -> None:
        try:
            self.triton = importlib.import_module("tritonclient.http")
        # tritonclient makes a RuntimeError of a missing package.
        except (ModuleNotFoundError, RuntimeError) as error:
            raise DarkroomError("HTTP needs an extra: pip install 'darkroom[http]'") from error
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
        except HTTPException as error:
            raise ServerUnavailable(f"{self._address}: no HTTP answer, {error}") from error
        except ValueError as error:
            raise ServerError(f"the server's answer cannot be read: {error!r}") from error
        finally:
            client.close()

    def is_ready(self, model: str, timeout: float) -> bool:
        client = self.triton.InferenceServerClient(self._address, network_timeout=timeout)
        try:
            return bool(client.is_model_ready(model))
        except (OSError, HTTPException, InferenceServerException):
            return False
        finally:
            client.close()

    def close(self) -> None:
        pass
