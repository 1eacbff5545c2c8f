"""Triton's module of the same name, as far as our models use it, with its interface.

Beside that interface stands `server`: the models that requests of a model reach, by name.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS = range(7)
    CANCELLED = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if not isinstance(message, str):
            raise TypeError("incompatible constructor arguments")
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError("incompatible constructor arguments")
        self._name = name
        if array.dtype == np.object_:
            # Texts travel as bytes.
            flat = [v if isinstance(v, bytes) else str(v).encode() for v in array.ravel()]
            array = np.array(flat, np.object_).reshape(array.shape)
        self._array = np.ascontiguousarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self._output_tensors = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """What a request that is answered later is answered through; `response` waits for it."""

    def __init__(self) -> None:
        self._is_closed = threading.Event()
        self.is_asked = threading.Event()
        """Set when the model has asked whether the client left."""
        self.client_has_left = False
        self.is_broken = False
        """Whether sending and asking fail, as when shared memory is full."""
        self.sent: list[InferenceResponse] = []

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.is_broken:
            raise TritonModelException("Failed to increase the shared memory pool size")
        if self._is_closed.is_set():
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if response is not None:
            self.sent.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self._is_closed.set()

    def is_cancelled(self) -> bool:
        # The real one reads freed memory then, and the server is gone.
        if self._is_closed.is_set():
            server.num_crashes += 1
        self.is_asked.set()
        if self.is_broken:
            raise TritonModelException("Failed to increase the shared memory pool size")
        return self.client_has_left

    def response(self, timeout_s: float) -> InferenceResponse:
        """The one answer, once it is final."""
        self.wait_for_end(timeout_s)
        (response,) = self.sent
        return response

    def wait_for_end(self, timeout_s: float) -> None:
        """Return when the final response was sent."""
        assert self._is_closed.wait(timeout_s), "no answer"


class InferenceRequest:
    def __init__(
        self,
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        inputs: Sequence[Tensor] = (),
        request_id: str = "",
    ) -> None:
        self._request_id = request_id
        self._model_name = model_name
        self._requested_output_names = list(requested_output_names)
        self._inputs = list(inputs)
        self.sender = ResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        # The real one decodes what came over the network.
        return self._request_id.encode("latin-1").decode()

    def model_name(self) -> str:
        return self._model_name

    def requested_output_names(self) -> list[str]:
        return self._requested_output_names

    def get_response_sender(self) -> ResponseSender:
        return self.sender

    def exec(self) -> InferenceResponse:
        return server.run(self)


class Metric:
    """One series of a family; `values` are all that was done to it."""

    def __init__(self, kind: str, buckets: Sequence[float]) -> None:
        self._kind = kind
        self.buckets = list(buckets)
        self.values: list[float] = []

    def increment(self, value: float) -> None:
        self._do(value, "COUNTER", "GAUGE")

    def set(self, value: float) -> None:
        self._do(value, "GAUGE")

    def observe(self, value: float) -> None:
        self._do(value, "HISTOGRAM")

    def _do(self, value: float, *kinds: str) -> None:
        if self._kind not in kinds:
            raise TritonModelException(f"a {self._kind} cannot do that")
        self.values.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "COUNTER", "GAUGE", "HISTOGRAM"

    def __init__(self, name: str, description: str, kind: str) -> None:
        if name in server.families:
            raise TritonModelException(f"the metric family {name} exists")
        self._kind = kind
        self.name = name
        self.description = description
        self.series: dict[tuple[tuple[str, str], ...], Metric] = {}
        server.families[name] = self

    # The real one's name.
    def Metric(self, labels: dict[str, str], buckets: Sequence[float] | None = None) -> Metric:  # noqa: N802
        if (self._kind == "HISTOGRAM") != bool(buckets):
            raise TritonModelException("buckets are for histograms, which need them")
        key = tuple(sorted(labels.items()))
        return self.series.setdefault(key, Metric(self._kind, buckets or ()))


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def is_model_ready(model_name: str, model_version: str = "") -> bool:  # noqa: ARG001  Triton's
    return server.is_ready(model_name)


Model = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Server:
    """The server side: its models are functions from input arrays to output arrays."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.models: dict[str, Model] = {}
        self.loaded: set[str] = set()
        """Models that are ready without a function, as the one that calls."""
        self.is_starting = False
        """Whether every question is refused, as while tritonserver starts."""
        self.num_crashes = 0
        """How often a model did what makes tritonserver crash."""
        self.questions: list[str] = []
        """Every model that was asked for its readiness."""
        self.on_question: Callable[[str], Any] = lambda _: None
        self.families: dict[str, MetricFamily] = {}
        """The metrics that models have made, by name."""
        self.requests: list[InferenceRequest] = []
        """Every request that a model made."""

    def is_ready(self, name: str) -> bool:
        self.questions.append(name)
        self.on_question(name)
        if self.is_starting:
            raise TritonModelException("Server not ready")
        return name in self.models or name in self.loaded

    def run(self, request: InferenceRequest) -> InferenceResponse:
        self.requests.append(request)
        name = request.model_name()
        if name not in self.models:
            raise TritonModelException(
                f"Failed for execute the inference request. Model '{name}' is not ready."
            )
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = self.models[name](arrays)
        except TritonModelException:
            raise
        except Exception as error:  # noqa: BLE001  a model's failure is its answer
            return InferenceResponse(error=TritonError(str(error)))
        wanted = request.requested_output_names()
        return InferenceResponse([Tensor(key, outputs[key]) for key in wanted])


server = Server()
