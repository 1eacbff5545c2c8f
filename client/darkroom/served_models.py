"""The models of a server: of one repository or of several, each under names of its own."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.protocol import CANCEL_SUFFIX, MODEL, STREAM_SUFFIX
from darkroom.serve_error import ServeError

SERVER_MODEL = "darkroom"
"""The model that every server has once: it tells of the others, and publishes their metrics."""
MAX_NAME_LENGTH = 48
"""The engine's socket, whose path must be short, is named by the model."""
TORCH = "torch"
"""The backend of networks that can run in the engine's process."""
_NATIVE_BACKENDS = {"onnxruntime", "tensorrt"}
"""Those of Triton's own; what else runs networks are Python models."""
_FACES = (STREAM_SUFFIX, CANCEL_SUFFIX)
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME_LENGTH - 1}}}")


@dataclass(frozen=True)
class Source:
    """A repository that is to be served, and the name that its model is to have."""

    path: Path
    name: str | None = None
    """None leaves it to the server."""

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read `PATH` or `NAME=PATH`; `./a=b` is a path."""
        name, is_named, path = text.partition("=")
        if not is_named or "/" in name:
            return cls(Path(text))
        return cls(Path(path), name)


@dataclass(frozen=True)
class ServedModel:
    """The engine of one repository, with its faces and its networks, as this server names them."""

    name: str
    repository: Path
    min_size: int
    """Pixels of the smallest picture that it makes."""
    first_mode: str
    """"text2img" where it makes pictures of a text alone, "img2img" or "inpaint" where not."""
    own_networks: tuple[str, ...]
    """Those that are Triton's models, as the repository names them."""
    backends: tuple[str, ...] = ()
    """What runs its networks, as the manifest says."""
    is_in_process: bool = False
    """Its networks run in the engine's process, and are no models of Triton's."""

    @property
    def triton_backends(self) -> set[str]:
        """Triton's names of the backends that its models need; the engine is one of Python's."""
        return {"python", *(set(self.backends) & _NATIVE_BACKENDS)}

    @property
    def network_prefix(self) -> str:
        """What this server puts before the networks' names."""
        return "" if self.name == MODEL else f"{self.name}_"

    @property
    def networks(self) -> list[str]:
        return [self.network_prefix + network for network in self.own_networks]

    @property
    def faces(self) -> list[str]:
        """The models beside the engine that answer its clients."""
        return [
            self.name + suffix for suffix in _FACES if (self.repository / (MODEL + suffix)).is_dir()
        ]

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each of its models, by the name that this server gives it."""
        faces = {
            face: self.repository / (MODEL + face.removeprefix(self.name)) for face in self.faces
        }
        networks = zip(self.networks, self.own_networks, strict=True)
        return {
            self.name: self.repository / MODEL,
            **faces,
            **{name: self.repository / network for name, network in networks},
        }


def read_models(
    sources: Sequence[Source], *, is_in_process: bool | None = None
) -> list[ServedModel]:
    """The models of some repositories: the first that no name was chosen for keeps its own names.

    Args:
        is_in_process: whether networks that are PyTorch's run in the engine's process; None does so
            where there are such.

    Raises:
        ServeError: a repository is none, or a name is none or another model's as well, or it was
            chosen where networks run that can run in one place only.
    """
    models = []
    for source, name in zip(sources, _names(sources), strict=True):
        repository = source.path.resolve()
        manifest = _read_manifest(repository)
        backends = _backends(manifest["networks"])
        is_torch = backends == (TORCH,)
        if is_in_process is not None and not is_torch:
            raise ServeError(
                f"{repository}: its networks are run by {', '.join(backends)}, as Triton's models; "
                f"only those of the backend {TORCH} can be run elsewhere"
            )
        is_inside = is_torch and is_in_process is not False
        models.append(
            ServedModel(
                name=name,
                repository=repository,
                min_size=int(manifest["limits"]["min_size"]),
                first_mode=_first_mode(manifest.get("denoiser", {})),
                own_networks=() if is_inside else tuple(manifest["networks"]),
                backends=backends,
                is_in_process=is_inside,
            )
        )
    _check_names(models)
    return models


def _names(sources: Sequence[Source]) -> Iterator[str]:
    default: str | None = MODEL
    for source in sources:
        if source.name is not None:
            if not _NAME.fullmatch(source.name):
                raise ServeError(
                    f"{source.name!r} cannot be the name of a model, which is a letter or digit "
                    f"and then up to {MAX_NAME_LENGTH - 1} letters, digits, '_', '-' and '.'"
                )
            yield source.name
        elif default:
            yield default
            default = None
        else:
            yield _folder_name(source.path)


def _folder_name(path: Path) -> str:
    """The name of a folder, or as much of it as a model may be called."""
    folder = path.resolve().name
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder).lstrip("_.-")[:MAX_NAME_LENGTH]
    if not name:
        raise ServeError(f"{path}: no model can be called {folder!r}; NAME=PATH chooses a name")
    return name


def _check_names(models: Sequence[ServedModel]) -> None:
    owners: dict[str, str] = {SERVER_MODEL: "the server itself"}
    for model in models:
        for name in model.folders:
            if name in owners:
                raise ServeError(
                    f"{model.repository}: its model {name!r} would be called as one of "
                    f"{owners[name]}; NAME=PATH chooses another name"
                )
        owners |= dict.fromkeys(model.folders, str(model.repository))


def _backends(networks: dict[str, Any]) -> tuple[str, ...]:
    """What runs them; of older repositories, which do not say so, the engine tells."""
    return tuple(sorted({record.get("backend", "python") for record in networks.values()}))


def _first_mode(denoiser: dict[str, Any]) -> str:
    """The first of the engine's modes, which it tells from the same."""
    if denoiser.get("extra_channels"):
        return "inpaint"
    # A refiner.
    return "img2img" if "aesthetic_score" in denoiser.get("time_ids", ()) else "text2img"


def _read_manifest(repository: Path) -> dict[str, Any]:
    """What the manifest says of a repository; the engine checks it in full."""
    path = repository / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(manifest["networks"], dict):
            raise TypeError("networks is no object")
        _backends(manifest["networks"])
        int(manifest["limits"]["min_size"])
    except FileNotFoundError:
        raise ServeError(
            f"{path} is missing: {repository} is no exported repository; "
            "darkroom export CHECKPOINT REPOSITORY makes one"
        ) from None
    except OSError as error:
        raise ServeError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServeError(f"{path}: malformed, {error!r}") from None
    return manifest
