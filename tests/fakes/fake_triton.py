"""A server that speaks Triton's protocol over gRPC and HTTP, with a formula for its model."""

import base64
import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any, Self

import grpc
import numpy as np
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

Arrays = dict[str, np.ndarray]

POLL_S = 0.01
TIMINGS = {"queue_ms": 1.0, "denoise_ms": 2.0, "decode_ms": 3.0, "total_ms": 6.0}
MODEL_INFO = {
    "model": "stable_diffusion",
    "name": "shapes",
    "family": "sd1",
    "engine": "0123",
    "modes": ["text2img", "img2img"],
    "samplers": ["unipc", "euler"],
    "limits": {"min_size": 32, "max_size": 128},
    "controlnets": ["canny"],
    "loras": [],
    "variants": [],
    "safety_checker": "off",
    "weather": "fine",
}
"""What `darkroom` tells of a model, and something that only a newer server would."""
PAIRS = {"original_size", "crops_coords_top_left", "target_size"}
LISTS = {
    *("controlnet", "control_image", "controlnet_conditioning_scale"),
    *("control_guidance_start", "control_guidance_end", "lora", "lora_scale"),
}
PICTURES = {"image", "mask_image", "control_image"}
INFO = {"timings": TIMINGS, "queue_steps": 5, "model": "fake", "engine": "0123", "notes": []}
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
}
"""What Triton's HTTP face answers where its gRPC face answers the code."""


class Failure(Exception):
    """An error that a model answers with."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


def encode_picture(seed: int, size: tuple[int, int] = (16, 8), file_format: str = "PNG") -> bytes:
    """A picture of one colour, which depends on the seed."""
    buffer = BytesIO()
    Image.new("RGB", size, (seed % 256, 20, 30)).save(buffer, file_format)
    return buffer.getvalue()


def encode_latents(seed: int, size: tuple[int, int] = (16, 8)) -> bytes:
    """Latents of one number, which depends on the seed."""
    buffer = BytesIO()
    np.save(buffer, np.full((4, size[1] // 8, size[0] // 8), seed % 256, np.float32))
    return buffer.getvalue()


def paint(fields: dict[str, Any]) -> Arrays:
    """The outputs of `stable_diffusion` for a request's fields."""
    count = fields.get("num_images_per_prompt", 1)
    seeds = [fields["seed"] + index for index in range(count)]
    size = (fields.get("width", 16), fields.get("height", 8))
    encode = encode_latents if fields.get("output_format") == "latent" else encode_picture
    return {
        "image": np.array([encode(seed, size) for seed in seeds], np.object_),
        "seed": np.array(seeds, np.int64),
        "info": np.array([json.dumps(INFO).encode()], np.object_),
    }


def tell(**facts: Any) -> Arrays:
    """The output of `stable_diffusion_stream` for an event."""
    return {"event": np.array([json.dumps(facts).encode()], np.object_)}


def narrate(fields: dict[str, Any], _stop: threading.Event) -> Iterator[Arrays]:
    """The answers of `stable_diffusion_stream` for a request's fields."""
    yield tell(type="queued", position=0)
    num_steps = fields.get("num_inference_steps", 3)
    interval = fields.get("preview_interval", 0)
    for step in range(1, num_steps + 1):
        for index in range(fields.get("num_images_per_prompt", 1)):
            where = {"index": index, "step": step, "num_steps": num_steps}
            yield tell(type="step", **where)
            if interval and step % interval == 0:
                picture = encode_picture(step, (8, 8), "JPEG")
                yield {**tell(type="preview", **where), "preview": np.array([picture], np.object_)}
    yield {**tell(type="done"), **paint(fields)}


@dataclass
class Flight:
    """A request that is not answered yet."""

    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the client has left, and when the request was cancelled by its id."""
    is_cancelled_by_id: bool = False
    is_over: bool = False


@dataclass
class FakeTriton:
    """Serves while it is entered; the attributes are switches, and what the server saw."""

    models: set[str] = field(
        default_factory=lambda: {
            "stable_diffusion",
            "stable_diffusion_stream",
            "stable_diffusion_cancel",
            "darkroom",
        }
    )
    catalog: list[dict[str, Any]] = field(default_factory=lambda: [MODEL_INFO])
    """What `darkroom` tells."""
    answer: Callable[[dict[str, Any]], Arrays] = paint
    script: Callable[[dict[str, Any], threading.Event], Iterator[Arrays]] = narrate
    """What a stream tells; it may raise a Failure."""
    failure: tuple[grpc.StatusCode, str] | None = None
    """What every request is answered with, if set."""
    raw_http: bytes | None = None
    """What the HTTP face sends in the place of any answer, before it hangs up, if set."""
    ends_with_status: bool = False
    """Whether a gRPC stream that fails ends with a status, as a proxy may end one."""
    linger_s: float = 0.0
    """How long a gRPC stream that has told its error goes on before it ends."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    cancelled_ids: list[str] = field(default_factory=list)
    """What `stable_diffusion_cancel` was asked for."""
    gate: threading.Event = field(default_factory=threading.Event)
    """While cleared, no request is answered."""
    is_entered: threading.Event = field(default_factory=threading.Event)
    """Set when a request has come."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when a client has left a request that was not answered, and Triton noticed."""

    _came: threading.Condition = field(default_factory=threading.Condition)
    _flights: list[tuple[str, Flight]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.gate.set()
        self._grpc = grpc.server(ThreadPoolExecutor(32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcFace(self), self._grpc)
        self.grpc_url = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = HttpServer(("127.0.0.1", 0), HttpFace)
        self._http.triton = self
        self.http_url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        for _, flight in list(self._flights):
            flight.stop.set()
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def wait_for_requests(self, count: int, timeout_s: float) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, timeout_s)

    def infer(self, model: str, request_id: str, fields: dict[str, Any], flight: Flight) -> Arrays:
        """The one answer to a request; raises a Failure."""
        if model.endswith("_cancel"):
            return self._cancel(fields["request_id"])
        if model == "darkroom":
            return self._tell_models(fields)
        with self._flying(request_id, fields, flight):
            answer = self.answer(fields)
        if self.failure:
            raise Failure(*self.failure)
        return answer

    def stream(self, request_id: str, fields: dict[str, Any], flight: Flight) -> Iterator[Arrays]:
        """The answers to a request of a stream; raises a Failure."""
        with self._flying(request_id, fields, flight):
            if self.failure:
                raise Failure(*self.failure)
            for answer in self.script(fields, flight.stop):
                yield answer
                self._check(flight)

    @contextlib.contextmanager
    def _flying(self, request_id: str, fields: dict[str, Any], flight: Flight) -> Iterator[None]:
        entry = (request_id, flight)
        with self._came:
            self._flights.append(entry)
            self.requests.append(fields)
            self.request_ids.append(request_id)
            self._came.notify_all()
        self.is_entered.set()
        try:
            while not self.gate.wait(POLL_S):
                self._check(flight)
            yield
            self._check(flight)
        finally:
            self._flights.remove(entry)

    def _check(self, flight: Flight) -> None:
        if flight.is_cancelled_by_id:
            raise Failure(grpc.StatusCode.CANCELLED, "the request was cancelled")

    def _cancel(self, request_id: str) -> Arrays:
        self.cancelled_ids.append(request_id)
        flights = [flight for name, flight in list(self._flights) if name == request_id]
        if len(flights) > 1:
            message = f"request_id: {request_id!r} is carried by {len(flights)} requests in flight"
            raise Failure(grpc.StatusCode.INVALID_ARGUMENT, message)
        for flight in flights:
            flight.is_cancelled_by_id = True
            flight.stop.set()
        return {"cancelled": np.array([bool(flights)])}

    def _tell_models(self, fields: dict[str, Any]) -> Arrays:
        models = self.catalog
        if "model" in fields:
            models = [info for info in models if info["model"] == fields["model"]]
            if not models:
                message = f"model: {fields['model']!r} does not exist"
                raise Failure(grpc.StatusCode.INVALID_ARGUMENT, message)
        return {"models": np.array([json.dumps(models).encode()], np.object_)}

    def left(self, flight: Flight) -> None:
        """The client's connection is gone."""
        if not flight.is_over:
            flight.stop.set()
            self.is_cancelled.set()


class GrpcFace(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, triton: FakeTriton) -> None:
        self._triton = triton

    def ModelReady(self, request: Any, _context: Any) -> Any:  # noqa: N802  Triton's name
        self._triton.gate.wait()
        return service_pb2.ModelReadyResponse(ready=request.name in self._triton.models)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  Triton's name
        triton = self._triton
        flight = Flight()
        context.add_callback(lambda: triton.left(flight))
        try:
            if request.model_name not in triton.models:
                raise _unknown(request.model_name)
            arrays = triton.infer(request.model_name, request.id, _read_grpc(request), flight)
        except Failure as failure:
            flight.is_over = True
            context.abort(failure.code, failure.message)
        flight.is_over = True
        return _response(request, arrays)

    def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802  Triton's name
        triton = self._triton
        flight = Flight()
        context.add_callback(lambda: triton.left(flight))
        for request in requests:
            if request.model_name not in triton.models:
                message = _unknown(request.model_name).message
                yield service_pb2.ModelStreamInferResponse(error_message=message)
                continue
            try:
                for arrays in triton.stream(request.id, _read_grpc(request), flight):
                    response = _response(request, arrays)
                    yield service_pb2.ModelStreamInferResponse(infer_response=response)
            except Failure as failure:
                if triton.ends_with_status:
                    flight.is_over = True
                    context.abort(failure.code, failure.message)
                yield service_pb2.ModelStreamInferResponse(error_message=failure.message)
                flight.stop.wait(triton.linger_s)
        flight.is_over = True


class HttpServer(ThreadingHTTPServer):
    # Connections that come at the same time; the default is five, and a second to try again.
    request_queue_size = 64


class HttpFace(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        triton: FakeTriton = self.server.triton
        triton.gate.wait()
        model = self.path.split("/")[-2]
        self._send(200 if model in triton.models else 400, b"")

    def do_POST(self) -> None:
        triton: FakeTriton = self.server.triton
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if triton.raw_http is not None:
            self.wfile.write(triton.raw_http)
            self.close_connection = True
            return
        *_, model, method = self.path.split("/")
        if model not in triton.models:
            self._send_error(404, _unknown(model).message)
        elif method == "generate_stream":
            self._stream(json.loads(body))
        else:
            self._infer(model, body)

    def _infer(self, model: str, body: bytes) -> None:
        # Not told where nothing follows.
        header_length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        request_id = json.loads(body[:header_length]).get("id", "")
        fields = _read_http(body, header_length)
        try:
            # Triton does not notice when the client of a plain request leaves.
            arrays = self.server.triton.infer(model, request_id, fields, Flight())
        except Failure as failure:
            self._send_error(HTTP_STATUS[failure.code], failure.message)
            return
        outputs, blob = [], b""
        for name, datatype, shape, raw in _pack(arrays):
            parameters = {"binary_data_size": len(raw)}
            entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
            outputs.append(entry)
            blob += raw
        header = json.dumps({"model_name": model, "outputs": outputs}).encode()
        self._send(200, header + blob, ("Inference-Header-Content-Length", str(len(header))))

    def _stream(self, fields: dict[str, Any]) -> None:
        triton: FakeTriton = self.server.triton
        # What the model does for this format; bytes that are no text would break the JSON.
        assert fields["output_format"] == "b64_png"
        request_id = fields.pop("id", "")
        for name in PICTURES & set(fields):
            fields[name] = _from_base64(fields[name])
        flight = Flight()
        watcher = threading.Thread(target=self._watch, args=(flight,))
        watcher.start()
        is_begun = False
        try:
            for arrays in triton.stream(request_id, fields, flight):
                is_begun = is_begun or self._begin(200)
                self._send_event(to_json(arrays))
        except Failure as failure:
            # Whatever its code is.
            is_begun = is_begun or self._begin(400)
            self._send_event({"error": failure.message})
        is_begun = is_begun or self._begin(200)
        flight.is_over = True
        watcher.join()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"0\r\n\r\n")

    def _begin(self, status: int) -> bool:
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        with contextlib.suppress(ConnectionError):
            self.end_headers()
        return True

    def _send_event(self, answer: dict[str, Any]) -> None:
        chunk = b"data: " + json.dumps(answer).encode() + b"\n\n"
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def _watch(self, flight: Flight) -> None:
        """Notice that the client has hung up."""
        while not flight.is_over:
            is_readable = select.select([self.connection], [], [], POLL_S)[0]
            if is_readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.triton.left(flight)
                return

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode())

    def _send(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # The client may have left.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _unknown(model: str) -> Failure:
    message = f"Request for unknown model: '{model}' is not found"
    return Failure(grpc.StatusCode.NOT_FOUND, message)


def _response(request: Any, arrays: Arrays) -> Any:
    response = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    for name, datatype, shape, raw in _pack(arrays):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return response


def to_json(arrays: Arrays) -> dict[str, Any]:
    """What a generate endpoint makes of outputs: one value is no list."""
    answer = {}
    for name, array in arrays.items():
        values = array.tolist()
        if name in ("image", "preview"):
            values = [base64.b64encode(value).decode() for value in values]
        values = [value.decode() if isinstance(value, bytes) else value for value in values]
        answer[name] = values[0] if len(values) == 1 else values
    return answer


def _read_grpc(request: Any) -> dict[str, Any]:
    return {
        entry.name: _unpack(entry.name, entry.datatype, list(entry.shape), raw)
        for entry, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def _read_http(body: bytes, header_length: int) -> dict[str, Any]:
    fields = {}
    position = header_length
    for entry in json.loads(body[:header_length]).get("inputs", []):
        end = position + entry["parameters"]["binary_data_size"]
        name, raw = entry["name"], body[position:end]
        fields[name] = _unpack(name, entry["datatype"], entry["shape"], raw)
        position = end
    assert position == len(body)
    return fields


def _unpack(name: str, datatype: str, shape: list[int], raw: bytes) -> Any:
    """The value of an input, or a list of them where there may be several; text is decoded."""
    if datatype == "BYTES":
        values = deserialize_bytes_tensor(raw).tolist()
        values = values if name in PICTURES else [value.decode() for value in values]
    else:
        values = np.frombuffer(raw, triton_to_np_dtype(datatype)).tolist()
    assert shape == [len(values)]
    if name in LISTS:
        return values
    assert shape == ([2] if name in PAIRS else [1])
    return values if name in PAIRS else values[0]


def _from_base64(value: str | list[str]) -> bytes | list[bytes]:
    if isinstance(value, list):
        return [base64.b64decode(text, validate=True) for text in value]
    return base64.b64decode(value, validate=True)


def _pack(arrays: Arrays) -> Iterator[tuple[str, str, list[int], bytes]]:
    for name, array in arrays.items():
        raw = array.tobytes()
        if array.dtype == np.object_:
            raw = serialize_byte_tensor(array).item() if array.size else b""
        yield name, np_to_triton_dtype(array.dtype), list(array.shape), raw
