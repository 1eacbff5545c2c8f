"""What may be asked for besides the prompt."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from darkroom.latents import Latents
from darkroom.uploads import PictureSource


class Options(TypedDict, total=False):
    """The optional parameters of a request; names and meanings are diffusers'.

    Pictures are PIL images, the bytes of a file, or paths. A PIL image travels as a PNG without its
    transparency.
    """

    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    """Above 1, classifier-free guidance is on, and the picture takes twice the work."""
    guidance_rescale: float | None
    """0 to 1: how far the guided prediction is brought back to the contrast of the unguided one."""
    guidance_start: float | None
    """0 to 1: the share of the steps that run unguided before guidance begins; 0 if left out."""
    guidance_stop: float | None
    """0 to 1: the share of the steps after which guidance ends; 1 if left out.

    Steps without guidance take half the work.
    """
    seed: int | None
    """0 to 2**63 - 1; left out, the client chooses one, and the picture tells which."""
    width: int | None
    """Pixels."""
    height: int | None
    """Pixels."""
    sampler: str | None
    eta: float | None
    """0 to 1: how much fresh noise each step adds, for the samplers "ddim" and "tcd"."""
    timestep_spacing: str | None
    """"linspace", "leading" or "trailing": which of the checkpoint's noise levels are used."""
    clip_skip: int | None
    """How many of the text encoder's last layers are passed over; 0 if left out."""
    max_embeddings_multiples: int | None
    """1 to 4: how many times 77 tokens of the prompt are read; 1 if left out."""

    image: PictureSource | Latents | None
    """What to start from in place of noise alone: image to image, and with a mask, inpainting."""
    mask_image: PictureSource | None
    """White where `image` is painted anew, black where it is kept."""
    strength: float | None
    """0 to 1: how much of `image` may change, and at 1 all; 0.8, or with a mask 1, if left out.

    It is the share of the steps that are made.
    """
    denoising_start: float | None
    """0 to 1: the share of the noise schedule that was done before: `image` is where that ended."""
    denoising_end: float | None
    """0 to 1: the share of the noise schedule after which another model is to go on.

    See `Client.generate_latents`.
    """

    original_size: tuple[int, int] | None
    """SDXL: (height, width) of the picture as if before it was scaled; small ones look blurred."""
    crops_coords_top_left: tuple[int, int] | None
    """SDXL: (top, left) of where the picture is as if cropped; (0, 0) centres what it shows."""
    target_size: tuple[int, int] | None
    """SDXL: (height, width) of the picture as if it was made for it; its own if left out."""
    aesthetic_score: float | None
    """SDXL's refiner: how pretty the picture is to be; 6 if left out."""
    negative_aesthetic_score: float | None
    """SDXL's refiner: how pretty what it is to differ from is; 2.5 if left out."""

    controlnet: str | Sequence[str] | None
    """The names of ControlNets that the server has, see `Client.info`."""
    control_image: PictureSource | Sequence[PictureSource] | None
    """What each ControlNet follows: edges, depths or whatever it was trained on."""
    controlnet_conditioning_scale: float | Sequence[float] | None
    """How much each ControlNet counts; one number is for all, 1 if left out."""
    control_guidance_start: float | Sequence[float] | None
    """0 to 1: the share of the steps at which each ControlNet begins; 0 if left out."""
    control_guidance_end: float | Sequence[float] | None
    """0 to 1: the share of the steps at which each ControlNet ends; 1 if left out."""

    lora: str | Sequence[str] | Mapping[str, float] | None
    """The names of adapters to mix, or a mapping of their names to their scales."""
    lora_scale: float | Sequence[float] | None
    """How much each adapter counts; one number is for all, 1 if left out."""
    variant: str | None
    """The name of a variant of the checkpoint, into whose weights adapters were fused."""

    priority: int | None
    """-10 to 10, larger goes first."""
    timeout_ms: int | None
    """After this time the server gives up on the request."""
    output_format: str | None
    """"png", "jpeg" or "webp", as which the picture travels."""
