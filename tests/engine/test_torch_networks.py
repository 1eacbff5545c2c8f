"""Networks that PyTorch runs in the engine's process, and the arrays that go with them."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import Harness
from fake_networks import FakeNetworks
from PIL import Image

from darkroom_engine import EngineConfig, Manifest, NetworkFailed
from darkroom_engine.arrays import HOST
from darkroom_settings import TorchSettings

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from torch_formulas import write_formulas  # noqa: E402  they need PyTorch

from darkroom_engine.torch_networks import (  # noqa: E402
    TorchArrays,
    TorchNetworks,
    failure_of,
)

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ),
]


@pytest.fixture(scope="session")
def formulas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of `FakeNetworks`."""
    folder = tmp_path_factory.mktemp("formulas")
    write_formulas(folder)
    return folder


@pytest.fixture
def torch_manifest(manifest: Manifest, formulas: Path) -> Manifest:
    """Its tokenizer lies elsewhere than its networks."""
    for network in manifest.networks:
        (manifest.directory / network).symlink_to(formulas / network)
    return manifest


def never() -> bool:
    return False


@pytest.fixture
def networks(torch_manifest: Manifest) -> TorchNetworks:
    made = TorchNetworks(torch_manifest, CPU, TorchSettings())
    made.wait_until_ready(list(torch_manifest.networks), 60, never)
    return made


# Arrays.


@pytest.fixture(params=DEVICES)
def arrays(request: pytest.FixtureRequest) -> TorchArrays:
    return TorchArrays(torch.device(request.param))


NUMBERS = np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)


@pytest.mark.parametrize(
    "operation",
    [
        lambda arrays, it: arrays.stack([it[0], it[2]]),
        lambda arrays, it: arrays.concatenate([it, it], axis=0),
        lambda arrays, it: arrays.concatenate([it, it[:, :2]], axis=1),
        lambda arrays, it: arrays.copy(it[1:]),
        lambda arrays, it: arrays.zeros((2, 3)) + it[0, 0, 0],
        lambda arrays, it: arrays.std(it),
        lambda arrays, it: arrays.finite_rows(it),
        lambda _, it: it @ it.reshape(3, 5, 4),
        lambda _, it: it[:, 1] * 2 - it[:, 0],
    ],
    ids=[
        *("stack", "concatenate", "along another axis", "copy", "zeros", "std", "finite", "matmul"),
        "arithmetic",
    ],
)
def test_operations_mean_the_same_as_on_the_host(arrays: TorchArrays, operation: Any) -> None:
    made = arrays.to_host(operation(arrays, arrays.from_host(NUMBERS)))

    expected = np.asarray(operation(HOST, NUMBERS))
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    assert made.dtype == expected.dtype


def test_rows_with_numbers_that_are_not_finite_are_found(arrays: TorchArrays) -> None:
    numbers = NUMBERS.copy()
    numbers[0, 3, 4], numbers[2, 0, 0] = np.nan, np.inf

    assert arrays.to_host(arrays.finite_rows(arrays.from_host(numbers))).tolist() == [
        *(False, True, False)
    ]


def test_what_is_fetched_is_as_it_was_then(arrays: TorchArrays) -> None:
    array = arrays.copy(arrays.from_host(NUMBERS))

    fetched = arrays.fetch(array)
    array[:] = 0

    assert fetched().tolist() == NUMBERS.tolist()
    assert fetched().tolist() == NUMBERS.tolist()


def test_other_types_and_arrays_that_must_not_be_written_to_are_taken(arrays: TorchArrays) -> None:
    numbers = np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1]
    numbers.flags.writeable = False

    made = arrays.to_host(arrays.from_host(numbers))

    assert made.dtype == np.int64
    assert made.tolist() == numbers.tolist()


def test_only_a_gpu_computes_steps_beside() -> None:
    assert TorchArrays(CPU).max_steps_ahead == 0
    assert TorchArrays(torch.device("cuda:0")).max_steps_ahead == 1


# Networks.


def test_numpy_is_answered_with_numpy_and_tensors_with_tensors(networks: TorchNetworks) -> None:
    latents = np.ones((2, 4, 4, 6), np.float32)

    (pixels,) = networks.run("vae_decoder", {"latent_sample": latents}, ["sample"])
    (tensor,) = networks.run(
        "vae_decoder", {"latent_sample": torch.from_numpy(latents)}, ["sample"]
    )

    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (2, 3, 32, 48)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.numpy().tolist() == pixels.tolist()


def test_on_the_cpu_no_sizes_are_prepared(networks: TorchNetworks) -> None:
    assert networks.prepared_rows == ()
    assert networks.available_bytes() > 0


def test_a_compiler_is_to_see_one_row_and_two(torch_manifest: Manifest) -> None:
    assert TorchNetworks(torch_manifest, CPU, TorchSettings(compile=1)).prepared_rows == (1, 2)


def test_recorded_calls_are_prepared_for_each_bucket(torch_manifest: Manifest) -> None:
    settings = TorchSettings(row_buckets=(2, 63))

    # Nothing is done on the device before it is used.
    networks = TorchNetworks(torch_manifest, torch.device("cuda:0"), settings)

    assert networks.prepared_rows == (2, 63)


def test_a_bucket_above_what_the_denoiser_takes_is_refused(torch_manifest: Manifest) -> None:
    settings = TorchSettings(row_buckets=(2, 64))

    with pytest.raises(ValueError, match="row_buckets: 64 is above the 63 that the unet takes"):
        TorchNetworks(torch_manifest, torch.device("cuda:0"), settings)


def test_the_settings_name_the_device(torch_manifest: Manifest) -> None:
    networks = TorchNetworks.on(torch_manifest, TorchSettings(device="cpu"), number=3)

    assert networks.arrays.max_steps_ahead == 0
    with pytest.raises(ValueError, match=r"device: 'cuda:99' is not there"):
        TorchNetworks.on(torch_manifest, TorchSettings(device="cuda:99"))


def test_a_network_that_is_not_loaded_fails_by_name(torch_manifest: Manifest) -> None:
    networks = TorchNetworks(torch_manifest, CPU, TorchSettings())

    with pytest.raises(NetworkFailed, match="unet failed: is not loaded"):
        networks.run("unet", {}, ["out_sample"])


def test_a_program_that_cannot_be_loaded_fails_by_name(torch_manifest: Manifest) -> None:
    networks = TorchNetworks(
        replace(torch_manifest, directory=Path("/nowhere")), CPU, TorchSettings()
    )

    with pytest.raises(NetworkFailed, match=r"unet failed: .*model\.pt2 is missing"):
        networks.wait_until_ready(["unet"], 60, never)


@pytest.mark.parametrize("is_given_up", [True, False], ids=["given up", "too late"])
def test_waiting_for_a_load_ends_before_it(torch_manifest: Manifest, is_given_up: bool) -> None:
    gate = threading.Event()

    class Slow(TorchNetworks):
        def _load(self, network: str) -> Any:
            gate.wait()
            return super()._load(network)

    networks = Slow(torch_manifest, CPU, TorchSettings())
    try:
        with pytest.raises(NetworkFailed, match="unet failed: not loaded within"):
            networks.wait_until_ready(["unet"], 60 if is_given_up else 0, lambda: is_given_up)
    finally:
        gate.set()


def test_a_call_that_does_not_fit_fails_by_name_and_the_next_one_is_answered(
    networks: TorchNetworks,
) -> None:
    latents = np.zeros((1, 4, 4, 6), np.float32)

    with pytest.raises(NetworkFailed, match="vae_decoder failed: ") as caught:
        networks.run("vae_decoder", {"latent_sample": latents[:, :3]}, ["sample"])

    assert not caught.value.is_final
    networks.run("vae_decoder", {"latent_sample": latents}, ["sample"])


ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call"


def followed(first: Exception, second: Exception) -> Exception:
    """The second, which was raised because of the first."""
    second.__context__ = first
    return second


LOST = "the GPU is lost to this process, start it anew"


@pytest.mark.parametrize(
    ("error", "is_lost", "message", "is_final"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB." + ADVICE),
            True,
            "unet failed: CUDA out of memory. Tried to allocate 2.00 GiB.",
            False,
        ),
        (
            followed(torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("broken off")),
            True,
            "unet failed: CUDA out of memory.",
            False,
        ),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure" + ADVICE),
            True,
            f"unet failed: {LOST}; CUDA error: unspecified launch failure",
            True,
        ),
        (
            RuntimeError("sizes do not match"),
            False,
            "unet failed: sizes do not match",
            False,
        ),
        (ValueError("sample: is missing"), True, "unet failed: sample: is missing", False),
        (RuntimeError(), False, "unet failed: RuntimeError()", False),
    ],
    ids=["memory", "memory, while recording", "lost", "shape", "missing", "silent"],
)
def test_errors_of_pytorch_name_the_network(
    error: Exception, is_lost: bool, message: str, is_final: bool
) -> None:
    failure = failure_of("unet", error, lambda: is_lost)

    assert str(failure) == message
    assert failure.is_final is is_final


# An engine over them.


@pytest.fixture
def make_harness(manifest: Manifest) -> Iterator[Callable[..., Harness]]:
    started = []

    def make(networks: Any) -> Harness:
        harness = Harness(manifest, networks, EngineConfig(max_rows=8))
        harness.engine.start()
        started.append(harness)
        return harness

    yield make
    for harness in started:
        harness.engine.close()


def test_an_engine_makes_the_same_pictures_as_over_numpy(
    torch_manifest: Manifest, make_harness: Callable[..., Harness]
) -> None:
    canvas = BytesIO()
    colours = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    Image.fromarray(colours).save(canvas, "PNG")
    requests: list[dict[str, Any]] = [
        {"num_inference_steps": 5, "guidance_scale": 4.0},
        {"num_inference_steps": 3, "guidance_scale": 0.0, "seed": 1},
        {"num_inference_steps": 4, "guidance_scale": 6.0, "guidance_rescale": 0.5, "seed": 2},
        {"num_inference_steps": 6, "image": canvas.getvalue(), "strength": 0.6, "seed": 3},
        {"num_inference_steps": 4, "sampler": "euler_ancestral", "width": 32, "seed": 4},
    ]

    def pictures(networks: Any) -> list[np.ndarray]:
        harness = make_harness(networks)
        # All together, so that different requests share steps.
        futures = [harness.ask(prompt="a cat", **request) for request in requests]
        return [
            np.asarray(Image.open(BytesIO(future.result(60).pictures[0])), int)
            for future in futures
        ]

    made = pictures(TorchNetworks(torch_manifest, CPU, TorchSettings()))

    for picture, expected in zip(made, pictures(FakeNetworks()), strict=True):
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).max() <= 1


def test_an_engine_that_is_closed_does_not_wait_for_a_load(
    torch_manifest: Manifest, make_harness: Callable[..., Harness]
) -> None:
    gate, is_loading = threading.Event(), threading.Event()

    class Slow(TorchNetworks):
        def _load(self, network: str) -> Any:
            is_loading.set()
            gate.wait()
            return super()._load(network)

    harness = make_harness(Slow(torch_manifest, CPU, TorchSettings()))
    assert is_loading.wait(30)
    try:
        # It would never return.
        harness.engine.close()
    finally:
        gate.set()
