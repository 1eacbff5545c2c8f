"""`darkroom serve --memory-profile`: the same pictures, and networks that come and go."""

import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import WAIT_S, Serving, serving, wait_until

from darkroom import Client, Picture
from darkroom.exceptions import ServerError
from darkroom.server import Server

STAY = {"balanced": {"unet", "vae_decoder"}, "low": set()}
REQUESTS = (
    {"prompt": "a large red circle", "seed": 1, "num_inference_steps": 4},
    {"prompt": "a small blue square", "seed": 2, "num_inference_steps": 9, "guidance_scale": 5.0},
    {"prompt": "a green triangle", "seed": 3, "num_inference_steps": 1, "guidance_scale": 1.0},
)


def ask_all(client: Client) -> list[Picture]:
    """Ask for all of them at once."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(lambda request: client.generate(**request), REQUESTS))


def networks(served: Serving) -> set[str]:
    """Those that have a process."""
    names = served.processes().keys() - {"tritonserver", "darkroom"}
    return {name for name in names if not name.startswith("stable_diffusion")}


def is_calm(served: Serving) -> bool:
    """Whether the supervisor had nothing to heal."""
    return not any(re.search("died|failed|restart|healed", line) for line in served.told)


@pytest.mark.parametrize("profile", STAY)
def test_pictures_are_those_of_full_and_networks_leave_when_idle(
    repository: Path, client: Client, profile: str
) -> None:
    expected = ask_all(client)
    with serving(repository, "--memory-profile", profile) as served:
        with Client(served.grpc_url, timeout=WAIT_S) as saving:
            made = ask_all(saving)
            for picture, other in zip(made, expected, strict=True):
                assert picture.encoded == other.encoded

            wait_until(lambda: networks(served) == STAY[profile])
            again = saving.generate(**REQUESTS[0])
            assert again.encoded == made[0].encoded
        assert is_calm(served)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(WAIT_S) == 0


def test_a_network_that_cannot_be_loaded_fails_its_requests_and_no_others(
    repository: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    config = copy / "stable_diffusion" / "config.pbtxt"
    text = config.read_text()
    # A network that is away is waited for.
    impatient = re.sub(r'("heal_timeout_s" value \{ string_value: )"\d+"', r'\1"0"', text)
    assert impatient != text
    config.write_text(impatient)
    graph, elsewhere = copy / "text_encoder" / "1" / "model.onnx", tmp_path / "model.onnx"
    with serving(copy, "--memory-profile", "balanced") as served:
        with Client(served.grpc_url, timeout=WAIT_S) as client:
            known = client.generate("a red circle", seed=1, num_inference_steps=2)
            wait_until(lambda: networks(served) == STAY["balanced"])
            graph.rename(elsewhere)
            with pytest.raises(
                ServerError, match=r"text_encoder failed: cannot be loaded: load fa"
            ):
                client.generate("a blue circle", num_inference_steps=2)
            # Its prompt is remembered.
            assert (
                client.generate("a red circle", seed=1, num_inference_steps=2).encoded
                == known.encoded
            )
            elsewhere.rename(graph)
            assert client.generate("a blue circle", num_inference_steps=2).size
        assert is_calm(served)


def test_the_process_of_a_network_that_comes_and_goes_is_replaced_when_it_dies(
    repository: Path,
) -> None:
    with serving(repository, "--memory-profile", "balanced") as served:
        served.kill("unet")
        served.wait_until_told("^unet died; reloading it$")
        with Client(served.grpc_url, timeout=WAIT_S) as client:
            assert client.generate("a red circle", num_inference_steps=2).size
        served.wait_until_told(r"^healed in \d+\.\d s$")
        wait_until(lambda: networks(served) == STAY["balanced"])


def test_under_full_all_networks_stay(repository: Path, server: Server) -> None:
    assert server._loaded_first == server.reloadable
    saving = Server(repository, engine_parameters={"memory_profile": "low"})
    try:
        assert saving._loaded_first == ["darkroom"]
    finally:
        saving.stop()
