"""A server that speaks Triton's protocol over gRPC and HTTP, with a formula for its model."""

import contextlib
import json
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

TIMINGS = {"queue_ms": 1.0, "denoise_ms": 2.0, "decode_ms": 3.0, "total_ms": 6.0}
INFO = {"timings": TIMINGS, "queue_steps": 5, "model": "fake", "engine": "0123", "notes": []}
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
}
"""What Triton's HTTP face answers where its gRPC face answers the code."""


def encode_picture(seed: int, size: tuple[int, int] = (16, 8), file_format: str = "PNG") -> bytes:
    """A picture of one colour, which depends on the seed."""
    buffer = BytesIO()
    Image.new("RGB", size, (seed % 256, 20, 30)).save(buffer, file_format)
    return buffer.getvalue()


def paint(fields: dict[str, Any]) -> Arrays:
    """The outputs of `stable_diffusion` for a request's fields."""
    count = fields.get("num_images_per_prompt", 1)
    seeds = [fields["seed"] + index for index in range(count)]
    size = (fields.get("width", 16), fields.get("height", 8))
    return {
        "image": np.array([encode_picture(seed, size) for seed in seeds], np.object_),
        "seed": np.array(seeds, np.int64),
        "info": np.array([json.dumps(INFO).encode()], np.object_),
    }


@dataclass
class FakeTriton:
    """Serves while it is entered; the attributes are switches, and what the server saw."""

    models: set[str] = field(default_factory=lambda: {"stable_diffusion"})
    answer: Callable[[dict[str, Any]], Arrays] = paint
    failure: tuple[grpc.StatusCode, str] | None = None
    """What every request is answered with, if set."""
    raw_http: bytes | None = None
    """What the HTTP face sends in the place of any answer, before it hangs up, if set."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    """While cleared, no request is answered."""
    is_entered: threading.Event = field(default_factory=threading.Event)
    """Set when a request has come."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when a gRPC client has left a request that was not answered."""

    _came: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Self:
        self.gate.set()
        self._grpc = grpc.server(ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcFace(self), self._grpc)
        self.grpc_url = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), HttpFace)
        self._http.triton = self
        self.http_url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def wait_for_requests(self, count: int, timeout_s: float) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, timeout_s)

    def infer(self, fields: dict[str, Any]) -> Arrays:
        with self._came:
            self.requests.append(fields)
            self._came.notify_all()
        self.is_entered.set()
        self.gate.wait()
        return self.answer(fields)


class GrpcFace(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, triton: FakeTriton) -> None:
        self._triton = triton

    def ModelReady(self, request: Any, _context: Any) -> Any:  # noqa: N802  Triton's name
        self._triton.gate.wait()
        return service_pb2.ModelReadyResponse(ready=request.name in self._triton.models)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  Triton's name
        triton = self._triton
        answered = threading.Event()
        context.add_callback(lambda: answered.is_set() or triton.is_cancelled.set())
        if request.model_name not in triton.models:
            answered.set()
            context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"Request for unknown model: '{request.model_name}' is not found",
            )
        arrays = triton.infer(_read_grpc(request))
        answered.set()
        if triton.failure:
            context.abort(*triton.failure)
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, datatype, shape, raw in _pack(arrays):
            response.outputs.add(name=name, datatype=datatype, shape=shape)
            response.raw_output_contents.append(raw)
        return response


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
        header_length = int(self.headers["Inference-Header-Content-Length"])
        arrays = triton.infer(_read_http(body, header_length))
        if triton.failure:
            code, message = triton.failure
            self._send(HTTP_STATUS[code], json.dumps({"error": message}).encode())
            return
        outputs, blob = [], b""
        for name, datatype, shape, raw in _pack(arrays):
            parameters = {"binary_data_size": len(raw)}
            entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
            outputs.append(entry)
            blob += raw
        header = json.dumps({"model_name": "stable_diffusion", "outputs": outputs}).encode()
        self._send(200, header + blob, ("Inference-Header-Content-Length", str(len(header))))

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


def _read_grpc(request: Any) -> dict[str, Any]:
    return {
        entry.name: _unpack(entry.datatype, list(entry.shape), raw)
        for entry, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def _read_http(body: bytes, header_length: int) -> dict[str, Any]:
    fields = {}
    position = header_length
    for entry in json.loads(body[:header_length])["inputs"]:
        end = position + entry["parameters"]["binary_data_size"]
        fields[entry["name"]] = _unpack(entry["datatype"], entry["shape"], body[position:end])
        position = end
    assert position == len(body)
    return fields


def _unpack(datatype: str, shape: list[int], raw: bytes) -> Any:
    """The one value of an input; text is decoded."""
    assert shape == [1]
    if datatype == "BYTES":
        return deserialize_bytes_tensor(raw)[0].decode()
    return np.frombuffer(raw, triton_to_np_dtype(datatype))[0].item()


def _pack(arrays: Arrays) -> Iterator[tuple[str, str, list[int], bytes]]:
    for name, array in arrays.items():
        raw = array.tobytes()
        if array.dtype == np.object_:
            raw = serialize_byte_tensor(array).item() if array.size else b""
        yield name, np_to_triton_dtype(array.dtype), list(array.shape), raw
