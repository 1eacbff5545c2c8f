"""Networks that PyTorch runs, in the engine's process and as models of Triton's."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from PIL import Image
from pixels import levels
from server_checkpoint import CHECKPOINT, ROOT

from darkroom import Client, Picture
from darkroom.events import Step
from darkroom.server import Server, free_ports

pytestmark = pytest.mark.torch

MAX_LEVELS = 2
"""Between pictures of the same program, whose sums are taken by numpy or by PyTorch."""
MAX_LEVELS_OF_ONNX = 4
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a large red circle", "seed": 1, "num_inference_steps": 6, "guidance_scale": 0.0},
    {"prompt": "a small blue square", "seed": 2, "num_inference_steps": 9, "guidance_scale": 5.0},
    {
        "prompt": "a green triangle",
        "seed": 3,
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
        "sampler": "euler_ancestral",
        "guidance_rescale": 0.5,
    },
]


def ask_all(client: Client) -> list[Picture]:
    """All of them at once, and one that starts from a picture."""
    canvas = BytesIO()
    Image.new("RGB", (256, 256), "navy").save(canvas, "PNG")
    started = {
        "prompt": "a white star",
        "seed": 4,
        "num_inference_steps": 6,
        "image": canvas.getvalue(),
        "strength": 0.7,
    }
    requests = [*REQUESTS, started]
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: client.generate(**request), requests))


def models(server: Server) -> set[str]:
    """Those that Triton has loaded."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        index = triton.get_model_repository_index(as_json=True)["models"]
    return {entry["name"] for entry in index if entry.get("state") == "READY"}


@pytest.fixture(scope="module")
def torch_repository() -> Path:
    """The embedded checkpoint as programs of PyTorch."""
    from darkroom_export import export_checkpoint
    from darkroom_export.backend import Backend

    target = ROOT / "build" / "shapes-torch"
    export_checkpoint(CHECKPOINT, target, backend=Backend.TORCH)
    return target


@pytest.fixture(scope="module")
def in_process(torch_repository: Path) -> Iterator[tuple[set[str], list[Picture], list[Any]]]:
    """Of a server whose engine runs the networks: its models, pictures, and a stream's events."""
    with (
        Server(torch_repository, free_ports()) as server,
        Client(server.grpc_url, timeout=120) as client,
    ):
        events = list(client.stream("a red circle", num_inference_steps=5, preview_interval=2))
        yield models(server), ask_all(client), events


def test_the_engine_runs_the_networks_and_triton_has_none_of_them(in_process: Any) -> None:
    names, _, _ = in_process

    assert names == {
        *("darkroom", "stable_diffusion", "stable_diffusion_stream", "stable_diffusion_cancel")
    }


def test_steps_and_previews_come_as_always(in_process: Any) -> None:
    _, _, events = in_process

    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5]
    assert len({type(event).__name__ for event in events} & {"Preview", "Done"}) == 2


def test_the_same_pictures_come_of_models_of_their_own(
    torch_repository: Path, in_process: Any
) -> None:
    _, expected, _ = in_process
    parameters = {"in_process": "0"}

    with (
        Server(torch_repository, free_ports(), engine_parameters=parameters) as server,
        Client(server.grpc_url, timeout=120) as client,
    ):
        assert {"text_encoder", "unet", "vae_decoder", "vae_encoder"} < models(server)
        pictures = ask_all(client)

    for picture, other in zip(pictures, expected, strict=True):
        assert abs(levels(picture) - levels(other)).max() <= MAX_LEVELS


def test_the_pictures_are_those_of_the_onnx_networks(client: Client, in_process: Any) -> None:
    _, expected, _ = in_process

    for picture, other in zip(ask_all(client), expected, strict=True):
        assert abs(levels(picture) - levels(other)).max() <= MAX_LEVELS_OF_ONNX
