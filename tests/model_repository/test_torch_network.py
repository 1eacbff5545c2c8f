"""What runs a program of PyTorch, alone and as a Triton model, over small real ones."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network_calls import SAMPLE, TIMESTEP, config, request
from tritonclient.grpc import model_config_pb2

from darkroom_settings import TorchSettings

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402
from torch_programs import write_program  # noqa: E402

from darkroom_torch import (  # noqa: E402  they need PyTorch
    MAX_RECORDINGS,
    CalledAgain,
    CudaGraphs,
    TorchNetwork,
    pick_device,
    put_channels_last,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Scaled(nn.Module):
    """out_sample = sample * timestep, noise = -sample."""

    def forward(self, sample: Any, timestep: Any) -> Any:
        return sample * timestep[:, None], -sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's model folder with the program `Scaled`."""
    example = {"sample": torch.zeros(2, 3), "timestep": torch.zeros(2)}
    outputs = ["out_sample", "noise"]
    write_program(tmp_path / "unet" / "1" / "model.pt2", Scaled(), example, outputs)
    return tmp_path / "unet"


Load = Callable[..., Any]


@pytest.fixture
def load(load_network: Callable[[str], Load]) -> Load:
    """Initializes the model over a folder."""
    return load_network("torch_network")


@pytest.fixture
def model(folder: Path, load: Load) -> Any:
    """The initialized model."""
    return load(folder, config(sample=[3], timestep=[1]))


# As a Triton model.


def test_it_answers_the_outputs_of_its_config(model: Any) -> None:
    (response,) = model.execute([request(sample=SAMPLE, timestep=TIMESTEP)])

    assert not response.has_error()
    output, noise = response.output_tensors()
    assert (output.name(), noise.name()) == ("out_sample", "noise")
    assert output.as_numpy().tolist() == [[10, 20, 30], [400, 500, 600]]
    assert noise.as_numpy().tolist() == (-SAMPLE).tolist()
    assert output.as_numpy().dtype == np.float32


@pytest.mark.parametrize(
    "wanted", [("out_sample",), ("noise",), ("noise", "out_sample")], ids=",".join
)
def test_it_answers_what_is_requested_and_no_more(model: Any, wanted: tuple[str, ...]) -> None:
    (response,) = model.execute([request(*wanted, sample=SAMPLE, timestep=TIMESTEP)])

    expected = {"out_sample": [[10, 20, 30], [400, 500, 600]], "noise": (-SAMPLE).tolist()}
    answered = {out.name(): out.as_numpy().tolist() for out in response.output_tensors()}
    assert answered == {name: expected[name] for name in wanted}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sample": SAMPLE[:, :2], "timestep": TIMESTEP}, "sample"),
        ({"sample": SAMPLE, "timestep": np.zeros((3, 1), np.float32)}, "timestep: has 3 rows, sa"),
        ({"sample": SAMPLE}, "timestep: is missing"),
        (
            {"sample": SAMPLE, "timestep": TIMESTEP, "lora_scale": np.ones((2, 1), np.float32)},
            "lora_scale: has shape (2, 1), for 2 rows and 0 adapters",
        ),
    ],
    ids=["shape", "rows that do not agree", "missing", "adapters"],
)
def test_a_failure_is_an_error_of_its_request_alone(
    model: Any, arrays: dict[str, np.ndarray], message: str
) -> None:
    good = request(sample=SAMPLE, timestep=TIMESTEP)
    before, failed, after = model.execute([good, request(**arrays), good])

    assert failed.has_error()
    assert message in failed.error().message()
    assert failed.output_tensors() == []
    assert not before.has_error()
    assert not after.has_error()


def test_arrays_that_must_not_be_written_to_are_taken(model: Any) -> None:
    sample = SAMPLE.copy()
    sample.flags.writeable = False

    (response,) = model.execute([request("noise", sample=sample, timestep=TIMESTEP)])

    assert response.output_tensors()[0].as_numpy().tolist() == (-SAMPLE).tolist()


def test_a_missing_program_stops_the_start(folder: Path, load: Load) -> None:
    (folder / "1" / "model.pt2").unlink()

    with pytest.raises(FileNotFoundError, match=r"model\.pt2 is missing"):
        load(folder, config(sample=[3], timestep=[1]))


def test_several_can_be_loaded_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: network(folder, None), range(4)))

    rows = some_rows(1)
    assert len({it.run(rows, ["noise"])[0].tobytes() for it in made}) == 1


def test_a_program_that_names_no_inputs_stops_the_start(folder: Path, load: Load) -> None:
    program = torch.export.export(Scaled(), (torch.zeros(2, 3), torch.zeros(2)))
    torch.export.save(program, folder / "1" / "model.pt2")

    with pytest.raises(ValueError, match=r"model\.pt2: holds no tensors\.json"):
        load(folder, config(sample=[3], timestep=[1]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"device": "tpu"}, "device: 'tpu' is none of auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there, PyTorch sees \\d+ GPUs"),
        ({"compile": "2"}, "compile: 2 is outside 0 to 1"),
        ({"cuda_graphs": "yes"}, "cuda_graphs: 'yes' is not a whole number"),
        ({"row_buckets": "1,x"}, "row_buckets: '1,x' is not whole numbers, with commas between"),
        ({"row_buckets": "2,1"}, "row_buckets: '2,1' is not rising, or outside 1 to 1024"),
    ],
)
def test_a_bad_setting_stops_the_start(
    folder: Path, load: Load, parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, config(sample=[3], timestep=[1]), **parameters)


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert pick_device("cpu", 3) == torch.device("cpu")
    if torch.cuda.is_available():
        assert pick_device("auto", 0) == pick_device("cuda", 0) == torch.device("cuda:0")
    else:
        assert pick_device("auto", 3) == torch.device("cpu")
        with pytest.raises(ValueError, match="device: 'cuda:0' is not there, PyTorch sees 0 GPUs"):
            pick_device("cuda")


def test_without_pytorch_it_says_what_to_install() -> None:
    blocked = "import sys; sys.modules['torch'] = None; import darkroom_torch"
    command = [sys.executable, "-c", blocked]
    shared = Path(__file__).parents[2] / "model_repository" / "shared"

    done = subprocess.run(
        command, env={"PYTHONPATH": str(shared)}, capture_output=True, text=True, check=False
    )

    assert done.returncode
    assert "pip install 'torch>=2.9'" in done.stderr


# Alone, with calls that are recorded and with calls that are not.


@pytest.fixture(
    params=["straight", "recorded", pytest.param("CUDA graphs", marks=needs_gpu)],
)
def way(request: pytest.FixtureRequest) -> Any:
    """The device, and what records calls there; None if nothing does."""
    if request.param == "CUDA graphs":
        return torch.device("cuda:0"), CudaGraphs(torch.device("cuda:0"))
    return torch.device("cpu"), CalledAgain if request.param == "recorded" else None


class Recordings:
    """A recorder, and how many rows each of its recordings has."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, function: Any) -> CalledAgain:
        made = CalledAgain(function)
        self.rows.append(len(made.outputs[0]))
        return made


def network(folder: Path, recorder: Any, **options: Any) -> TorchNetwork:
    settings = TorchSettings(row_buckets=options.pop("row_buckets", (1, 2, 4)))
    path = folder / "1" / "model.pt2"
    return TorchNetwork(path, torch.device("cpu"), settings, recorder=recorder, **options)


def some_rows(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(count)
    return {
        "sample": generator.standard_normal((count, 3), np.float32),
        "timestep": generator.standard_normal(count, np.float32),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_row_comes_out_for_itself_whatever_the_bucket(
    folder: Path, way: Any, count: int
) -> None:
    device, recorder = way
    settings = TorchSettings(row_buckets=(1, 2, 4))
    made = TorchNetwork(folder / "1" / "model.pt2", device, settings, recorder=recorder)
    # What other calls leave behind must not show.
    made.run(some_rows(4), ["noise"])
    rows = some_rows(count)

    for _ in range(2):
        output, noise = made.run(rows, ["out_sample", "noise"])

        np.testing.assert_allclose(output, rows["sample"] * rows["timestep"][:, None], rtol=1e-6)
        assert noise.tolist() == (-rows["sample"]).tolist()


def test_a_call_takes_the_smallest_bucket_that_holds_its_rows(folder: Path) -> None:
    recordings = Recordings()
    made = network(folder, recordings)

    for count in (3, 1, 2, 4, 3, 5, 6, 5, 1):
        made.run(some_rows(count), ["noise"])

    assert recordings.rows == [4, 1, 2, 5, 6]


def test_the_recording_that_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    class Negated(nn.Module):
        def forward(self, sample: Any) -> Any:
            return -sample

    shapes = [{0: Dim("rows", max=63), 1: Dim("width", max=1000)}]
    path = tmp_path / "unet" / "1" / "model.pt2"
    write_program(path, Negated(), {"sample": torch.zeros(2, 3)}, ["noise"], shapes)
    recordings = Recordings()
    made = network(tmp_path / "unet", recordings)

    def call(width: int) -> None:
        sample = np.full((1, width), 2, np.float32)
        assert made.run({"sample": sample}, ["noise"])[0].tolist() == (-sample).tolist()

    for width in range(2, MAX_RECORDINGS + 2):
        call(width)
    call(2)
    assert len(recordings.rows) == MAX_RECORDINGS

    call(500)
    call(2)
    assert len(recordings.rows) == MAX_RECORDINGS + 1

    call(3)
    assert len(recordings.rows) == MAX_RECORDINGS + 2


def test_what_was_answered_stays_as_it_is(folder: Path) -> None:
    made = network(folder, CalledAgain)
    rows = {name: torch.from_numpy(array) for name, array in some_rows(2).items()}

    (first,) = made.run(rows, ["noise"])
    (second,) = made.run({**rows, "sample": rows["sample"] + 1}, ["noise"])

    assert first.tolist() == (-rows["sample"]).tolist()
    assert second.tolist() == (-rows["sample"] - 1).tolist()


def test_it_answers_in_kind(folder: Path, way: Any) -> None:
    device, recorder = way
    path = folder / "1" / "model.pt2"
    made = TorchNetwork(path, device, TorchSettings(), recorder=recorder)
    rows = some_rows(2)

    (hosted,) = made.run(rows, ["noise"])
    tensors = {name: torch.from_numpy(array).to(device) for name, array in rows.items()}
    (kept,) = made.run(tensors, ["noise"])

    assert isinstance(hosted, np.ndarray)
    assert isinstance(kept, torch.Tensor)
    assert kept.device == device
    assert not kept.requires_grad
    assert kept.cpu().numpy().tolist() == hosted.tolist()


def test_inputs_that_are_unknown_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="size: no such input; there are sample, timestep"):
        network(folder, None).run(some_rows(2) | {"size": np.ones(2, np.float32)}, ["noise"])


def test_a_compiled_program_makes_the_same(folder: Path) -> None:
    path = folder / "1" / "model.pt2"
    made = TorchNetwork(path, torch.device("cpu"), TorchSettings(compile=1), recorder=None)

    for count in (2, 5):
        rows = some_rows(count)
        (output,) = made.run(rows, ["out_sample"])
        np.testing.assert_allclose(output, rows["sample"] * rows["timestep"][:, None], rtol=1e-6)


def test_an_exported_convolution_takes_its_channels_last() -> None:
    class Convolved(nn.Module):
        """As a block of a VAE: what is normed is a view of what was convolved."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.second = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, sample: Any) -> Any:
            hidden = self.norm(self.first(sample))
            tokens = hidden.view(hidden.shape[0], 8, -1).transpose(1, 2).softmax(dim=1)
            return self.second(hidden + tokens.transpose(1, 2).reshape(hidden.shape))

    axes = [{0: Dim("rows", max=63), 2: Dim("height", max=64), 3: Dim("width", max=64)}]
    sample = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    module = torch.export.export(Convolved(), (sample,), dynamic_shapes=tuple(axes)).module()
    expected = module(sample)

    put_channels_last(module)

    weights = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    torch.testing.assert_close(module(sample), expected)


# Inputs that may be left out.

RESIDUALS = {
    "down_block_res_sample_0": {"channels": 3, "divisor": 1, "like": "sample"},
    "mid_block_res_sample": {"channels": 2, "divisor": 2, "like": "sample"},
}


class Controlled(nn.Module):
    """What it was given besides the sample, with nothing of the sample in it."""

    def forward(self, sample: Any, down: Any, middle: Any) -> Any:
        nothing = 0 * sample.sum()
        return down + nothing, middle + nothing


@pytest.fixture
def controlled(tmp_path: Path) -> Path:
    rows, height, width = (Dim(name, min=1, max=63) for name in ("rows", "height", "width"))
    example = {
        "sample": torch.zeros(3, 3, 4, 6),
        "down_block_res_sample_0": torch.zeros(3, 3, 4, 6),
        "mid_block_res_sample": torch.zeros(3, 2, 2, 3),
    }
    outer, inner = {0: rows, 2: 2 * height, 3: 2 * width}, {0: rows, 2: height, 3: width}
    outputs = [f"out_{name}" for name in RESIDUALS]
    path = tmp_path / "unet" / "1" / "model.pt2"
    write_program(path, Controlled(), example, outputs, [outer, outer, inner])
    return tmp_path / "unet"


@pytest.mark.parametrize("recorder", [None, CalledAgain], ids=["straight", "recorded"])
def test_optional_inputs_are_zeros_where_they_are_left_out(controlled: Path, recorder: Any) -> None:
    made = network(controlled, recorder, fillers=RESIDUALS)
    sample = np.ones((3, 3, 4, 6), np.float32)
    given = np.arange(36, dtype=np.float32).reshape(3, 2, 2, 3)
    outputs = [f"out_{name}" for name in RESIDUALS]

    for told in ({}, {"mid_block_res_sample": given}, {}):
        down, middle = made.run({"sample": sample, **told}, outputs)

        assert (down.shape, middle.shape) == ((3, 3, 4, 6), (3, 2, 2, 3))
        assert not down.any()
        assert middle.tolist() == (given if told else 0 * given).tolist()


def test_a_model_reads_which_inputs_are_optional(controlled: Path, load: Load) -> None:
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    for name in ("sample", *RESIDUALS):
        made.input.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[-1, -1, -1])
    for name in RESIDUALS:
        made.output.add(name=f"out_{name}", data_type=model_config_pb2.TYPE_FP32, dims=[-1])
    model = load(controlled, made, optional_inputs=json.dumps(RESIDUALS))

    good, bad = model.execute(
        [
            request(sample=np.ones((2, 3, 4, 6), np.float32)),
            request(mid_block_res_sample=np.ones((1, 2, 2, 3), np.float32)),
        ]
    )

    assert [out.as_numpy().any() for out in good.output_tensors()] == [False, False]
    assert bad.error().message() == "sample: is missing"


# Adapters.

WIDTH_IN, WIDTH_OUT = 3, 2
LAYERS = ("attn.to_q", "attn.to_k")


class Adapted(nn.Module):
    """out_sample = the sum over the layers of ((sample down^T) * scale) up^T."""

    def forward(self, sample: Any, scale: Any, *weights: Any) -> Any:
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return sum(((sample @ down.T) * scale) @ up.T for down, up in pairs)


@pytest.fixture
def adapters() -> dict[str, dict[str, np.ndarray]]:
    """By name, the weights of two adapters of ranks 2 and 1; the second leaves one layer alone."""
    rng = np.random.default_rng(0)

    def weights(rank: int, *layers: str) -> dict[str, np.ndarray]:
        made = {}
        for layer in layers:
            made[f"{layer}.down"] = rng.standard_normal((rank, WIDTH_IN), np.float32)
            made[f"{layer}.up"] = rng.standard_normal((WIDTH_OUT, rank), np.float32)
        return made

    return {"ink": weights(2, *LAYERS), "pixelart": weights(1, LAYERS[1])}


@pytest.fixture
def adapted(tmp_path: Path, adapters: dict[str, dict[str, np.ndarray]]) -> Path:
    from safetensors.numpy import save_file

    rows, rank = Dim("rows", min=1, max=63), Dim("rank", min=1, max=63)
    example = {"sample": torch.zeros(5, WIDTH_IN), "lora_scale": torch.zeros(5, 4)}
    dynamic: list[Any] = [{0: rows}, {0: rows, 1: rank}]
    for layer in LAYERS:
        example[f"{layer}.lora_down"] = torch.zeros(4, WIDTH_IN)
        example[f"{layer}.lora_up"] = torch.zeros(WIDTH_OUT, 4)
        dynamic += [{0: rank}, {1: rank}]
    folder = tmp_path / "unet"
    # Torch takes the parameter `*weights` as one tuple.
    shapes = [*dynamic[:2], tuple(dynamic[2:])]
    write_program(folder / "1" / "model.pt2", Adapted(), example, ["out_sample"], shapes)
    (folder / "1" / "adapters").mkdir()
    for name, weights in adapters.items():
        save_file(weights, folder / "1" / "adapters" / f"{name}.safetensors")
    return folder


def expected_rows(
    adapters: dict[str, dict[str, np.ndarray]], sample: np.ndarray, scales: Any
) -> np.ndarray:
    output = np.zeros((len(sample), WIDTH_OUT))
    for column, (_, weights) in enumerate(sorted(adapters.items())):
        for layer in LAYERS:
            if f"{layer}.down" in weights:
                change = weights[f"{layer}.up"] @ weights[f"{layer}.down"]
                output += np.asarray(scales)[:, column, None] * (sample @ change.T)
    return output


@pytest.mark.parametrize("recorder", [None, CalledAgain], ids=["straight", "recorded"])
def test_each_row_gets_its_own_share_of_every_adapter(
    adapted: Path, adapters: dict[str, dict[str, np.ndarray]], recorder: Any
) -> None:
    made = network(adapted, recorder, lora_names=sorted(adapters))
    mixes = [
        [(1, 0), (0, 1), (0.5, -2)],
        [(1, 0), (0.25, 0), (0, 0)],
        # Of the same rank as what was there before.
        [(0, 1), (0, 1), (0, 2)],
        [(0, 0), (0, 0), (0, 0)],
        [(1, 0), (0, 1), (0.5, -2)],
    ]
    sample = np.random.default_rng(1).standard_normal((3, WIDTH_IN), np.float32)

    for scales in mixes:
        # The scales are on the host in any case.
        inputs = {"sample": torch.from_numpy(sample), "lora_scale": np.array(scales, np.float32)}
        (output,) = made.run(inputs, ["out_sample"])

        expected = expected_rows(adapters, sample, scales)
        np.testing.assert_allclose(output.numpy(), expected, atol=1e-5)


def test_a_model_reads_the_names_of_its_adapters(
    adapted: Path, load: Load, adapters: dict[str, dict[str, np.ndarray]]
) -> None:
    made = model_config_pb2.ModelConfig(name="unet", backend="python", max_batch_size=63)
    made.input.add(name="sample", data_type=model_config_pb2.TYPE_FP32, dims=[WIDTH_IN])
    made.input.add(name="lora_scale", data_type=model_config_pb2.TYPE_FP32, dims=[-1])
    made.output.add(name="out_sample", data_type=model_config_pb2.TYPE_FP32, dims=[WIDTH_OUT])
    model = load(adapted, made, lora_names=json.dumps(sorted(adapters)))
    sample = np.ones((2, WIDTH_IN), np.float32)
    scales = np.array([(1, 0), (0, 2)], np.float32)

    without, with_them = model.execute(
        [request(sample=sample), request(sample=sample, lora_scale=scales)]
    )

    assert not without.output_tensors()[0].as_numpy().any()
    expected = expected_rows(adapters, sample, scales)
    np.testing.assert_allclose(with_them.output_tensors()[0].as_numpy(), expected, atol=1e-5)


def test_an_adapter_of_another_network_stops_the_start(adapted: Path) -> None:
    from safetensors.numpy import save_file

    path = adapted / "1" / "adapters" / "other.safetensors"
    save_file({"attn.to_v.down": np.ones((1, 3), np.float32)}, path)

    with pytest.raises(ValueError, match=r"other\.safetensors: attn\.to_v\.down .* does not fit"):
        network(adapted, None, lora_names=["other"])
