"""The one error of an export."""


class ExportError(Exception):
    """The checkpoint cannot be exported; the text names the file and the reason."""
