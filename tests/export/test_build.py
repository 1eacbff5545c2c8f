"""`darkroom build`: from one backend to another, in place, all or nothing."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import numpy_helper
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from tritonclient.grpc import model_config_pb2

from darkroom.cli import main
from darkroom.engine_fit import Gpu, Machine, check_engines, read_engines
from darkroom_engine.manifest import Manifest
from darkroom_export import ExportError
from darkroom_export.backend import Backend
from darkroom_export.build import EXPORT_LIMITS, BuildOptions, build_repository
from darkroom_export.profiles import Wishes
from darkroom_export.tensorrt import EngineOptions

NETWORKS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
GPU = Gpu("NVIDIA H100", "9.0")


class GraphsAsEngines:
    """In TensorRT's place: an engine is its graph, perhaps with other weights."""

    gpu, version = GPU, "10.5.0"

    def __init__(self, spoiled: str = "", factor: float = 1.0) -> None:
        self.spoiled, self.factor = spoiled, factor
        self.profiles: dict[str, Any] = {}
        self.options: list[EngineOptions] = []

    def build(
        self,
        graph: Path,
        plan: Path,
        profiles: Sequence[Any],
        options: EngineOptions,
        tell: Callable[[str], None],
    ) -> None:
        network = graph.parents[1].name
        self.profiles[network] = profiles
        self.options.append(options)
        assert not plan.exists()
        assert options.timing_cache is not None
        # As Polygraphy does.
        Path(f"{options.timing_cache}.lock").touch()
        with options.timing_cache.open("a") as cache:
            cache.write(f"{network};")
        tell("Building Engine: 100%")
        model = onnx.load(graph)
        if network == self.spoiled:
            for weight in model.graph.initializer:
                array = numpy_helper.to_array(weight)
                if array.ndim > 1:
                    scaled = (array * self.factor).astype(array.dtype)
                    weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
        onnx.save(model, plan)

    def runners(self, plan: Path) -> Callable[[int], BaseRunner]:
        session = SessionFromOnnx(str(plan))()
        return lambda _: OnnxrtRunner(session)


@pytest.fixture
def repository(fp32: Path, tmp_path: Path) -> Path:
    target = tmp_path / "repository"
    shutil.copytree(fp32, target)
    return target


def build(repository: Path, backend: Backend = Backend.TENSORRT, **options: Any) -> int:
    tensorrt = options.pop("tensorrt", None) or GraphsAsEngines()
    wishes = options.pop("wishes", Wishes(batch="1:2:4"))
    return build_repository(repository, BuildOptions(backend, wishes, **options), tensorrt=tensorrt)


def manifest_of(repository: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((repository / "manifest.json").read_text())
    return manifest


def config_of(repository: Path, network: str) -> model_config_pb2.ModelConfig:
    text = (repository / network / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def contents(repository: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(repository)): path.read_bytes()
        for path in sorted(repository.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def change(repository: Path, **values: Any) -> None:
    path = repository / "manifest.json"
    path.write_text(json.dumps({**manifest_of(repository), **values}))


def test_engines_stand_beside_their_graphs_and_are_certified(repository: Path) -> None:
    tensorrt = GraphsAsEngines()

    rows = build(repository, tensorrt=tensorrt)

    manifest = Manifest.load(repository / "manifest.json")
    assert rows == 4
    assert set(tensorrt.profiles) == NETWORKS
    assert manifest.networks["unet"].max_batch_size == 4
    for network, record in manifest_of(repository)["networks"].items():
        files = {f"{network}/1/model.onnx", f"{network}/1/model.plan"}
        assert record["backend"] == "tensorrt"
        assert set(record["files"]) == files
        assert {path.name for path in (repository / network / "1").iterdir()} == {
            "model.onnx",
            "model.plan",
        }
        assert config_of(repository, network).backend == "tensorrt"
        made = record["tensorrt"]
        assert (made["gpu"], made["compute_capability"], made["version"]) == (
            "NVIDIA H100",
            "9.0",
            "10.5.0",
        )
        assert made["verification"]["error"] <= 1e-5
        assert set(made["verification"]["errors"]) == set(record["outputs"])
    unet = manifest_of(repository)["networks"]["unet"]["tensorrt"]
    assert unet["profiles"][0]["timestep"] == {"min": [1], "opt": [2], "max": [4]}
    assert not unet["version_compatible"]
    assert unet["verification"]["num_corners"] == 3


def test_the_engine_is_told_of_the_limits_of_engines(repository: Path) -> None:
    before = manifest_of(repository)["limits"]
    native = before["default_width"]

    build(repository)

    manifest = manifest_of(repository)
    assert manifest["limits"] == {
        **before,
        "min_size": native,
        "max_size": native,
        "max_embeddings_multiples": 1,
    }
    assert manifest[EXPORT_LIMITS] == before


def test_there_and_back_again_is_as_before(repository: Path) -> None:
    before = contents(repository)
    manifest = manifest_of(repository)

    build(repository, Backend.ONNXRUNTIME)
    assert config_of(repository, "unet").backend == "onnxruntime"
    assert {record["backend"] for record in manifest_of(repository)["networks"].values()} == {
        "onnxruntime"
    }
    assert not (repository / "unet" / "1" / "model.py").exists()
    build(repository)
    build(repository, wishes=Wishes(batch="1"))
    build(repository, Backend.PYTHON)

    after = contents(repository)
    assert after.pop("timing.cache")
    assert manifest_of(repository) == manifest
    assert after == {**before, "manifest.json": after["manifest.json"]}


def test_a_second_build_begins_with_what_the_first_measured(repository: Path) -> None:
    build(repository)
    first = (repository / "timing.cache").read_text()

    build(repository)

    assert (repository / "timing.cache").read_text() == first * 2
    assert not (repository / "timing.cache.lock").exists()


def test_a_timing_cache_of_ones_own_stays_where_it_is(repository: Path, tmp_path: Path) -> None:
    cache = tmp_path / "measured"

    build(repository, engine=EngineOptions(timing_cache=cache))

    assert cache.is_file()
    assert not (repository / "timing.cache").exists()


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1.5, r"unet: out_sample at sample .*: the engine differs from its graph by .* allowed is"),
        (np.nan, r"unet: out_sample at sample .*: what the engine gives is not finite"),
    ],
)
def test_an_engine_that_differs_leaves_the_repository_as_it_was(
    repository: Path, factor: float, message: str
) -> None:
    before = contents(repository)

    with pytest.raises(ExportError, match=message):
        build(repository, tensorrt=GraphsAsEngines("unet", factor))

    assert contents(repository) == before
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]


def test_an_engine_that_differs_by_no_more_than_somebody_allows_is_taken(repository: Path) -> None:
    engines = GraphsAsEngines("unet", 1.2)

    build(repository, engine=EngineOptions(tolerance=0.9), tensorrt=engines)

    record = manifest_of(repository)["networks"]["unet"]
    verification = record["tensorrt"]["verification"]
    assert record["verification"]["tolerance"] < verification["error"] <= 0.9
    assert verification["tolerance"] == 0.9


def test_large_files_are_not_copied(repository: Path) -> None:
    graph = repository / "unet" / "1" / "model.onnx"
    assert graph.stat().st_size >= 1 << 20
    number = graph.stat().st_ino

    build(repository, Backend.ONNXRUNTIME)

    assert graph.stat().st_ino == number


def test_several_profiles_are_served_and_compared(repository: Path) -> None:
    native = manifest_of(repository)["limits"]["default_width"]
    wishes = Wishes(profiles=["batch=1:1:2", f"batch=1:1:3,height={native // 2}"])

    rows = build(repository, wishes=wishes)

    unet = manifest_of(repository)["networks"]["unet"]
    config = config_of(repository, "unet")
    assert rows == unet["max_batch_size"] == 2
    assert [profile["sample"]["max"][0] for profile in unet["tensorrt"]["profiles"]] == [2, 3]
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert "sizes" in manifest_of(repository)["limits"]


def test_cuda_graphs_are_the_denoisers_unless_unwanted(repository: Path) -> None:
    build(repository)
    assert config_of(repository, "unet").optimization.cuda.graphs
    assert not config_of(repository, "vae_decoder").optimization.cuda.graphs

    build(repository, with_cuda_graphs=False)
    assert not config_of(repository, "unet").optimization.cuda.graphs


def test_a_server_can_tell_whether_the_engines_fit(repository: Path) -> None:
    build(repository, gpus=(0, 1), engine=EngineOptions(version_compatible=True))

    assert {engine.network for engine in read_engines(repository)} == NETWORKS
    assert all(engine.is_version_compatible for engine in read_engines(repository))
    assert list(config_of(repository, "unet").instance_group[0].gpus) == [0, 1]
    check_engines([repository], Machine((GPU, GPU), "10.6.0"))


def test_onnx_runtimes_own_engines_have_the_profile(repository: Path) -> None:
    rows = build(
        repository, Backend.ONNXRUNTIME, accelerator="tensorrt", engine_cache="/var/cache/engines"
    )

    accelerator = config_of(repository, "unet").optimization.execution_accelerators
    parameters = accelerator.gpu_execution_accelerator[0].parameters
    assert rows == 4
    assert "timestep:4" in parameters["trt_profile_max_shapes"]
    assert parameters["trt_engine_cache_path"] == "/var/cache/engines"
    assert "tensorrt" not in manifest_of(repository)["networks"]["unet"]


def test_onnx_runtime_may_stay_on_the_cpu(repository: Path) -> None:
    build(repository, Backend.ONNXRUNTIME, is_on_gpu=False)

    kinds = [group.kind for group in config_of(repository, "unet").instance_group]
    assert kinds == [model_config_pb2.ModelInstanceGroup.KIND_CPU]


def test_float32_is_allowed_with_a_note(repository: Path) -> None:
    lines: list[str] = []
    options = BuildOptions(Backend.TENSORRT, Wishes(batch="1"))

    build_repository(repository, options, tell=lines.append, tensorrt=GraphsAsEngines())

    assert lines[0] == "the export is in float32, and so will its engines be; fp16 is faster"
    assert "unet: Building Engine: 100%" in lines


def test_an_adapter_is_refused_with_what_to_do_instead(repository: Path) -> None:
    change(repository, loras={"ink": {}, "dot": {}})

    with pytest.raises(
        ExportError,
        match="takes the adapters dot, ink, whose weights onnxruntime cannot be given; export with "
        "--lora, which makes variants, or with --backend torch",
    ):
        build(repository, Backend.ONNXRUNTIME)


@pytest.mark.parametrize(
    ("backend", "message"),
    [(Backend.TORCH, "backend: torch is chosen by darkroom export --backend torch")],
)
def test_a_backend_that_is_not_built_is_refused(
    repository: Path, backend: Backend, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        build(repository, backend)


def test_programs_of_pytorch_become_nothing_else(repository: Path) -> None:
    networks = manifest_of(repository)["networks"]
    networks["unet"]["backend"] = "torch"
    change(repository, networks=networks)

    with pytest.raises(ExportError, match=r"unet is a program of PyTorch, .* --backend python"):
        build(repository)


def test_an_older_export_is_refused(repository: Path) -> None:
    change(repository, format=3)

    with pytest.raises(ExportError, match="format 3, but 4 is needed; export the checkpoint again"):
        build(repository)


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no exported repository; darkroom export CHECKPOINT"):
        build(tmp_path)


def test_a_graph_that_was_changed_is_refused(repository: Path) -> None:
    graph = repository / "unet" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\n")

    with pytest.raises(ExportError, match=r"unet: .*model\.onnx is not the file that was verified"):
        build(repository)


def test_a_graph_that_is_missing_is_named(repository: Path) -> None:
    (repository / "unet" / "1" / "model.onnx").unlink()

    with pytest.raises(ExportError, match=r"unet/1/model\.onnx: No such file"):
        build(repository)


def test_profiles_are_checked_before_anything_is_built(repository: Path) -> None:
    tensorrt = GraphsAsEngines()

    with pytest.raises(ExportError, match="batch: 64 in 1:2:64 is not allowed, but 1 to 63"):
        build(repository, wishes=Wishes(batch="1:2:64"), tensorrt=tensorrt)

    assert tensorrt.profiles == {}


def test_a_config_that_does_not_fit_its_graph_is_found(repository: Path) -> None:
    path = repository / "unet" / "config.pbtxt"
    path.write_text(path.read_text().replace('"timestep"', '"timesteps"'))

    with pytest.raises(ExportError, match=r"unet: input timesteps: config\.pbtxt has it"):
        build(repository, Backend.ONNXRUNTIME)


def test_a_full_disk_is_told_of(repository: Path) -> None:
    class Full(GraphsAsEngines):
        def build(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"repository: .*No space left on device$"):
        build(repository, tensorrt=Full())


def test_the_command_says_what_comes_next(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(repository), "--backend", "onnxruntime"]) == 0

    assert capsys.readouterr().out == (
        f"{repository}: runs on onnxruntime, up to 63 rows a call; next: "
        f"darkroom serve {repository}\n"
    )


def test_the_command_gives_profiles_and_options_on(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(repository), "--backend", "tensorrt"]

    assert main([*command, "--profile", "batch=1:2:64"]) == 1
    assert "darkroom: batch: 64 in 1:2:64 is not allowed, but 1 to 63" in capsys.readouterr().err
    assert main([*command, "--preset", "dynamic", "--optimization-level", "7"]) == 1
    assert "optimization-level: 7 is not between 0 and 5" in capsys.readouterr().err
    assert main([*command, "--prompt-multiples", "9"]) == 1
    assert "prompt-multiples: 9 in 9:9:9 is not allowed" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed"
)
def test_the_command_says_where_there_is_tensorrt(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(repository), "--backend", "tensorrt"]) == 1
    assert "inside the container that will serve" in capsys.readouterr().err
