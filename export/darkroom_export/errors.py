"""The one error of an export."""


class ExportError(Exception):
    """The checkpoint cannot be exported; the text names the file and the reason."""


def first_line(error: Exception) -> str:
    """What a library's error says, for the end of a sentence that names the file."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
