"""A checkpoint's own scheduler, and the one that the engine's solver is checked against."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from darkroom_export.errors import ExportError, first_line
from darkroom_export.weights import read_json

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

_REFUSED_DISCRETE = (
    "thresholding",
    "use_flow_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "sigma_min",
    "sigma_max",
    "shift_terminal",
)
_REFUSED_FLOW = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
_LINEAR_SIGMAS = {"interpolation_type": "linear", "timestep_type": "discrete"}
"""Keys of EulerDiscreteScheduler, with the only values that are supported."""

_FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"


def load_scheduler(folder: Path, *, is_flow: bool) -> Any:
    """The scheduler that a folder describes, if it is one that the engine can follow.

    Raises:
        ExportError: the file is missing or malformed, or `check_scheduler` refuses what it says.
    """
    file = folder / "scheduler_config.json"
    config = read_json(file)
    class_name = config.get("_class_name")
    kind: Any = getattr(diffusers, str(class_name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ExportError(f"{file}: _class_name {class_name!r} is no scheduler of diffusers")
    # First, since some of what is refused needs a package that is not there.
    check_scheduler(str(file), kind, config, is_flow=is_flow)
    made: Any = kind
    try:
        return made.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the schedulers raise many kinds
        raise ExportError(f"{file}: {first_line(error)}") from error


def check_scheduler(where: str, kind: type, config: Mapping[str, Any], *, is_flow: bool) -> None:
    """Refuse a scheduler of another kind, or that does what the engine cannot do.

    Raises:
        ExportError: names the key of the config.
    """
    if is_flow:
        if kind.__name__ != _FLOW_MATCH:
            raise ExportError(
                f"{where}: {kind.__name__} is not supported here, there is {_FLOW_MATCH}"
            )
        _refuse(where, config, _REFUSED_FLOW)
        return
    # Those of EDM and of flow matching have sigmas of another kind.
    if "beta_schedule" not in inspect.signature(kind).parameters:
        raise ExportError(f"{where}: {kind.__name__} is not supported here")
    _refuse(where, config, _REFUSED_DISCRETE)
    for key, supported in _LINEAR_SIGMAS.items():
        if config.get(key, supported) != supported:
            raise ExportError(
                f"{where}: {key} {config[key]!r} is not supported, there is {supported}"
            )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ExportError(
            f"{where}: prediction_type {prediction_type!r} is not supported, "
            f"there are {', '.join(PREDICTION_TYPES)}"
        )


def unipc(where: str, scheduler: Any) -> Any:
    """UniPC with the noise schedule that the checkpoint's own scheduler describes.

    Raises:
        ExportError: UniPC does not know the schedule.
    """
    try:
        return diffusers.UniPCMultistepScheduler.from_config(scheduler.config)
    except Exception as error:  # as above
        raise ExportError(f"{where}: scheduler: {first_line(error)}") from error


def _refuse(where: str, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if config.get(key):
            raise ExportError(f"{where}: {key} is not supported")
