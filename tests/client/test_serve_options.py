"""What `darkroom serve` makes of its options."""

from pathlib import Path

import pytest

from darkroom.cli import main, make_parser
from darkroom.cli.serve import engine_parameters
from darkroom.served_models import Source
from darkroom.server import Server


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ([], {}),
        (["--memory-profile", "full"], {}),
        (["--memory-profile", "low"], {"memory_profile": "low"}),
        (["--safety-checker", "off"], {"safety_checker": "off"}),
        (["--max-rows", "auto"], {"max_rows": "auto"}),
        (
            ["--max-rows", "8", "--safety-checker", "blank", "--memory-profile", "balanced"],
            {"max_rows": "8", "safety_checker": "blank", "memory_profile": "balanced"},
        ),
    ],
)
def test_engines_are_told_what_was_chosen_and_no_more(
    options: list[str], parameters: dict[str, str]
) -> None:
    parsed = make_parser().parse_args(["serve", "repository", *options])

    assert engine_parameters(parsed) == parameters


@pytest.mark.parametrize(
    "options", [["--max-rows", "many"], ["--memory-profile", "tiny"], ["--safety-checker", "on"]]
)
def test_a_setting_that_is_none_is_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "repository", *options])

    assert options[1] in capsys.readouterr().err


def test_a_server_may_be_given_paths_and_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        text = '{"networks": {"unet": {}}, "limits": {"min_size": 32}}'
        (tmp_path / name / "manifest.json").write_text(text)
    one = Server(tmp_path / "a")
    two = Server([tmp_path / "a", Source(tmp_path / "b", "c")])
    one.stop()
    two.stop()

    assert one.reloadable == ["darkroom", "unet"]
    assert [model.name for model in two.models] == ["stable_diffusion", "c"]
    assert two.reloadable == ["darkroom", "unet", "c_unet"]
    assert two.repository == one.repository == tmp_path / "a"
