from pathlib import Path

import pytest

from benchmarks.variant import repository_with, set_parameters

CONFIG = """# What the engine may do.
name: "stable_diffusion"
parameters { key: "max_rows" value { string_value: "16" } }
parameters { key: "overlap_decode" value { string_value: "1" } }
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    version = folder / "stable_diffusion" / "1"
    version.mkdir(parents=True)
    (folder / "stable_diffusion" / "config.pbtxt").write_text(CONFIG)
    (version / "model.onnx").write_text("weights")
    (version / "model.py").write_text("code")
    return folder


def test_a_copy_differs_in_the_parameter_alone(repository):
    with repository_with(repository, {"stable_diffusion": {"max_rows": 4}}) as copy:
        config = (copy / "stable_diffusion" / "config.pbtxt").read_text()

        assert 'string_value: "4"' in config
        assert 'name: "stable_diffusion"' in config
        assert config.count("string_value") == 2


def test_the_repository_itself_stays_as_it_is(repository):
    with repository_with(repository, {"stable_diffusion": {"max_rows": 4}}):
        pass

    assert (repository / "stable_diffusion" / "config.pbtxt").read_text() == CONFIG


def test_a_copy_shares_the_weights_but_not_the_code(repository):
    with repository_with(repository, {}) as copy:
        version = Path("stable_diffusion", "1")

        assert (copy / version / "model.onnx").read_text() == "weights"
        assert not (copy / version / "model.py").samefile(repository / version / "model.py")


def test_a_copy_goes_at_the_end(repository):
    with repository_with(repository, {}) as copy:
        pass

    assert not copy.exists()


def test_a_parameter_that_does_not_exist_is_named(repository):
    with pytest.raises(ValueError, match=r"no parameter maximum_rows; there are \['max_rows', "):
        set_parameters(repository / "stable_diffusion" / "config.pbtxt", {"maximum_rows": 4})
