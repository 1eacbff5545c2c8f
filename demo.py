"""The demo: export the embedded checkpoint, serve it, make one picture, and stop.

Run by `make demo`.
"""

import sys
import time
from pathlib import Path

from darkroom import Client, DarkroomError
from darkroom.progress import terminal_progress
from darkroom.server import Server, free_ports

CHECKPOINT = Path(__file__).parent / "shapes" / "checkpoint"
REPOSITORY = Path(__file__).parent / "build" / "shapes"


def main(prompt: str, out: Path) -> int:
    """Make a picture of `prompt` and save it as `out`; returns the exit status."""
    # Imports PyTorch, which takes seconds.
    with terminal_progress("importing PyTorch and diffusers"):
        from darkroom_export import ExportError, export_checkpoint  # noqa: PLC0415

    start = time.monotonic()
    try:
        is_new = export_checkpoint(str(CHECKPOINT), REPOSITORY, progress=terminal_progress)
        with Server(REPOSITORY, free_ports(), terminal_progress) as server:
            with Client(server.grpc_url) as client, terminal_progress("generating the picture"):
                picture = client.generate(prompt)
            out.write_bytes(picture.encoded)
    except (DarkroomError, ExportError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    networks = "was exported to ONNX, compared with PyTorch" if is_new else "had been exported"
    print(
        f"""
{out}: "{prompt}", {picture.width}x{picture.height}, seed {picture.seed}

What happened: the checkpoint in shapes/checkpoint {networks},
and served from build/shapes by a real tritonserver, which denoised the picture
in {picture.timings["denoise_ms"]:.0f} ms and was stopped again. All of it took \
{time.monotonic() - start:.0f} s.

Next:
  make demo PROMPT="a small yellow star on a black background"
  make serve                                  and, in another terminal,
  .venv/bin/darkroom generate "a green square" -o square.png"""
    )
    for note in picture.notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
