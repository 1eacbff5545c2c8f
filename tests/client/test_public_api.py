"""What `import darkroom` promises."""

import importlib
import inspect
import tomllib
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

import darkroom

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_all_is_sorted_and_importable() -> None:
    assert darkroom.__all__ == sorted(darkroom.__all__)
    for name in darkroom.__all__:
        assert hasattr(darkroom, name)


def test_all_is_everything_public() -> None:
    public = {
        name
        for name, it in vars(darkroom).items()
        if not name.startswith("_") and not inspect.ismodule(it)
    }

    assert public | {"__version__"} == set(darkroom.__all__)


def test_every_exception_is_public() -> None:
    exceptions = importlib.import_module("darkroom.exceptions")
    classes = {name: it for name, it in vars(exceptions).items() if inspect.isclass(it)}
    errors = {name for name, it in classes.items() if issubclass(it, Exception)}

    assert len(errors) == 7
    assert errors <= set(darkroom.__all__)


def test_every_method_of_a_client_is_one_of_these() -> None:
    public = {name for name in vars(darkroom.Client) if not name.startswith("_")}

    assert public == {
        *("generate", "generate_latents", "stream", "cancel", "info", "is_ready", "close"),
    }


def test_every_event_is_public_and_frozen() -> None:
    for event in get_args(darkroom.Event):
        assert getattr(darkroom, event.__name__) is event
        assert event.__dataclass_params__.frozen


def test_the_package_is_typed() -> None:
    assert (Path(darkroom.__file__).parent / "py.typed").is_file()


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]

    assert darkroom.__version__ == project["version"]
    assert metadata.version("darkroom") == project["version"]


@pytest.mark.parametrize("client", [darkroom.Client, darkroom.AsyncClient])
def test_both_clients_have_the_same_methods_and_parameters(client: type) -> None:
    def signature(of: type, method: str) -> dict[str, object]:
        parameters = inspect.signature(getattr(of, method)).parameters
        # Only the default tells the synchronous client whether a list is wanted.
        return {name: it.kind for name, it in parameters.items()}

    methods = {name for name in vars(client) if not name.startswith("_")}
    assert methods == {name for name in vars(darkroom.Client) if not name.startswith("_")}
    for method in ("__init__", *methods):
        assert signature(client, method) == signature(darkroom.Client, method)


def test_the_options_are_the_parameters_of_both_clients() -> None:
    protocol = importlib.import_module("darkroom.protocol")
    options = set(darkroom.Options.__annotations__)

    assert options | {"prompt", "num_images_per_prompt"} == set(protocol._INPUTS)
