"""Parts of the command whose packages are not always installed."""

from darkroom.exceptions import DarkroomError


class extra:  # noqa: N801  reads as a statement
    """Turns a missing package into the command that installs it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise DarkroomError(
                f"this needs the package {error.name}: pip install 'darkroom[{self._name}]'"
            ) from error
