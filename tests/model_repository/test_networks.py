"""How the engine calls the networks by BLS: names, shapes, failures, and waiting for them."""

from collections.abc import Callable

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils

from darkroom_engine import NetworkFailed, TritonNetworks

CALLER = "stable_diffusion"
NETWORKS = ("text_encoder", "unet")
FOREVER_S = 60.0

Arrays = dict[str, np.ndarray]


@pytest.fixture
def networks(server: pb_utils.Server) -> TritonNetworks:
    """Two networks, each loaded and refusing to run."""
    for name in NETWORKS:
        server.models[name] = fail_with(AssertionError("not to be called"))
    server.loaded.add(CALLER)
    return TritonNetworks(pb_utils, CALLER)


def fail_with(error: Exception) -> Callable[[Arrays], Arrays]:
    def fail(_: Arrays) -> Arrays:
        raise error

    return fail


def seen(request: pb_utils.InferenceRequest) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        tensor.name(): (tensor.as_numpy().shape, str(tensor.as_numpy().dtype))
        for tensor in request.inputs()
    }


def test_outputs_come_in_the_order_in_which_they_are_wanted(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["text_encoder"] = lambda inputs: {
        "hidden_states": inputs["input_ids"].astype(np.float32),
        "text_embeds": 2 * inputs["input_ids"].astype(np.float32),
    }
    ids = np.arange(2 * 77, dtype=np.int64).reshape(2, 77)
    embeds, hidden = networks.run(
        "text_encoder", {"input_ids": ids}, ["text_embeds", "hidden_states"]
    )

    (request,) = server.requests
    assert request.requested_output_names() == ["text_embeds", "hidden_states"]
    assert seen(request) == {"input_ids": ((2, 77), "int64")}
    np.testing.assert_array_equal(hidden, ids)
    np.testing.assert_array_equal(embeds, 2 * ids)


def test_a_number_a_row_has_a_dimension_of_its_own(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["unet"] = lambda inputs: {
        "out_sample": inputs["sample"] + inputs["timestep"][:, :, None, None]
    }
    inputs = {
        "sample": np.zeros((3, 4, 8, 16), np.float32),
        "timestep": np.array([1, 500, 999], np.float32),
        "encoder_hidden_states": np.zeros((3, 924, 6), np.float32),
    }
    (output,) = networks.run("unet", inputs, ["out_sample"])

    (request,) = server.requests
    assert seen(request) == {
        "sample": ((3, 4, 8, 16), "float32"),
        "timestep": ((3, 1), "float32"),
        "encoder_hidden_states": ((3, 924, 6), "float32"),
    }
    assert output[:, 0, 0, 0].tolist() == [1, 500, 999]


def test_networks_go_by_their_name_in_this_server(server: pb_utils.Server) -> None:
    server.models["sdxl_unet"] = lambda inputs: {"out_sample": inputs["sample"]}
    server.loaded.add(CALLER)
    networks = TritonNetworks(pb_utils, CALLER, prefix="sdxl_")
    networks.wait_until_ready(["unet"], 0.0, lambda: False)
    sample = np.ones((1, 4, 2, 2), np.float32)

    assert np.array_equal(networks.run("unet", {"sample": sample}, ["out_sample"])[0], sample)
    assert set(server.questions) == {"sdxl_unet", CALLER}
    server.models["sdxl_unet"] = fail_with(RuntimeError("out of memory"))
    # Errors are about the network, whatever it is called here.
    with pytest.raises(NetworkFailed, match=r"^unet failed: out of memory$"):
        networks.run("unet", {"sample": sample}, ["out_sample"])


def test_views_that_are_not_contiguous_are_sent_right(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["unet"] = lambda inputs: {"out_sample": inputs["sample"]}
    sample = np.arange(2 * 4 * 3 * 5, dtype=np.float32).reshape(2, 4, 3, 5).transpose(0, 1, 3, 2)

    assert np.array_equal(networks.run("unet", {"sample": sample}, ["out_sample"])[0], sample)


def call(networks: TritonNetworks, name: str) -> None:
    networks.run(name, {"sample": np.zeros((1, 2), np.float32)}, ["out_sample"])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("error", [RuntimeError, pb_utils.TritonModelException])
def test_a_failure_names_the_network_in_whichever_form_it_comes(
    networks: TritonNetworks, server: pb_utils.Server, name: str, error: type[Exception]
) -> None:
    server.models[name] = fail_with(error("out of memory"))

    with pytest.raises(NetworkFailed, match=f"^{name} failed: out of memory$") as caught:
        call(networks, name)
    assert caught.value.network == name


@pytest.mark.parametrize(
    ("message", "is_final"), [("Server not ready", True), ("Model 'unet' is not ready", False)]
)
def test_only_a_server_that_stops_makes_a_failure_final(
    networks: TritonNetworks, server: pb_utils.Server, message: str, *, is_final: bool
) -> None:
    server.models["unet"] = fail_with(pb_utils.TritonModelException(message))

    with pytest.raises(NetworkFailed, match=message) as caught:
        call(networks, "unet")
    assert caught.value.is_final is is_final


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_gone_is_named(
    networks: TritonNetworks, server: pb_utils.Server, name: str
) -> None:
    del server.models[name]

    with pytest.raises(NetworkFailed, match=f"^{name} failed: .* Model '{name}' is not ready"):
        call(networks, name)


def test_ready_networks_are_not_waited_for(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    networks.wait_until_ready(NETWORKS, 0.0, lambda: False)

    assert set(server.questions) == {*NETWORKS, CALLER}
    assert server.requests == []


@pytest.mark.parametrize("name", [*NETWORKS, CALLER])
def test_each_network_and_the_model_itself_are_waited_for(
    networks: TritonNetworks, server: pb_utils.Server, name: str
) -> None:
    model = server.models.pop(name, None)
    server.loaded.discard(name)

    def load_at_the_third_question(asked: str) -> None:
        if asked == name and server.questions.count(name) == 3:
            server.loaded.add(name)

    server.on_question = load_at_the_third_question
    networks.wait_until_ready(NETWORKS, FOREVER_S, lambda: False)

    assert (model is None) == (name == CALLER)
    assert server.questions.count(name) == 3


def test_a_server_that_is_starting_is_waited_for(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.is_starting = True

    def start_at_the_third_question(_: str) -> None:
        server.is_starting = len(server.questions) < 3

    server.on_question = start_at_the_third_question
    networks.wait_until_ready(NETWORKS, FOREVER_S, lambda: False)

    assert not server.is_starting


@pytest.mark.parametrize("name", [*NETWORKS, CALLER])
def test_what_never_comes_is_given_up_by_name(
    networks: TritonNetworks, server: pb_utils.Server, name: str
) -> None:
    server.models.pop(name, None)
    server.loaded.discard(name)

    with pytest.raises(NetworkFailed, match=rf"^{name} failed: not ready within 0.1 s"):
        networks.wait_until_ready(NETWORKS, 0.1, lambda: False)


def test_a_server_that_never_starts_is_given_up(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.is_starting = True

    with pytest.raises(NetworkFailed, match="failed: not ready within 0 s"):
        networks.wait_until_ready(NETWORKS, 0.0, lambda: False)
