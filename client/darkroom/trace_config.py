"""Settings of Triton's tracing."""

import re

from darkroom.serve_error import ServeError

_SETTINGS = {
    None: ("mode", "level", "rate", "count"),
    "triton": ("file", "log-frequency"),
    "opentelemetry": (
        *("url", "resource"),
        *("bsp_max_queue_size", "bsp_schedule_delay", "bsp_max_export_batch_size"),
    ),
}


def check_trace_setting(setting: str) -> None:
    """Refuse what Triton would refuse with its whole usage, or take and never look at.

    Raises:
        ServeError: names the forms that there are.
    """
    match = re.fullmatch(r"(?:(triton|opentelemetry),)?([^,=]+)=(.+)", setting)
    allowed = _SETTINGS[match[1]] if match else ()
    if match is None or match[2] not in allowed:
        forms = (
            f"{f'{mode},' if mode else ''}{'|'.join(names)}=VALUE"
            for mode, names in _SETTINGS.items()
        )
        raise ServeError(f"trace-config: {setting!r} is none of {', '.join(forms)}")
