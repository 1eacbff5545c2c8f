"""The set-up is real, pip included; only the wheel is ours, and pip must not use an index."""

import re
import zipfile
from pathlib import Path

import pytest

from benchmarks.perf_analyzer import (
    LIBRARIES,
    VERSION,
    PerfAnalyzer,
    PerfAnalyzerError,
    copy_libraries,
    extract_binary,
    read_stamps,
)

WORKS = "#!/bin/sh\nexit 0\n"
LACKS_LIBRARY = "#!/bin/sh\necho 'libb64.so.0d: cannot open shared object file' >&2\nexit 127\n"


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    return tmp_path / "tools"


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """Libraries with the names that a repaired wheel gives them."""
    folder = tmp_path / "nvidia_pytriton.libs"
    folder.mkdir()
    for name in ("libb64-98cb6333.so.0d", "libcudart-09529672.so.12.6.77", "libz-1.so"):
        (folder / name).write_text(name)
    return folder


def offer_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str | None) -> Path:
    wheel = folder / f"tritonclient-{VERSION}-py3-none-any.whl"
    prefix = f"tritonclient-{VERSION}"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{prefix}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: tritonclient\nVersion: {VERSION}\n",
        )
        archive.writestr(
            f"{prefix}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{prefix}.dist-info/RECORD", "")
        if program is not None:
            archive.writestr(f"{prefix}.data/data/bin/perf_analyzer", program)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def test_set_up_leaves_the_program_and_its_libraries_under_plain_names(
    tools, libraries, tmp_path, monkeypatch
):
    offer_wheel(tmp_path, monkeypatch, WORKS)

    analyzer = PerfAnalyzer.install(tools, libraries)

    assert {path.name for path in analyzer.directory.iterdir()} == {"perf_analyzer", *LIBRARIES}
    assert list(tools.iterdir()) == [analyzer.directory]


def test_what_is_set_up_is_used_again(tools, libraries, tmp_path, monkeypatch):
    offer_wheel(tmp_path, monkeypatch, WORKS)
    first = PerfAnalyzer.install(tools, libraries)
    monkeypatch.delenv("PIP_FIND_LINKS")

    assert PerfAnalyzer.install(tools, libraries) == first


def test_without_the_wheel_the_error_names_it_and_nothing_is_left(tools, libraries):
    with pytest.raises(
        PerfAnalyzerError, match=rf"tritonclient=={re.escape(VERSION)}[\s\S]*PIP_FIND"
    ):
        PerfAnalyzer.install(tools, libraries)

    assert list(tools.iterdir()) == []


def test_a_program_that_lacks_a_library_is_not_set_up(tools, libraries, tmp_path, monkeypatch):
    offer_wheel(tmp_path, monkeypatch, LACKS_LIBRARY)

    with pytest.raises(PerfAnalyzerError, match="apt-get install libb64-0d"):
        PerfAnalyzer.install(tools, libraries)

    assert list(tools.iterdir()) == []


def test_a_wheel_without_the_program_is_named(tmp_path, monkeypatch):
    wheel = offer_wheel(tmp_path, monkeypatch, None)

    with pytest.raises(PerfAnalyzerError, match=f"{wheel.name} has no perf_analyzer"):
        extract_binary(wheel, tmp_path / "perf_analyzer")


def test_libraries_that_are_missing_are_left_to_the_system(tmp_path):
    copy_libraries(tmp_path / "nowhere", tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_tells_the_status_and_what_the_program_said(tmp_path):
    analyzer = PerfAnalyzer(tmp_path)
    analyzer.binary.write_text("#!/bin/sh\necho 'HTTP client failed' >&2\nexit 99\n")
    analyzer.binary.chmod(0o755)

    with pytest.raises(PerfAnalyzerError, match="status 99: HTTP client failed"):
        analyzer.profile(["-m", "stable_diffusion"])


def test_a_run_returns_the_stamps_of_its_export(tmp_path):
    analyzer = PerfAnalyzer(tmp_path)
    content = '{"experiments":[{"requests":[{"timestamp":1,"response_timestamps":[3]}]}]}'
    analyzer.binary.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        f"echo '{content}' > \"${{last#--profile-export-file=}}\"\n"
    )
    analyzer.binary.chmod(0o755)

    assert analyzer.profile([], is_quiet=True) == [(1e-9, 3e-9)]


def test_stamps_are_read_beside_the_bytes_of_pictures():
    export = (
        b'{"experiments":[{"requests":['
        b'{"timestamp":1000000000,"response_timestamps":[1500000000],'
        b'"response_outputs":[{"image":"\x89PNG\\r\\n\\"\xff\xd8\xc3("}]},'
        b'{"timestamp":2000000000,"response_timestamps":[2100000000,4000000000]}]}]}'
    )

    assert read_stamps(export) == [(1.0, 1.5), (2.0, 4.0)]
