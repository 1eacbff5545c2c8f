"""The engine refuses a repository that is not the verified one, and says what is wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_networks import FakeNetworks

from darkroom_engine import Engine, EngineConfig, Manifest, ManifestError


def rewrite(repository: Path, document: dict[str, Any], network: str, **changes: Any) -> Path:
    changed = json.loads(json.dumps(document))
    changed["networks"][network].update(changes)
    path = repository / "manifest.json"
    path.write_text(json.dumps(changed))
    return path


def test_a_file_with_the_certified_hash_is_accepted(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    (repository / "model.onnx").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path = rewrite(repository, manifest_document, "unet", files={"model.onnx": digest})

    assert Manifest.load(path).networks["unet"].files == {"model.onnx": digest}


def test_a_changed_file_is_refused_by_name(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    (repository / "model.onnx").write_bytes(b"tampered")
    path = rewrite(repository, manifest_document, "unet", files={"model.onnx": "0" * 64})

    with pytest.raises(
        ManifestError, match=r"unet: .*model.onnx is not the file that was verified"
    ):
        Manifest.load(path)


def test_a_missing_file_is_refused_by_name(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    path = rewrite(repository, manifest_document, "vae_decoder", files={"gone.onnx": "0" * 64})

    with pytest.raises(ManifestError, match=r"vae_decoder: .*gone.onnx is missing"):
        Manifest.load(path)


def with_adapter(repository: Path, document: dict[str, Any], record: Any) -> Path:
    path = repository / "manifest.json"
    path.write_text(json.dumps({**document, "loras": {"ink": record}}))
    return path


def test_the_files_of_adapters_are_verified_too(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    record = {"rank": 4, "networks": ["unet"], "files": {"ink.safetensors": digest}}
    path = with_adapter(repository, manifest_document, record)

    with pytest.raises(ManifestError, match=r"ink: .*ink\.safetensors is missing"):
        Manifest.load(path)
    (repository / "ink.safetensors").write_bytes(b"weights")
    assert Manifest.load(path).loras == ("ink",)
    (repository / "ink.safetensors").write_bytes(b"tampered")
    with pytest.raises(ManifestError, match=r"ink: .* is not the file that was verified"):
        Manifest.load(path)


def test_an_adapter_without_a_record_is_refused(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    path = with_adapter(repository, manifest_document, None)

    with pytest.raises(ManifestError, match="is missing or malformed"):
        Manifest.load(path)


def test_a_network_that_something_unknown_runs_is_refused_by_name(
    repository: Path, manifest_document: dict[str, Any]
) -> None:
    path = rewrite(repository, manifest_document, "unet", backend="openvino")

    with pytest.raises(
        ManifestError,
        match=r"unet: backend .openvino. is not known .* python, onnxruntime, tensorrt, torch are",
    ):
        Manifest.load(path)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_an_unverified_network_is_refused_by_name(
    repository: Path, manifest_document: dict[str, Any], error: float
) -> None:
    verification = {"error": error, "tolerance": 1e-4}
    path = rewrite(repository, manifest_document, "unet", verification=verification)

    with pytest.raises(ManifestError, match=r"unet: measured error .* is not within its tolerance"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: this is no exported repository"),
        ("{", "is not JSON"),
        ("[]", "missing or malformed"),
        ('{"format": 4}', "'name' is missing or malformed"),
        ('{"format": 1}', "format 1, but this engine reads 4; export the checkpoint again"),
        ('{"format": 99}', "format 99, but this engine reads 4; export the checkpoint again"),
    ],
)
def test_an_unreadable_manifest_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ManifestError, match=message):
        Manifest.load(path)


def test_the_preview_is_read(repository: Path, manifest_document: dict[str, Any]) -> None:
    manifest = Manifest.load(repository / "manifest.json")

    preview = manifest_document["preview"]
    assert np.allclose(manifest.preview_matrix, preview["matrix"])
    assert np.allclose(manifest.preview_bias, preview["bias"])
    assert manifest.preview_matrix.shape == (4, 3)
    assert manifest.preview_matrix.dtype == manifest.preview_bias.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matrix": [[1, 2, 3]] * 3},
            r"preview: matrix is .* not finite numbers of shape \(4, 3\)",
        ),
        ({"matrix": [[1, 2]] * 4}, r"preview: matrix is .* not finite numbers of shape \(4, 3\)"),
        ({"matrix": [[float("nan")] * 3] * 4}, "preview: matrix is .*nan"),
        ({"matrix": [[1, 2, 3], [4]]}, "is missing or malformed"),
        ({"matrix": "red"}, "is missing or malformed"),
        ({"bias": [0, 0]}, r"preview: bias is \[0.0, 0.0\], not finite numbers of shape \(3,\)"),
        ({"bias": None}, "preview: bias is nan, not finite|is missing or malformed"),
    ],
)
def test_a_preview_of_something_else_is_refused(
    repository: Path, manifest_document: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    preview = {**manifest_document["preview"], **changes}
    path = repository / "manifest.json"
    path.write_text(json.dumps({**manifest_document, "preview": preview}))

    with pytest.raises(ManifestError, match=message):
        Manifest.load(path)


def test_more_rows_than_the_unet_takes_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="max_rows: 64 is above the 63 that the unet takes"):
        Engine(manifest, FakeNetworks(), EngineConfig(max_rows=64))
