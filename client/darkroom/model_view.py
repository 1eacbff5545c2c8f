"""One model repository out of several, for a server whose models all need names of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from darkroom.protocol import MODEL
from darkroom.serve_error import ServeError
from darkroom.served_models import SERVER_MODEL, ServedModel

CONFIG = "config.pbtxt"


def model_repository(models: Sequence[ServedModel], view: Path) -> Path:
    """Where Triton finds the models under the names that they have in this server.

    A repository whose models keep their names is that itself. Otherwise a folder is made at `view`
    that links to the repositories' files, which stay as they are.

    Raises:
        ServeError: a repository is incomplete, or has a config that Triton could not read.
    """
    for model in models:
        for folder in (*model.folders.values(), model.repository / SERVER_MODEL):
            if not (folder / CONFIG).is_file():
                raise ServeError(
                    f"{folder / CONFIG} is missing; darkroom export brings an older repository up "
                    "to date"
                )
    if [model.name for model in models] == [MODEL]:
        return models[0].repository
    if not view.exists():
        view.mkdir()
        (view / SERVER_MODEL).symlink_to(models[0].repository / SERVER_MODEL)
        for model in models:
            for name, folder in model.folders.items():
                _link_model(model, name, folder, view / name)
    return view


def read_config(path: Path) -> Any:
    """A model's config.

    Raises:
        ServeError: it cannot be read.
    """
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ServeError(f"{path}: {error}") from None


def _link_model(model: ServedModel, name: str, folder: Path, link: Path) -> None:
    link.mkdir()
    for entry in folder.iterdir():
        if entry.name != CONFIG:
            (link / entry.name).symlink_to(entry)
    config = read_config(folder / CONFIG)
    config.name = name
    if name == model.name:
        manifest = model.repository / "manifest.json"
        config.parameters["manifest"].string_value = str(manifest)
        if model.network_prefix:
            config.parameters["network_prefix"].string_value = model.network_prefix
    (link / CONFIG).write_text(text_format.MessageToString(config))
