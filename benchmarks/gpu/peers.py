"""diffusers' own pipelines over the same checkpoints: as most run them, and compiled."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.models import Model
from benchmarks.gpu.service import OUTPUT_FORMAT, SAMPLER
from benchmarks.workload import Request
from darkroom_engine import pictures
from darkroom_export.quiet import quieten
from equivalence.cases import SCHEDULERS


class Pipeline:
    """A diffusers pipeline with UniPC, on the model's device."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        """Load it."""
        quieten()
        self._clock = Clock(model.device)
        # A part that is left out must be said to be.
        index = json.loads((model.checkpoint / "model_index.json").read_text())
        left_out = {name: None for name, kind in index.items() if kind == [None, None]}
        self._pipeline = diffusers.DiffusionPipeline.from_pretrained(
            model.checkpoint, torch_dtype=dtype, **left_out
        )
        class_name, options = SCHEDULERS[SAMPLER]
        scheduler = getattr(diffusers, class_name)
        self._pipeline.scheduler = scheduler.from_config(self._pipeline.scheduler.config, **options)
        self._pipeline.set_progress_bar_config(disable=True)
        # A large VAE in float32, as SDXL's, has not the memory for a batch.
        self._pipeline.vae.enable_slicing()
        self._pipeline.to(model.device)

    def use_recipe(self, mode: str) -> None:
        """channels_last, and UNet and VAE compiled.

        Args:
            mode: of torch.compile, as `reduce-overhead`, which records CUDA graphs.
        """
        pipeline = self._pipeline
        # Nothing of a mode that was tried before.
        torch.compiler.reset()
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        # A compiler would make one program of all slices, which takes as many times as long.
        if not hasattr(pipeline, "upcast_vae"):
            pipeline.vae.disable_slicing()
        pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True)

    @property
    def is_sliced(self) -> bool:
        """Whether pictures of a batch are decoded one by one."""
        return bool(self._pipeline.vae.use_slicing)

    def latents(self, request: Request) -> NDArray[np.float32]:
        """(C, h, w), and nothing decoded."""
        made: torch.Tensor = self._run([request], "latent")
        array: NDArray[np.float32] = made[0].float().cpu().numpy()
        return array

    def levels(self, request: Request) -> NDArray[np.uint8]:
        """A picture, (H, W, 3)."""
        return np.asarray(self._run([request], "pil")[0])

    def pictures(self, requests: Sequence[Request]) -> list[bytes]:
        """Equal requests, in one batch, encoded as the engine encodes them."""
        made = self._run(requests, "pil")
        return [pictures.encode(np.asarray(picture), OUTPUT_FORMAT, {}) for picture in made]

    def seconds(self, requests: Sequence[Request]) -> float:
        """The time until all their pictures are encoded."""
        return self._clock.host_s(lambda: self.pictures(requests))

    def _run(self, requests: Sequence[Request], output_type: str) -> Any:
        first = requests[0]
        return self._pipeline(
            [request.prompt for request in requests],
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            # The CPU's generator: a seed means the same noise as in the engine.
            generator=[torch.Generator("cpu").manual_seed(it.seed) for it in requests],
            output_type=output_type,
        ).images


class ExactArithmetic:
    """No TF32 within the block, for references: cuDNN takes it by default."""

    def __enter__(self) -> None:
        self._before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before


def modes(*, is_gpu: bool) -> Mapping[str, str]:
    """Modes of torch.compile in the order in which they are tried, and what each is."""
    recorded = {"reduce-overhead": "with CUDA graphs, the usual recipe"}
    plain = {"default": "without CUDA graphs, if they fail"}
    return {**recorded, **plain} if is_gpu else plain
