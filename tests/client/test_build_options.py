"""What `darkroom build` makes of its options."""

from pathlib import Path

import pytest
from missing_packages import run_without

from darkroom.cli import main, make_parser
from darkroom.cli.build import check_options
from darkroom.exceptions import DarkroomError


def check(*options: str) -> None:
    check_options(make_parser().parse_args(["build", "repository", *options]))


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "python"],
        ["--backend", "tensorrt", "--preset", "dynamic", "--batch", "1:2:4", "--gpus", "0,1"],
        ["--backend", "tensorrt", "--profile", "batch=1", "--profile", "batch=1:2:2"],
        ["--backend", "tensorrt", "--version-compatible", "--workspace", "4GB"],
        ["--backend", "onnxruntime", "--device", "cpu"],
        ["--backend", "onnxruntime", "--accelerator", "tensorrt", "--height", "512"],
    ],
)
def test_options_are_taken_by_their_backend(options: list[str]) -> None:
    check(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["python", "--preset", "native"], "--preset: is for --backend tensorrt, or --accelerator"),
        (["python", "--gpus", "0"], "--gpus: is for --backend tensorrt or onnxruntime"),
        (["onnxruntime", "--batch", "1"], "--batch: is for --backend tensorrt, or --accelerator"),
        (["onnxruntime", "--weight-streaming"], "--weight-streaming: is for --backend tensorrt"),
        (["onnxruntime", "--timing-cache", "x"], "--timing-cache: is for --backend tensorrt"),
        # A zero is an option too.
        (
            ["onnxruntime", "--optimization-level", "0"],
            "--optimization-level: is for --backend tensorrt",
        ),
        (["onnxruntime", "--engine-cache", "x"], "--engine-cache: is for --accelerator tensorrt"),
        (["tensorrt", "--accelerator", "cuda"], "--accelerator: is for --backend onnxruntime"),
        (["tensorrt", "--device", "gpu"], "--device: is for --backend onnxruntime"),
        (
            ["onnxruntime", "--accelerator", "tensorrt", *(["--profile", "batch=1"] * 2)],
            "--profile: ONNX Runtime's engines have one",
        ),
        (
            ["onnxruntime", "--device", "cpu", "--gpus", "0"],
            "--device: cpu has neither --accelerator nor --gpus",
        ),
    ],
)
def test_an_option_that_would_not_be_heeded_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(DarkroomError) as refusal:
        check("--backend", *options)

    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "torch"],
        [],
        ["--backend", "tensorrt", "--gpus", "0,0"],
        ["--backend", "tensorrt", "--gpus", "first"],
        ["--backend", "tensorrt", "--workspace", "much"],
        ["--backend", "tensorrt", "--tolerance", "little"],
    ],
)
def test_what_is_no_option_ends_the_command(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["build", "repository", *options])

    assert "darkroom build: error: " in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    made = run_without(
        {"torch", "polygraphy"},
        "from darkroom.cli import main; sys.exit(main(sys.argv[1:]))",
        *("build", str(tmp_path), "--backend", "onnxruntime"),
    )

    assert made.returncode == 1
    assert made.stderr.startswith("darkroom: this needs the package ")
    assert "pip install 'darkroom[tensorrt]'" in made.stderr
