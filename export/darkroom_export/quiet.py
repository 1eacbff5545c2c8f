"""Keeps the libraries' own progress bars and warnings out of ours."""

import logging

import diffusers
import transformers


def quieten() -> None:
    """Call it before the first pipeline class is looked up: diffusers imports them late."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # It warns of operators of torchvision, which no network here has.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
