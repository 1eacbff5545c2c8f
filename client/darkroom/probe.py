"""The smallest picture a server makes: only that shows that all of it works."""

from PIL import Image

from darkroom.client import Client
from darkroom.options import Options
from darkroom.picture import Picture

PRIORITY = 10
"""The highest: a probe waits for nobody, and its one step holds nobody up."""


def probe(client: Client, timeout: float, size: int, mode: str) -> Picture:
    """Ask for a picture of one step.

    Its seed is a new one each time, since a response cache would answer an equal request without
    asking the engine.

    Args:
        timeout: seconds for all of it.
        size: its width and height.
        mode: one that the model is for; "img2img" starts from a grey picture, and "inpaint" paints
            all of one anew.

    Raises:
        QueueFull: too many requests wait; whoever says so is alive.
        DarkroomError: the server failed, or gave no answer.
    """
    fields: Options = {
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "priority": PRIORITY,
        "width": size,
        "height": size,
    }
    if mode != "text2img":
        fields["image"] = Image.new("RGB", (size, size), "grey")
        # Less would leave nothing of the one step.
        fields["strength"] = 1.0
    if mode == "inpaint":
        fields["mask_image"] = Image.new("L", (size, size), "white")
    return client.generate("", timeout=timeout, **fields)
