"""Which names the models of several repositories get, and how Triton sees them."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from darkroom.model_view import model_repository
from darkroom.serve_error import ServeError
from darkroom.served_models import Source, read_models

NETWORKS = ("text_encoder", "unet")
ENGINE = ("stable_diffusion", "stable_diffusion_stream", "stable_diffusion_cancel")


def export(path: Path, *networks: str, min_size: int = 64) -> Path:
    """A repository as an export writes it, without what makes it big."""
    for model in (*ENGINE, "darkroom", *networks):
        (path / model / "1").mkdir(parents=True)
        (path / model / "1" / "model.py").write_text(f"# {model}")
        (path / model / "config.pbtxt").write_text(f'name: "{model}" backend: "python"')
    (path / path.name).write_text("a file of the user's own")
    manifest = {"networks": {name: {} for name in networks}, "limits": {"min_size": min_size}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return export(tmp_path / "shapes", *NETWORKS)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return export(tmp_path / "sdxl", *NETWORKS, "text_encoder_2", min_size=512)


def names(*sources: Source) -> list[str]:
    return [model.name for model in read_models(sources)]


def config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("denoiser", "mode"),
    [
        (None, "text2img"),
        ({"extra_channels": 0, "time_ids": ["original_size"]}, "text2img"),
        ({"extra_channels": 5, "time_ids": []}, "inpaint"),
        ({"extra_channels": 0, "time_ids": ["original_size", "aesthetic_score"]}, "img2img"),
    ],
)
def test_the_first_mode_is_what_the_denoiser_takes(
    first: Path, denoiser: dict[str, Any] | None, mode: str
) -> None:
    manifest = json.loads((first / "manifest.json").read_text())
    if denoiser is not None:
        manifest["denoiser"] = denoiser
    (first / "manifest.json").write_text(json.dumps(manifest))

    assert [model.first_mode for model in read_models([Source(first)])] == [mode]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("build/shapes", Source(Path("build/shapes"))),
        ("sdxl=build/shapes", Source(Path("build/shapes"), "sdxl")),
        ("./a=b", Source(Path("a=b"))),
        ("x=a=b", Source(Path("a=b"), "x")),
        ("=a", Source(Path("a"), "")),
    ],
)
def test_an_argument_is_a_path_or_a_name_and_a_path(text: str, source: Source) -> None:
    assert Source.parse(text) == source


@pytest.mark.parametrize(
    ("backends", "needed"),
    [
        (["python", "python"], {"python"}),
        (["torch", "torch"], {"python"}),
        (["python", "onnxruntime"], {"python", "onnxruntime"}),
        (["tensorrt", "onnxruntime"], {"python", "onnxruntime", "tensorrt"}),
    ],
)
def test_the_engine_needs_python_and_networks_what_runs_them(
    first: Path, backends: list[str], needed: set[str]
) -> None:
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["networks"] = {
        name: {"backend": backend} for name, backend in zip(NETWORKS, backends, strict=True)
    }
    (first / "manifest.json").write_text(json.dumps(manifest))

    (model,) = read_models([Source(first)])
    assert model.triton_backends == needed


def test_networks_in_the_engines_process_have_no_part_in_a_view(
    first: Path, tmp_path: Path
) -> None:
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["networks"] = {name: {"backend": "torch"} for name in NETWORKS}
    (first / "manifest.json").write_text(json.dumps(manifest))
    models = read_models([Source(first, "a")])
    view = model_repository(models, tmp_path / "view")

    assert {entry.name for entry in view.iterdir()} == {"darkroom", "a", "a_stream", "a_cancel"}
    assert models[0].networks == []


def test_a_repository_alone_keeps_its_names_and_is_served_where_it_is(
    first: Path, tmp_path: Path
) -> None:
    (model,) = read_models([Source(first)])

    assert model.name == "stable_diffusion"
    assert model.networks == ["text_encoder", "unet"]
    assert model.faces == ["stable_diffusion_stream", "stable_diffusion_cancel"]
    assert model_repository([model], tmp_path / "view") == first
    assert not (tmp_path / "view").exists()


def test_of_several_the_first_without_a_name_keeps_its_names(first: Path, second: Path) -> None:
    assert names(Source(first), Source(second)) == ["stable_diffusion", "sdxl"]
    assert names(Source(first, "a"), Source(second)) == ["a", "stable_diffusion"]
    assert names(Source(first, "a"), Source(second, "b.2")) == ["a", "b.2"]
    assert names(Source(first, "a"), Source(first, "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("folder", "name"), [("SD 1.5 (fp16)", "SD_1.5__fp16_"), ("_hidden", "hidden"), ("é-1", "1")]
)
def test_a_folders_name_is_made_a_models(
    first: Path, tmp_path: Path, folder: str, name: str
) -> None:
    assert names(Source(first), Source(export(tmp_path / folder)))[1] == name


def test_sizes_and_networks_are_each_models_own(first: Path, second: Path) -> None:
    one, two = read_models([Source(first), Source(second)])

    assert (one.min_size, two.min_size) == (64, 512)
    assert one.networks == ["text_encoder", "unet"]
    assert two.networks == ["sdxl_text_encoder", "sdxl_unet", "sdxl_text_encoder_2"]
    assert two.faces == ["sdxl_stream", "sdxl_cancel"]


@pytest.mark.parametrize("name", ["", "a b", "a/b", ".a", "-a", "ä", "a" * 49])
def test_a_name_that_is_none_is_refused(first: Path, name: str) -> None:
    with pytest.raises(ServeError, match="cannot be the name of a model, which is a letter or"):
        read_models([Source(first, name)])


def test_a_folder_that_gives_no_name_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"no model can be called '\(\)'; NAME=PATH chooses"):
        read_models([Source(first), Source(export(tmp_path / "()"))])


@pytest.mark.parametrize(
    ("one", "two", "clash"),
    [
        ("same", "same", "same"),
        ("a", "a_stream", "a_stream"),
        ("a", "a_unet", "a_unet"),
        (None, "unet", "unet"),
        (None, "stable_diffusion", "stable_diffusion"),
        ("a", "darkroom", "darkroom"),
    ],
)
def test_two_models_of_one_name_are_refused(
    first: Path, second: Path, one: str | None, two: str, clash: str
) -> None:
    with pytest.raises(ServeError, match=f"'{clash}' would be called as one of .*; NAME=PATH"):
        read_models([Source(first, one), Source(second, two)])


def test_a_view_links_to_the_repositories_under_the_new_names(
    first: Path, second: Path, tmp_path: Path
) -> None:
    before = files(first), files(second)
    models = read_models([Source(first), Source(second)])
    view = model_repository(models, tmp_path / "view")

    assert {entry.name for entry in view.iterdir()} == {
        "darkroom",
        *ENGINE,
        *NETWORKS,
        *("sdxl", "sdxl_stream", "sdxl_cancel"),
        *("sdxl_text_encoder", "sdxl_unet", "sdxl_text_encoder_2"),
    }
    for name in (entry.name for entry in view.iterdir()):
        assert config(view / name).name == name
    assert (view / "sdxl_unet" / "1" / "model.py").read_text() == "# unet"
    assert (view / "sdxl" / "1").resolve() == second / "stable_diffusion" / "1"
    assert (files(first), files(second)) == before
    # A server that is restarted finds it there.
    assert model_repository(models, view) == view


def test_an_engine_is_told_where_its_manifest_and_its_networks_are(
    first: Path, second: Path, tmp_path: Path
) -> None:
    models = read_models([Source(first), Source(second)])
    view = model_repository(models, tmp_path / "view")

    def parameters(name: str) -> dict[str, str]:
        entries = config(view / name).parameters
        return {key: entry.string_value for key, entry in entries.items()}

    assert parameters("stable_diffusion") == {"manifest": str(first / "manifest.json")}
    assert parameters("sdxl") == {
        "manifest": str(second / "manifest.json"),
        "network_prefix": "sdxl_",
    }
    assert parameters("sdxl_unet") == parameters("sdxl_stream") == {}


@pytest.mark.parametrize("model", ["darkroom", "stable_diffusion", "unet"])
def test_an_incomplete_repository_is_refused_by_its_missing_file(
    first: Path, tmp_path: Path, model: str
) -> None:
    (first / model / "config.pbtxt").unlink()
    with pytest.raises(ServeError, match=rf"shapes/{model}/config.pbtxt is missing; darkroom exp"):
        model_repository(read_models([Source(first)]), tmp_path / "view")


@pytest.mark.parametrize("config", [b"nonsense", b"\xff"])
def test_a_config_that_triton_could_not_read_is_named(
    first: Path, tmp_path: Path, config: bytes
) -> None:
    (first / "unet" / "config.pbtxt").write_bytes(config)
    with pytest.raises(ServeError, match=r"shapes/unet/config\.pbtxt: "):
        model_repository(read_models([Source(first, "a")]), tmp_path / "view")


def test_a_repository_without_streams_has_none(first: Path) -> None:
    for face in ENGINE[1:]:
        (first / face / "config.pbtxt").unlink()
        (first / face / "1" / "model.py").unlink()
        (first / face / "1").rmdir()
        (first / face).rmdir()

    (model,) = read_models([Source(first, "a")])
    assert (model.faces, list(model.folders)) == ([], ["a", "a_text_encoder", "a_unet"])
