"""Triton's model control: which networks the server has loaded."""

import http.client
import json
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

from darkroom_engine.errors import NetworkFailed

CALL_TIMEOUT_S = 600.0
"""Loading takes no longer."""
UNLOAD_TIMEOUT_S = 120.0
POLL_S = 0.02
_GOING = ("READY", "LOADING", "UNLOADING")
"""The states of a model that may still hold memory."""


class ModelControl(Protocol):
    """Loads and unloads networks by name. Any thread may call, for different networks at once."""

    def load(self, network: str) -> None:
        """Return when it can be called; NetworkFailed if it never will."""

    def unload(self, network: str) -> None:
        """Return when it holds no memory any more; the calls that it has end before.

        One that is not loaded is none of it. NetworkFailed if it stays.
        """


class TritonModelControl:
    """Model control over the HTTP API of the server that runs this process.

    Not by pb_utils.load_model: in Triton 24.10 it holds Python's lock for as long as a load takes,
    so that all calls of all threads stop meanwhile, and never returns from a load that fails.
    """

    def __init__(
        self, url: str, prefix: str = "", unload_timeout_s: float = UNLOAD_TIMEOUT_S
    ) -> None:
        """`prefix` is what Triton's names of the networks begin with, in this server."""
        self._unload_timeout_s = unload_timeout_s
        parts = urlsplit(url)
        self._host = parts.hostname or "localhost"
        self._port = parts.port or 8000
        self._prefix = prefix

    def load(self, network: str) -> None:
        self._post(network, f"{self._path(network)}/load", "cannot be loaded")

    def unload(self, network: str) -> None:
        problem = "cannot be unloaded"
        self._post(network, f"{self._path(network)}/unload", problem)
        # Triton answers at once, and ends the network's process a second later.
        give_up_at = time.monotonic() + self._unload_timeout_s
        while self._state(network) in _GOING:
            if time.monotonic() > give_up_at:
                raise NetworkFailed(network, f"{problem} within {self._unload_timeout_s:g} s")
            time.sleep(POLL_S)

    def _path(self, network: str) -> str:
        return f"/v2/repository/models/{self._prefix}{network}"

    def _state(self, network: str) -> str | None:
        text = self._post(network, "/v2/repository/index", "its state cannot be known")
        name = self._prefix + network
        states: list[str | None] = [
            entry.get("state") for entry in json.loads(text) if entry["name"] == name
        ]
        # Of several versions, all of which hold memory, any that does counts.
        return next((state for state in states if state in _GOING), None)

    def _post(self, network: str, path: str, failure: str) -> str:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CALL_TIMEOUT_S)
        try:
            connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except ConnectionRefusedError as error:
            # It listened when this process was started; now it is stopping.
            problem = f"{failure}: {self._host}:{self._port}: {error.strerror}"
            raise NetworkFailed(network, problem, is_final=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise NetworkFailed(network, f"{failure}: {error!r}") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise NetworkFailed(network, f"{failure}: {_problem(text)}")
        return text


def _problem(text: str) -> str:
    """The first line of what Triton says is wrong."""
    try:
        answer: Any = json.loads(text)
        return str(answer["error"]).partition("\n")[0]
    except (ValueError, KeyError, TypeError):
        return text.partition("\n")[0]
