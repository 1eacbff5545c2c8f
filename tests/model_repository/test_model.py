"""Triton's face of the engine: requests in, one answer each out, whatever happens between."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from engine_harness import WAIT_S, Harness
from fake_networks import FakeNetworks
from PIL import Image

import darkroom_wire as wire
from darkroom_engine import METRICS, EngineConfig, Manifest, NetworkFailed

OUTPUTS = {
    "text_encoder": ("last_hidden_state", "hidden_states"),
    "unet": ("out_sample",),
    "vae_decoder": ("sample",),
    "vae_encoder": ("latent_parameters",),
}
Arrays = dict[str, np.ndarray]


class Face:
    """The model, its networks, and a few words to talk with it."""

    def __init__(self, model: Any, networks: FakeNetworks) -> None:
        self.model = model
        self.networks = networks

    def send(self, prompt: str | None = "a cat", **fields: Any) -> pb_utils.ResponseSender:
        request = make_request(prompt, **fields)
        assert self.model.execute([request]) is None
        return request.sender

    def ask(self, prompt: str | None = "a cat", **fields: Any) -> pb_utils.InferenceResponse:
        return self.send(prompt, **fields).response(WAIT_S)

    def hold(self, **fields: Any) -> pb_utils.ResponseSender:
        """A request that stays in its first step until the gate opens."""
        self.ask()
        self.networks.is_entered.clear()
        self.networks.gate.clear()
        sender = self.send("held", **fields)
        assert self.networks.is_entered.wait(WAIT_S)
        return sender


DTYPES = {"seed": np.int64, "guidance_scale": np.float32, "strength": np.float32}


def make_request(prompt: str | None = "a cat", **fields: Any) -> pb_utils.InferenceRequest:
    tensors = []
    for name, value in {"prompt": prompt, **fields}.items():
        if value is None:
            continue
        if isinstance(value, np.ndarray):
            array = value
        elif isinstance(value, str | bytes):
            raw = value.encode() if isinstance(value, str) else value
            array = np.array([raw], np.object_)
        else:
            array = np.array([value], DTYPES.get(name, np.int32))
        tensors.append(pb_utils.Tensor(name, array))
    return pb_utils.InferenceRequest(inputs=tensors)


def arrays_of(response: pb_utils.InferenceResponse) -> Arrays:
    assert not response.has_error(), response.error().message()
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def error_of(response: pb_utils.InferenceResponse) -> tuple[int, str]:
    assert response.has_error()
    assert response.output_tensors() == []
    return response.error().code(), response.error().message()


@pytest.fixture
def served(repository: Path) -> Path:
    (repository / "stable_diffusion").mkdir()
    return repository


@pytest.fixture
def networks(server: pb_utils.Server) -> FakeNetworks:
    """Formulas behind the names of the networks."""
    fake = FakeNetworks()
    server.models |= {name: behind_triton(fake, name) for name in OUTPUTS}
    server.loaded.add("stable_diffusion")
    return fake


def behind_triton(fake: FakeNetworks, network: str) -> Callable[[Arrays], Arrays]:
    def run(inputs: Arrays) -> Arrays:
        # Triton has numbers in a dimension of their own.
        flat = {name: it[:, 0] if name == "timestep" else it for name, it in inputs.items()}
        return dict(zip(OUTPUTS[network], fake.run(network, flat, OUTPUTS[network]), strict=True))

    return run


@pytest.fixture
def arguments(
    served: Path, engine_config: Any, as_triton_tells_it: Callable[[Any], str]
) -> Callable[..., dict[str, str]]:
    """What Triton hands to `initialize`, with some parameters of the config changed."""

    def make(model: str = "stable_diffusion", **parameters: object) -> dict[str, str]:
        config = type(engine_config)()
        config.CopyFrom(engine_config)
        for key, value in parameters.items():
            config.parameters[key].string_value = str(value)
        return {
            "model_config": as_triton_tells_it(config),
            "model_name": model,
            "model_repository": str(served / model),
            "model_version": "1",
        }

    return make


@pytest.fixture(autouse=True)
def runtime_dir(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.RUNTIME_DIR, str(short_path / "runtime"))


@pytest.fixture
def make_face(
    load_model: Callable[[str], ModuleType],
    arguments: Callable[..., dict[str, str]],
    networks: FakeNetworks,
) -> Iterator[Callable[..., Face]]:
    models = []

    def make(model_name: str = "stable_diffusion", **parameters: object) -> Face:
        model = load_model("stable_diffusion").TritonPythonModel()
        model.initialize(arguments(model_name, **parameters))
        models.append(model)
        return Face(model, networks)

    yield make
    networks.gate.set()
    for model in models:
        model.finalize()


@pytest.fixture
def face(make_face: Callable[..., Face]) -> Face:
    return make_face()


def test_a_request_is_answered_with_picture_seed_and_info(face: Face) -> None:
    arrays = arrays_of(face.ask(seed=7, num_inference_steps=4, width=64, height=32))

    assert {name: array.shape for name, array in arrays.items()} == {
        "image": (1,),
        "seed": (1,),
        "info": (1,),
    }
    assert (arrays["seed"].dtype, arrays["seed"][0]) == (np.int64, 7)
    with Image.open(BytesIO(arrays["image"][0])) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 32))
    info = json.loads(arrays["info"][0])
    assert (info["model"], info["num_inference_steps"], info["notes"]) == ("fake", 4, [])
    assert set(info["timings"]) == {"queue_ms", "denoise_ms", "decode_ms", "total_ms"}


def test_the_picture_is_the_engines_own(face: Face, served: Path) -> None:
    fields = {"seed": 7, "num_inference_steps": 6, "negative_prompt": "a dog"}
    harness = Harness(Manifest.load(served / "manifest.json"), FakeNetworks(), EngineConfig())
    harness.engine.start()
    expected = harness.picture("ein Bär ☃", **fields)
    harness.engine.close()

    assert arrays_of(face.ask("ein Bär ☃", **fields))["image"][0] == expected


def test_several_pictures_have_consecutive_seeds(face: Face) -> None:
    arrays = arrays_of(face.ask(seed=7, num_images_per_prompt=3))
    alone = arrays_of(face.ask(seed=9))

    assert arrays["seed"].tolist() == [7, 8, 9]
    assert len(set(arrays["image"])) == 3
    assert arrays["image"][2] == alone["image"][0]


def test_a_seed_is_drawn_if_none_is_sent(face: Face) -> None:
    seeds = {int(arrays_of(face.ask(num_inference_steps=1))["seed"][0]) for _ in range(3)}

    assert len(seeds) > 1


def test_requests_of_one_call_are_answered_each(face: Face) -> None:
    requests = [make_request(seed=seed) for seed in (1, 2)] + [make_request(width=33)]
    assert face.model.execute(requests) is None
    first, second, failed = [request.sender.response(WAIT_S) for request in requests]

    assert arrays_of(first)["seed"].tolist() == [1]
    assert arrays_of(second)["seed"].tolist() == [2]
    assert error_of(failed)[0] == pb_utils.TritonError.INVALID_ARG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt: missing; an empty text is allowed"),
        ({"width": 33}, "width: 33 is out of range|width: 33 is not a multiple of 16"),
        ({"seed": -1}, "seed: -1 is out of range, allowed are 0 to"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is out of range"),
        ({"negative_prompt": b"\xff"}, "negative_prompt: not UTF-8 text"),
        ({"sampler": "magic"}, "sampler: 'magic' does not exist, there are unipc"),
        ({"image": b"no picture"}, "image: 10 bytes that are no readable picture"),
        ({"seed": np.array([1, 2], np.int64)}, r"seed: shape \[2\] is not \[1\]"),
        ({"seed": np.zeros((0,), np.int64)}, r"seed: shape \[0\] is not \[1\]"),
        ({"width": np.zeros((2, 3), np.int32)}, r"width: shape \[2, 3\] is not \[1\]"),
        ({"prompt": np.array([b"a", b"b"], np.object_)}, r"prompt: shape \[2\] is not \[1\]"),
    ],
)
def test_a_bad_field_is_an_invalid_argument(
    face: Face, fields: dict[str, Any], message: str
) -> None:
    code, text = error_of(face.ask(**fields))

    assert code == pb_utils.TritonError.INVALID_ARG
    assert re.match(message, text)


def test_an_id_that_is_no_text_is_refused(face: Face) -> None:
    request = make_request()
    request._request_id = "\xff"
    face.model.execute([request])

    assert error_of(request.sender.response(WAIT_S)) == (
        pb_utils.TritonError.INVALID_ARG,
        "id: not UTF-8 text",
    )


def test_fields_of_several_values_reach_the_engine(face: Face) -> None:
    names = np.array([b"canny", b"depth"], np.object_)
    code, text = error_of(face.ask(controlnet=names))

    assert code == pb_utils.TritonError.INVALID_ARG
    assert text.startswith("controlnet: 'canny' does not exist")


def test_one_of_several_models_has_networks_and_a_manifest_elsewhere(
    make_face: Callable[..., Face],
    server: pb_utils.Server,
    served: Path,
    tmp_path: Path,
) -> None:
    server.models = {f"sdxl_{name}": network for name, network in server.models.items()}
    server.loaded = {"sdxl"}
    elsewhere = served.rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    face = make_face("sdxl", network_prefix="sdxl_", manifest=elsewhere / "manifest.json")

    assert arrays_of(face.ask(seed=3))["seed"].tolist() == [3]
    assert {request.model_name() for request in server.requests} == set(server.models)
    assert wire.socket_path("sdxl").exists()


def test_a_warm_engine_says_what_may_be_asked_of_it_until_it_ends(face: Face) -> None:
    face.ask()
    path = wire.description_path("stable_diffusion")
    description = json.loads(path.read_text())

    assert (description["name"], description["family"]) == ("fake", "sd1")
    face.model.finalize()
    assert not path.exists()


def test_a_full_queue_is_unavailable_at_once(make_face: Callable[..., Face]) -> None:
    face = make_face(max_rows=2, max_queue_size=1)
    face.hold()
    face.send()
    code, text = error_of(face.ask())

    assert code == pb_utils.TritonError.UNAVAILABLE
    assert re.fullmatch(
        r"the queue is full: 1 pictures are waiting, 1 may wait; retry_after_ms: \d+", text
    )


def test_a_deadline_that_passed_is_cancelled_and_says_so(face: Face) -> None:
    face.hold()
    sender = face.send(timeout_ms=200)

    # Although the step that is under way does not end.
    assert error_of(sender.response(WAIT_S)) == (
        pb_utils.TritonError.CANCELLED,
        "timeout_ms: 200 ran out",
    )


def test_a_deadline_that_cannot_be_kept_is_unavailable(face: Face) -> None:
    face.hold(num_inference_steps=60)
    code, text = error_of(face.ask(num_inference_steps=60, timeout_ms=1))

    assert code == pb_utils.TritonError.UNAVAILABLE
    assert re.fullmatch(
        r"timeout_ms: 1 cannot be kept, about \d+ ms of work are ahead; retry_after_ms: \d+", text
    )


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder"])
def test_a_failed_network_is_internal_and_the_next_request_is_served(
    face: Face, network: str
) -> None:
    expected = arrays_of(face.ask("fine", seed=1))["image"][0]
    face.networks.fail_always[network] = RuntimeError("out of memory")
    answer = face.ask("unlucky")
    face.networks.fail_always.clear()

    assert error_of(answer) == (
        pb_utils.TritonError.INTERNAL,
        f"{network} failed: out of memory",
    )
    assert arrays_of(face.ask("fine", seed=1))["image"][0] == expected


def test_a_network_that_went_away_is_internal(
    make_face: Callable[..., Face], server: pb_utils.Server
) -> None:
    face = make_face(heal_timeout_s=0)
    face.ask()
    del server.models["unet"]
    code, text = error_of(face.ask())

    assert code == pb_utils.TritonError.INTERNAL
    assert "Model 'unet' is not ready" in text


def test_networks_that_fail_in_the_warm_up_are_internal_for_every_request(
    make_face: Callable[..., Face], networks: FakeNetworks
) -> None:
    networks.fail_next["vae_decoder"] = NetworkFailed("vae_decoder", "no such file")
    face = make_face()

    for _ in range(2):
        code, text = error_of(face.ask())
        assert code == pb_utils.TritonError.INTERNAL
        assert "vae_decoder failed: no such file" in text


def test_requests_before_the_server_is_up_wait_for_it(
    make_face: Callable[..., Face], server: pb_utils.Server
) -> None:
    server.is_starting = True
    face = make_face()
    sender = face.send(seed=7)
    server.is_starting = False

    assert arrays_of(sender.response(WAIT_S))["seed"].tolist() == [7]


def test_a_client_that_leaves_is_noticed_while_the_engine_works(face: Face) -> None:
    sender = face.hold(num_inference_steps=60)
    neighbour = face.send("neighbour", seed=1)
    sender.client_has_left = True
    code, _ = error_of(sender.response(WAIT_S))
    face.networks.gate.set()

    assert code == pb_utils.TritonError.CANCELLED
    assert arrays_of(neighbour.response(WAIT_S))["seed"].tolist() == [1]


def test_a_client_that_left_frees_its_rows(make_face: Callable[..., Face]) -> None:
    face = make_face(max_rows=2)
    sender = face.hold(num_inference_steps=60)
    waiting = face.send("next", seed=1, num_inference_steps=3)
    sender.client_has_left = True
    sender.response(WAIT_S)
    face.networks.step_rows.clear()
    face.networks.gate.set()
    waiting.response(WAIT_S)

    # The step that was running when the client left, and those of the next request.
    assert len(face.networks.step_rows) <= 1 + 3


def test_a_client_that_leaves_the_queue_is_noticed(make_face: Callable[..., Face]) -> None:
    face = make_face(max_rows=2)
    face.hold()
    waiting = face.send()
    waiting.client_has_left = True

    assert error_of(waiting.response(WAIT_S))[0] == pb_utils.TritonError.CANCELLED


def test_an_answered_request_is_not_asked_about_any_more(face: Face) -> None:
    answered = face.send()
    answered.response(WAIT_S)
    held = face.hold()
    # Two questions about the held one: a whole round of the watcher lies between.
    for _ in range(2):
        held.is_asked.clear()
        assert held.is_asked.wait(WAIT_S)
    answered.is_asked.clear()
    held.is_asked.clear()

    assert held.is_asked.wait(WAIT_S)
    assert not answered.is_asked.is_set()


def test_an_answered_request_is_never_asked_about(face: Face, server: pb_utils.Server) -> None:
    """The watcher looks at these while their answers are being sent."""
    for _ in range(10):
        senders = [face.send(seed=n, num_inference_steps=n + 1) for n in range(8)]
        for sender in senders:
            sender.response(WAIT_S)

    assert server.num_crashes == 0


def test_the_engines_metrics_are_handed_to_triton(
    make_face: Callable[..., Face],
    load_model: Callable[[str], ModuleType],
    server: pb_utils.Server,
) -> None:
    publisher = load_model("darkroom").TritonPythonModel()
    publisher.initialize({})
    face = make_face()
    face.ask(num_inference_steps=3, guidance_scale=5.0)
    face.ask(width=33)
    face.model.finalize()
    # The end of an engine comes after all that it told.
    while publisher._publisher._engines:
        threading.Event().wait(0.01)
    publisher.finalize()
    seen = {name: family.series for name, family in server.families.items()}

    model = ("model", "stable_diffusion")
    assert set(seen) <= {metric.name for metric in METRICS}
    outcomes = seen["darkroom_requests_total"]
    assert outcomes[model, ("outcome", "image")].values == [1]
    assert outcomes[model, ("outcome", "invalid")].values == [1]
    assert seen["darkroom_images_total"][model,].values == [1]
    assert seen["darkroom_batch_rows"][model,].values == [2, 2, 2]
    assert len(seen["darkroom_step_duration_seconds"][model, ("rows", "2")].values) == 3
    assert len(seen["darkroom_queue_wait_seconds"][model,].values) == 1
    assert len(seen["darkroom_decode_duration_seconds"][model,].values) == 1
    assert seen["darkroom_max_rows"][model,].values == [16]
    assert seen["darkroom_waiting_pictures"][model,].values[-1] == 0
    assert seen["darkroom_running_pictures"][model,].values[-1] == 0
    lookups = seen["darkroom_prompt_cache_lookups_total"]
    # The empty negative prompt is there from the warm-up on.
    assert lookups[model, ("result", "hit")].values == [1]
    assert lookups[model, ("result", "miss")].values == [1]


def test_finalize_answers_what_is_left(make_face: Callable[..., Face]) -> None:
    face = make_face(max_rows=2)
    running = face.hold(num_inference_steps=60)
    waiting = face.send()
    closing = threading.Thread(target=face.model.finalize)
    closing.start()
    # The engine is in a step, which it ends before it stops.
    face.networks.gate.set()
    closing.join(WAIT_S)

    assert not closing.is_alive()
    for sender in (running, waiting):
        code, text = error_of(sender.response(WAIT_S))
        assert (code, text) == (pb_utils.TritonError.INTERNAL, "the engine is stopping")


def test_after_finalize_requests_are_refused(face: Face) -> None:
    face.ask()
    face.model.finalize()

    assert error_of(face.ask()) == (pb_utils.TritonError.INTERNAL, "the engine is stopping")


def test_an_idle_model_finalizes_at_once(face: Face) -> None:
    def count_threads() -> Counter[str]:
        # Of all engines in this process: other tests have theirs.
        return Counter(thread.name for thread in threading.enumerate())

    face.ask()
    before = count_threads()
    face.model.finalize()

    gone = before - count_threads()
    assert {"engine", "watcher", "reporter", "developer", "door", "metrics"} <= gone.keys()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_rows": 1}, "max_rows: 1 is outside 2 to 1024"),
        ({"max_rows": "many"}, "max_rows: 'many' is not a whole number"),
        ({"max_row": 2}, "max_row: no such engine parameter"),
        ({"max_rows": 64}, "max_rows: 64 is above the 63 that the unet takes"),
    ],
)
@pytest.mark.usefixtures("networks")
def test_a_bad_parameter_stops_the_start(
    load_model: Callable[[str], ModuleType],
    arguments: Callable[..., dict[str, str]],
    parameters: dict[str, object],
    message: str,
) -> None:
    model = load_model("stable_diffusion").TritonPythonModel()

    with pytest.raises(ValueError, match=f"^{message}"):
        model.initialize(arguments(**parameters))


@pytest.mark.usefixtures("networks")
def test_a_missing_manifest_stops_the_start(
    load_model: Callable[[str], ModuleType], arguments: Callable[..., dict[str, str]], served: Path
) -> None:
    (served / "manifest.json").unlink()
    module = load_model("stable_diffusion")

    with pytest.raises(Exception, match=r"manifest\.json is missing: this is no exported"):
        module.TritonPythonModel().initialize(arguments())


# Networks of PyTorch's.


@pytest.fixture
def programs(served: Path) -> Path:
    """The repository with programs of the same formulas, which its manifest says are PyTorch's."""
    pytest.importorskip("torch")
    from torch_formulas import write_formulas

    write_formulas(served)
    path = served / "manifest.json"
    document = json.loads(path.read_text())
    for record in document["networks"].values():
        record["backend"] = "torch"
    path.write_text(json.dumps(document))
    return served


@pytest.mark.torch
def test_networks_of_pytorch_run_in_this_process(
    programs: Path, make_face: Callable[..., Face], server: pb_utils.Server
) -> None:
    # None of them is a model of Triton's.
    server.models.clear()
    fields = {"seed": 7, "num_inference_steps": 6}
    harness = Harness(Manifest.load(programs / "manifest.json"), FakeNetworks(), EngineConfig())
    harness.engine.start()
    expected = Image.open(BytesIO(harness.picture(**fields)))
    harness.engine.close()

    encoded = arrays_of(make_face(device="cpu").ask(**fields))["image"][0]

    difference = np.asarray(Image.open(BytesIO(encoded)), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1
    assert server.requests == []


@pytest.mark.torch
@pytest.mark.usefixtures("programs")
def test_networks_of_pytorch_are_models_of_tritons_if_that_is_asked_for(
    make_face: Callable[..., Face], server: pb_utils.Server
) -> None:
    face = make_face(in_process=0)

    arrays_of(face.ask(num_inference_steps=2))

    assert {request.model_name() for request in server.requests} >= {"text_encoder", "unet"}


@pytest.mark.torch
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"memory_profile": "low"},
            "memory_profile: 'low' is for networks that are Triton's model",
        ),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there, PyTorch sees"),
        ({"in_process": 0, "device": "cpu"}, "device: cpu is for networks in the engine's process"),
    ],
)
def test_a_setting_that_is_not_for_these_networks_stops_the_start(
    make_face: Callable[..., Face], parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_face(**parameters)
