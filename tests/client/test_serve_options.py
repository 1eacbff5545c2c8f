"""What `darkroom serve` makes of its options."""

import json
from pathlib import Path

import pytest

from darkroom.cli import main, make_parser
from darkroom.cli.serve import engine_parameters
from darkroom.serve_error import ServeError
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
        (["--networks", "in-process"], {"in_process": "1"}),
        (["--networks", "triton"], {"in_process": "0"}),
        (
            ["--device", "cuda:1", "--compile", "--row-buckets", "1,2,8"],
            {"device": "cuda:1", "compile": "1", "row_buckets": "1,2,8"},
        ),
        (["--no-cuda-graphs", "--num-engines", "4"], {"cuda_graphs": "0", "num_engines": "4"}),
    ],
)
def test_engines_are_told_what_was_chosen_and_no_more(
    options: list[str], parameters: dict[str, str]
) -> None:
    parsed = make_parser().parse_args(["serve", "repository", *options])

    assert engine_parameters(parsed) == parameters


@pytest.mark.parametrize(
    "options",
    [
        ["--max-rows", "many"],
        ["--memory-profile", "tiny"],
        ["--safety-checker", "on"],
        ["--networks", "elsewhere"],
        ["--device", "cuda:first"],
        ["--row-buckets", "1,two"],
        ["--row-buckets", "2,1"],
        ["--row-buckets", "0,1"],
        ["--num-engines", "0"],
        ["--num-engines", "all"],
    ],
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


def repository(path: Path, *backends: str) -> Path:
    """The manifest of one, with a network for each backend."""
    networks = {f"network_{number}": {"backend": it} for number, it in enumerate(backends)}
    path.mkdir()
    (path / "manifest.json").write_text(
        json.dumps({"networks": networks, "limits": {"min_size": 32}})
    )
    return path


def reloadable(path: Path, **parameters: str) -> list[str]:
    server = Server(path, engine_parameters=parameters)
    server.stop()
    return server.reloadable


def test_networks_of_pytorch_are_no_models_of_tritons_unless_they_are_asked_to_be(
    tmp_path: Path,
) -> None:
    path = repository(tmp_path / "repository", "torch", "torch")

    assert reloadable(path) == reloadable(path, in_process="1") == ["darkroom"]
    assert reloadable(path, in_process="0") == ["darkroom", "network_0", "network_1"]
    assert reloadable(path, device="cuda", row_buckets="1,2") == ["darkroom"]


def test_networks_run_in_one_place_or_the_other(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="in_process: 'yes' is neither 0 nor 1"):
        reloadable(repository(tmp_path / "repository", "torch"), in_process="yes")


@pytest.mark.parametrize("backends", [["python"], ["tensorrt", "python"], ["python", "torch"]])
@pytest.mark.parametrize("in_process", ["0", "1"])
def test_where_networks_run_is_chosen_only_for_pytorch(
    tmp_path: Path, backends: list[str], in_process: str
) -> None:
    path = repository(tmp_path / "repository", *backends)

    with pytest.raises(
        ServeError, match=rf"repository: its networks are run by {', '.join(sorted(backends))}, as"
    ):
        reloadable(path, in_process=in_process)


@pytest.mark.parametrize(
    ("backend", "in_process"), [("python", {}), ("torch", {"in_process": "0"})]
)
@pytest.mark.parametrize("setting", [{"device": "cpu"}, {"compile": "1"}, {"row_buckets": "1"}])
def test_settings_of_networks_in_process_are_refused_for_others(
    tmp_path: Path, backend: str, in_process: dict[str, str], setting: dict[str, str]
) -> None:
    path = repository(tmp_path / "repository", backend)

    with pytest.raises(
        ServeError, match=f"{next(iter(setting))}: is for networks in the engine's process"
    ):
        reloadable(path, **in_process, **setting)


@pytest.mark.parametrize("profile", ["low", "balanced"])
def test_networks_in_process_have_no_memory_profile(tmp_path: Path, profile: str) -> None:
    path = repository(tmp_path / "repository", "torch")

    with pytest.raises(ServeError, match=f"memory_profile: {profile} is for .* there is full"):
        reloadable(path, memory_profile=profile)
    assert reloadable(path, memory_profile=profile, in_process="0")
