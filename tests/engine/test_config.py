"""A bad setting stops the start with the key, the value and the range."""

import re
from pathlib import Path

import pytest

from darkroom_engine import EngineConfig

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
        ({"max_rowz": "4"}, r"max_rowz: no such engine parameter; there are .*'max_decode_rows'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_parameters(parameters(**values))


def test_the_shipped_config_states_the_defaults() -> None:
    stated = dict(re.findall(r'key: "(\w+)" value \{ string_value: "(\w+)" \}', CONFIG.read_text()))

    assert EngineConfig.from_parameters(parameters(**stated)) == EngineConfig()
    assert set(stated) == set(EngineConfig.__dataclass_fields__)
