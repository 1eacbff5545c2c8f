"""A bad setting stops the start with the key, the value and the range."""

import re
from pathlib import Path

import pytest

from darkroom_engine import EngineConfig
from darkroom_settings import TorchSettings

CONFIG = Path("model_repository/stable_diffusion/config.pbtxt")


def parameters(**values: str) -> dict[str, dict[str, str]]:
    return {key: {"string_value": value} for key, value in values.items()}


def test_values_are_read_and_the_rest_is_default() -> None:
    config = EngineConfig.from_parameters(parameters(max_rows="8"))

    assert config == EngineConfig(max_rows=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_rows": "1"}, "max_rows: 1 is outside 2 to 1024"),
        ({"max_rows": "0"}, "max_rows: 0 is outside 2 to 1024"),
        ({"max_rows": "many"}, "max_rows: 'many' is not a whole number"),
        ({"max_queue_size": "0"}, "max_queue_size: 0 is outside 1 to 1000000"),
        ({"warmup_rows": "9", "max_rows": "4"}, "warmup_rows: 9 is above max_rows, which is 4"),
        (
            {"vae_tile_size": "512", "vae_tile_overlap": "400"},
            "vae_tile_overlap: 400 is above half of vae_tile_size, which is 512",
        ),
        ({"safety_checker": "on"}, "safety_checker: 'on' does not exist, there are off, flag, bla"),
        ({"memory_profile": "tiny"}, "memory_profile: 'tiny' does not exist, there are full, bal"),
        ({"in_process": "2"}, "in_process: 2 is outside 0 to 1"),
        ({"num_engines": "0"}, "num_engines: 0 is outside 1 to 64"),
        ({"device": "gpu"}, "device: 'gpu' is none of auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:x"}, "device: 'cuda:x' is none of auto, cpu, cuda, cuda:N"),
        ({"compile": "2"}, "compile: 2 is outside 0 to 1"),
        ({"cuda_graphs": "on"}, "cuda_graphs: 'on' is not a whole number"),
        ({"row_buckets": ""}, "row_buckets: '' is not whole numbers, with commas between"),
        ({"row_buckets": "1;2"}, "row_buckets: '1;2' is not whole numbers, with commas between"),
        ({"row_buckets": "4,2"}, "row_buckets: '4,2' is not rising, or outside 1 to 1024"),
        ({"row_buckets": "0,2"}, "row_buckets: '0,2' is not rising, or outside 1 to 1024"),
        ({"row_buckets": "2,1025"}, "row_buckets: '2,1025' is not rising, or outside 1 to 1024"),
        ({"max_rowz": "4"}, r"max_rowz: no such engine parameter; there are .*'max_decode_rows'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_parameters(parameters(**values))


def test_the_shipped_config_states_the_defaults() -> None:
    stated = dict(
        re.findall(r'key: "(\w+)" value \{ string_value: "([\w,]+)" \}', CONFIG.read_text())
    )

    assert EngineConfig.from_parameters(parameters(**stated)) == EngineConfig()
    assert set(stated) == set(EngineConfig.__dataclass_fields__)


def test_how_pytorch_runs_networks_is_read_too() -> None:
    config = EngineConfig.from_parameters(
        parameters(device="cuda:1", compile="1", cuda_graphs="0", row_buckets="2,8")
    )

    assert config.torch == TorchSettings("cuda:1", 1, 0, (2, 8))


@pytest.mark.parametrize(
    ("in_process", "backends", "expected"),
    [
        (1, ["torch", "torch"], True),
        (1, ["torch", "python"], False),
        (1, ["python"], False),
        (1, ["tensorrt", "onnxruntime"], False),
        (0, ["torch"], False),
    ],
)
def test_networks_run_in_process_if_pytorch_runs_all_of_them(
    in_process: int, backends: list[str], expected: bool
) -> None:
    assert EngineConfig(in_process=in_process).is_in_process(backends) is expected


@pytest.mark.parametrize(
    ("config", "backends", "message"),
    [
        (
            EngineConfig(memory_profile="low"),
            ["torch"],
            "memory_profile: 'low' is for networks that are Triton's models; with in_process 1",
        ),
        (
            EngineConfig(device="cuda"),
            ["python"],
            "device: cuda is for networks in the engine's process; these are Triton's models",
        ),
        (
            EngineConfig(in_process=0, compile=1),
            ["torch"],
            "compile: 1 is for networks in the engine's process; these are Triton's models",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    config: EngineConfig, backends: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.is_in_process(backends)
