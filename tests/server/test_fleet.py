"""A server whose model has two engines: requests are spread, and pictures are the same."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tritonclient.grpc
from serving import WAIT_S

from darkroom import Client, Picture
from darkroom.server import Server, free_ports

NUM_STEPS = 60
REQUESTS = tuple(
    {"prompt": prompt, "seed": seed, "num_inference_steps": NUM_STEPS, "guidance_scale": 1.0}
    for seed, prompt in enumerate(("a large red circle", "a small blue square", "a green triangle"))
)


def ask_all(client: Client) -> list[Picture]:
    """Ask for all of them at once."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(lambda request: client.generate(**request), REQUESTS))


def num_calls(server: Server) -> int:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton:
        return triton.get_inference_statistics("unet").model_stats[0].execution_count


def test_two_engines_share_the_requests_and_the_networks(repository: Path, client: Client) -> None:
    expected = ask_all(client)
    with (
        Server(repository, free_ports(), engine_parameters={"num_engines": "2"}) as server,
        Client(server.grpc_url, timeout=WAIT_S) as two,
    ):
        before = num_calls(server)
        made = ask_all(two)

        for picture, other in zip(made, expected, strict=True):
            assert picture.encoded == other.encoded
        # One engine would have made the steps of all requests together.
        assert num_calls(server) - before >= 2 * NUM_STEPS
        metrics = urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode()
        assert re.search(r"^darkroom_max_rows\{.*\} 32", metrics, re.MULTILINE)
