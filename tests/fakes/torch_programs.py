"""Small programs of torch.export, as an export writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim


def write_program(
    path: Path,
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic: Sequence[Any] | None = None,
) -> Path:
    """Write `module`, which takes the inputs in their order, for any number of rows.

    Args:
        inputs: an example of each, with as many rows as that of all others.
        dynamic: the dynamic axes of each, where they are more, or others, than the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Dim("batch", min=1, max=63)
    shapes = tuple(dynamic) if dynamic else tuple({0: rows} for _ in inputs)
    program = torch.export.export(
        module.eval(), tuple(inputs.values()), dynamic_shapes=shapes, strict=False
    )
    names = json.dumps({"inputs": list(inputs), "outputs": list(outputs), "allow_tf32": False})
    torch.export.save(program, path, extra_files={"tensors.json": names})
    return path
