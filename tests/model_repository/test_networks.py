"""How the engine calls the networks by BLS: names, shapes, failures, and waiting for them."""

from collections.abc import Callable

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils

from darkroom_engine import Manifest, NetworkFailed, TritonNetworks

CALLER = "stable_diffusion"
NETWORKS = ("text_encoder", "unet", "vae_decoder")
FOREVER_S = 60.0

Arrays = dict[str, np.ndarray]


@pytest.fixture
def networks(manifest: Manifest, server: pb_utils.Server) -> TritonNetworks:
    """The networks of a manifest, each loaded and refusing to run."""
    for name in NETWORKS:
        server.models[name] = fail_with(AssertionError("not to be called"))
    server.loaded.add(CALLER)
    return TritonNetworks(pb_utils, CALLER, manifest)


def fail_with(error: Exception) -> Callable[[Arrays], Arrays]:
    def fail(_: Arrays) -> Arrays:
        raise error

    return fail


def seen(request: pb_utils.InferenceRequest) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        tensor.name(): (tensor.as_numpy().shape, str(tensor.as_numpy().dtype))
        for tensor in request.inputs()
    }


def test_the_text_encoder_gets_token_ids(networks: TritonNetworks, server: pb_utils.Server) -> None:
    server.models["text_encoder"] = lambda inputs: {
        "last_hidden_state": inputs["input_ids"][:, :, None].astype(np.float32)
    }
    ids = np.arange(2 * 77, dtype=np.int64).reshape(2, 77)
    conditioning = networks.encode(ids, 0)

    (request,) = server.requests
    assert request.requested_output_names() == ["last_hidden_state"]
    assert seen(request) == {"input_ids": ((2, 77), "int64")}
    assert list(conditioning) == ["encoder_hidden_states"]
    assert np.array_equal(conditioning["encoder_hidden_states"][:, :, 0], ids)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_skipped_layer_is_counted_from_the_last(
    networks: TritonNetworks, server: pb_utils.Server, clip_skip: int
) -> None:
    layers = np.arange(4, dtype=np.float32)[:, None, None]
    server.models["text_encoder"] = lambda inputs: {
        "hidden_states": layers + 10 * inputs["input_ids"][:, None, :, None].astype(np.float32)
    }
    ids = np.arange(2 * 77, dtype=np.int64).reshape(2, 77)
    conditioning = networks.encode(ids, clip_skip)

    (request,) = server.requests
    assert request.requested_output_names() == ["hidden_states"]
    assert seen(request) == {"input_ids": ((2, 77), "int64")}
    expected = (3 - clip_skip) + 10 * ids[:, :, None]
    assert np.array_equal(conditioning["encoder_hidden_states"], expected)


def test_the_unet_takes_hidden_states_of_any_length(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["unet"] = lambda inputs: {"out_sample": inputs["sample"]}
    hidden = np.zeros((1, 924, 6), np.float32)
    latents = np.zeros((1, 4, 8, 8), np.float32)
    networks.denoise(latents, np.zeros(1, np.float32), {"encoder_hidden_states": hidden})

    (request,) = server.requests
    assert seen(request)["encoder_hidden_states"] == ((1, 924, 6), "float32")


def test_the_unet_gets_a_timestep_a_row_with_a_dimension_of_its_own(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["unet"] = lambda inputs: {
        "out_sample": inputs["sample"] + inputs["timestep"][:, :, None, None]
    }
    sample = np.zeros((3, 4, 8, 16), np.float32)
    timestep = np.array([1, 500, 999], np.float32)
    hidden = np.zeros((3, 77, 6), np.float32)
    output = networks.denoise(sample, timestep, {"encoder_hidden_states": hidden})

    (request,) = server.requests
    assert request.requested_output_names() == ["out_sample"]
    assert seen(request) == {
        "sample": ((3, 4, 8, 16), "float32"),
        "timestep": ((3, 1), "float32"),
        "encoder_hidden_states": ((3, 77, 6), "float32"),
    }
    assert output.shape == sample.shape
    assert output[:, 0, 0, 0].tolist() == [1, 500, 999]


def test_the_vae_decoder_gets_latents(networks: TritonNetworks, server: pb_utils.Server) -> None:
    server.models["vae_decoder"] = lambda inputs: {
        "sample": inputs["latent_sample"][:, :3].repeat(8, 2).repeat(8, 3)
    }
    pixels = networks.decode(np.ones((1, 4, 8, 16), np.float32))

    (request,) = server.requests
    assert request.requested_output_names() == ["sample"]
    assert seen(request) == {"latent_sample": ((1, 4, 8, 16), "float32")}
    assert pixels.shape == (1, 3, 64, 128)


def test_views_that_are_not_contiguous_are_sent_right(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.models["vae_decoder"] = lambda inputs: {"sample": inputs["latent_sample"]}
    latents = np.arange(2 * 4 * 3 * 5, dtype=np.float32).reshape(2, 4, 3, 5).transpose(0, 1, 3, 2)

    assert np.array_equal(networks.decode(latents), latents)


def call_each(networks: TritonNetworks) -> dict[str, Callable[[], object]]:
    latents = np.zeros((1, 4, 8, 8), np.float32)
    return {
        "text_encoder": lambda: networks.encode(np.zeros((1, 77), np.int64), 0),
        "unet": lambda: networks.denoise(latents, np.zeros(1, np.float32), {}),
        "vae_decoder": lambda: networks.decode(latents),
    }


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("error", [RuntimeError, pb_utils.TritonModelException])
def test_a_failure_names_the_network_in_whichever_form_it_comes(
    networks: TritonNetworks, server: pb_utils.Server, name: str, error: type[Exception]
) -> None:
    server.models[name] = fail_with(error("out of memory"))

    with pytest.raises(NetworkFailed, match=f"^{name} failed: out of memory$") as caught:
        call_each(networks)[name]()
    assert caught.value.network == name


@pytest.mark.parametrize(
    ("message", "is_final"), [("Server not ready", True), ("Model 'unet' is not ready", False)]
)
def test_only_a_server_that_stops_makes_a_failure_final(
    networks: TritonNetworks, server: pb_utils.Server, message: str, *, is_final: bool
) -> None:
    server.models["vae_decoder"] = fail_with(pb_utils.TritonModelException(message))

    with pytest.raises(NetworkFailed, match=message) as caught:
        networks.decode(np.zeros((1, 4, 2, 2), np.float32))
    assert caught.value.is_final is is_final


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_gone_is_named(
    networks: TritonNetworks, server: pb_utils.Server, name: str
) -> None:
    del server.models[name]

    with pytest.raises(NetworkFailed, match=f"^{name} failed: .* Model '{name}' is not ready"):
        call_each(networks)[name]()


def test_ready_networks_are_not_waited_for(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    networks.wait_until_ready(0.0, lambda: False)

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
    networks.wait_until_ready(FOREVER_S, lambda: False)

    assert (model is None) == (name == CALLER)
    assert server.questions.count(name) == 3


def test_a_server_that_is_starting_is_waited_for(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.is_starting = True

    def start_at_the_third_question(_: str) -> None:
        server.is_starting = len(server.questions) < 3

    server.on_question = start_at_the_third_question
    networks.wait_until_ready(FOREVER_S, lambda: False)

    assert not server.is_starting


@pytest.mark.parametrize("name", [*NETWORKS, CALLER])
def test_what_never_comes_is_given_up_by_name(
    networks: TritonNetworks, server: pb_utils.Server, name: str
) -> None:
    server.models.pop(name, None)
    server.loaded.discard(name)

    with pytest.raises(NetworkFailed, match=rf"^{name} failed: not ready within 0.1 s"):
        networks.wait_until_ready(0.1, lambda: False)


def test_a_server_that_never_starts_is_given_up(
    networks: TritonNetworks, server: pb_utils.Server
) -> None:
    server.is_starting = True

    with pytest.raises(NetworkFailed, match="failed: not ready within 0 s"):
        networks.wait_until_ready(0.0, lambda: False)
