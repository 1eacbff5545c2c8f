"""An engine of another GPU or TensorRT is refused by name, before a server loads it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darkroom.engine_fit import (
    Engine,
    Gpu,
    Machine,
    backend_options,
    check_engines,
    find_tensorrt,
    misfit,
    read_engines,
    visible_gpus,
)
from darkroom.serve_error import ServeError
from darkroom.server import Server

H100, L4 = Gpu("NVIDIA H100 80GB HBM3", "9.0"), Gpu("NVIDIA L4", "8.9")
MACHINE = Machine((H100, H100), "10.5.0")
ENGINE = Engine("unet", H100, "10.5.0", is_version_compatible=False, gpu_indexes=())
RECORD = {
    "gpu": H100.name,
    "compute_capability": "9.0",
    "version": "10.5.0",
    "version_compatible": False,
    "gpus": [],
}
LISTED = (
    "0, GPU-5aa0, NVIDIA H100 80GB HBM3, 9.0\n"
    "1, GPU-5bb1, NVIDIA L4, 8.9\n"
    "2, GPU-6cc2, NVIDIA L4, 8.9\n"
)


def write_repository(folder: Path, **record: Any) -> Path:
    folder.mkdir(exist_ok=True)
    networks = {"unet": {"backend": "tensorrt", "tensorrt": {**RECORD, **record}}, "vae": {}}
    manifest = {"networks": networks, "limits": {"min_size": 64}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_engine_of_this_machine_fits() -> None:
    assert misfit(ENGINE, MACHINE) is None


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine((L4,), "10.5.0"), f"unet was built for {H100}, but GPU 0 is {L4}"),
        (Machine((H100, L4), "10.5.0"), f"unet was built for {H100}, but GPU 1 is {L4}"),
        (
            Machine((H100,), "10.6.0"),
            "unet was built with TensorRT 10.5.0, but here is 10.6.0",
        ),
        (Machine((), None), f"unet is a TensorRT engine for {H100}, and no GPU is here"),
    ],
)
def test_what_does_not_fit_is_named(machine: Machine, reason: str) -> None:
    assert misfit(ENGINE, machine) == reason


def test_a_gpu_is_named_with_its_compute_capability() -> None:
    assert str(H100) == "NVIDIA H100 80GB HBM3 (compute capability 9.0)"


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.5.0", "10.5.0", True),
        ("10.5.0.18", "10.5.0", True),  # a build of the same
        ("10.5.0", "10.13.3", True),
        ("10.5.0", "10.4.0", False),
        ("10.5.0", "11.0.0", False),
    ],
)
def test_a_version_compatible_engine_runs_with_newer_ones_of_its_major_version(
    built: str, here: str, *, fits: bool
) -> None:
    engine = replace(ENGINE, tensorrt=built, is_version_compatible=True)

    assert (misfit(engine, replace(MACHINE, tensorrt=here)) is None) == fits


def test_a_gpu_without_an_instance_may_be_another() -> None:
    machine = Machine((L4, H100), "10.5.0")

    assert misfit(replace(ENGINE, gpu_indexes=(1,)), machine) is None
    assert misfit(replace(ENGINE, gpu_indexes=(0,)), machine) is not None


def test_a_tensorrt_that_was_not_found_is_left_to_the_server() -> None:
    assert misfit(ENGINE, replace(MACHINE, tensorrt=None)) is None


def test_a_refusal_says_what_to_do(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "models")
    check_engines([repository], MACHINE)

    with pytest.raises(ServeError, match=rf"models: unet .*: darkroom build {repository} --back"):
        check_engines([repository], Machine((L4,), "10.5.0"))


def test_a_server_refuses_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nvidia-smi is a program on the path; this one lists another GPU."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{LISTED.splitlines()[1]}\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    server = Server(write_repository(tmp_path / "models"))

    with pytest.raises(
        ServeError, match=r"unet was built for NVIDIA H100 .*but GPU 0 is NVIDIA L4"
    ):
        server.start()


@pytest.mark.parametrize("script", ["exit 1", "printf 'No devices were found'"])
def test_a_machine_whose_nvidia_smi_lists_nothing_has_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    assert Machine.here().gpus == ()


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        (None, (H100, L4, L4)),
        ("", ()),
        ("-1", ()),
        ("0", (H100,)),
        ("2,0", (L4, H100)),
        ("GPU-5bb1", (L4,)),
        ("GPU-5a", (H100,)),
        ("GPU-", ()),
    ],
)
def test_hidden_gpus_do_not_count(chosen: str | None, gpus: tuple[Gpu, ...]) -> None:
    environment = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}

    assert visible_gpus(LISTED, environment) == gpus


def test_the_version_is_in_the_name_of_the_librarys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libnvinfer.so.10.5.0").touch()
    link = tmp_path / "libnvinfer.so.10"
    link.symlink_to("libnvinfer.so.10.5.0")
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")

    assert find_tensorrt([tmp_path / "libnvinfer_plugin.so.10", link]) == "10.5.0"
    assert find_tensorrt([tmp_path / "libnvinfer.so"]) is None
    assert Machine.here().tensorrt == "10.5.0"


def test_only_engines_are_read(tmp_path: Path) -> None:
    assert read_engines(write_repository(tmp_path / "models")) == [ENGINE]


@pytest.mark.parametrize("missing", list(RECORD))
def test_an_incomplete_record_is_named(tmp_path: Path, missing: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != missing}
    networks = {"unet": {"backend": "tensorrt", "tensorrt": record}}
    (tmp_path / "manifest.json").write_text(json.dumps({"networks": networks}))

    with pytest.raises(ServeError, match=rf"manifest\.json: malformed, KeyError\('{missing}'\)"):
        check_engines([tmp_path], MACHINE)


def test_the_server_is_told_of_version_compatible_engines(tmp_path: Path) -> None:
    plain = write_repository(tmp_path / "plain")
    compatible = write_repository(tmp_path / "compatible", version_compatible=True)

    assert backend_options([plain]) == []
    assert backend_options([plain, compatible]) == [
        "--backend-config=tensorrt,version-compatible=true"
    ]
