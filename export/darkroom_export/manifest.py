"""What the engine is told of a checkpoint before its networks are exported."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers

from darkroom_export.backend import Backend
from darkroom_export.checkpoint import Checkpoint
from darkroom_export.controlnet import ControlNet
from darkroom_export.errors import ExportError
from darkroom_export.families import FAMILIES, Family, size_limits, text_encoders, vae_scale_factor
from darkroom_export.networks import residuals
from darkroom_export.precision import Precision

MANIFEST_FORMAT = 4
MAX_NUM_INFERENCE_STEPS = 150
MAX_GUIDANCE_SCALE = 50.0
NUM_STEPS_OF_DISTILLED = 4
GUIDANCE_SCALE_OF_LCM = 8.5
"""As diffusers' pipeline has it, for a UNet that takes its guidance as an input."""
_TURBO_SAMPLERS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
_SOLVER_KEYS = (
    "solver_order",
    "solver_type",
    "predict_x0",
    "lower_order_final",
    "disable_corrector",
    "use_karras_sigmas",
    "final_sigmas_type",
)


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say so gets; None is the checkpoint's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        steps, scale = self.num_inference_steps, self.guidance_scale
        if steps is not None and not 1 <= steps <= MAX_NUM_INFERENCE_STEPS:
            raise ExportError(
                f"num_inference_steps: {steps} is not between 1 and {MAX_NUM_INFERENCE_STEPS}"
            )
        if scale is not None and not 0 <= scale <= MAX_GUIDANCE_SCALE:
            raise ExportError(
                f"guidance_scale: {scale} is not between 0 and {MAX_GUIDANCE_SCALE:g}"
            )

    def given(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


def describe(
    checkpoint: Checkpoint,
    backend: Backend,
    precision: Precision,
    defaults: Defaults,
    controlnets: list[ControlNet],
) -> dict[str, Any]:
    """All of the manifest that is known before the networks are exported, but the tokenizers."""
    pipeline = checkpoint.pipeline
    family = FAMILIES[checkpoint.family]
    vae_config = pipeline.vae.config
    return {
        "format": MANIFEST_FORMAT,
        "family": checkpoint.family,
        "checkpoint": {"source": checkpoint.files.source, "sha256": checkpoint.files.sha256},
        "precision": str(precision),
        "backend": str(backend),
        "latents": {
            "channels": vae_config.latent_channels,
            "vae_scale_factor": vae_scale_factor(pipeline),
            "vae_scaling_factor": float(vae_config.scaling_factor),
            "vae_shift_factor": float(vae_config.get("shift_factor") or 0.0),
        },
        "noise_schedule": _noise_schedule(pipeline.scheduler, family),
        "solver": _solver(pipeline.scheduler),
        "denoiser": _denoiser(pipeline, family, is_controlled=bool(controlnets)),
        "controlnets": {net.name: {"network": net.network} for net in controlnets},
        "loras": {},
        "variants": {},
        "safety_checker": None,
        "limits": _limits(checkpoint, family, defaults),
        "networks": {},
        "versions": {tool: metadata.version(tool) for tool in ("darkroom", *_TOOLS)},
    }


def describe_text(pipeline: Any, family: Family, target: Path) -> dict[str, Any]:
    """Write the tokenizers; returns the manifest's record of them and of what follows them."""
    has_t5 = any(encoder.kind == "t5" for encoder in text_encoders(family, pipeline))
    denoiser = getattr(pipeline, family.denoiser).config
    is_sd3 = family.denoiser == "transformer"
    return {
        "encoders": [
            {
                "network": encoder.network,
                "kind": encoder.kind,
                "tokenizer": _write_tokenizer(
                    getattr(pipeline, encoder.tokenizer),
                    family.t5_length if encoder.kind == "t5" else None,
                    target / encoder.tokenizer,
                ),
                "hidden": encoder.hidden,
                "layers": None if encoder.kind == "t5" else "hidden_states",
                "pooled": "text_embeds" if encoder.is_pooled else None,
            }
            for encoder in text_encoders(family, pipeline)
        ],
        "hidden_size": denoiser.joint_attention_dim if is_sd3 else denoiser.cross_attention_dim,
        "pooled_input": family.pooled_input,
        "empty_negative": (
            "zeros" if pipeline.config.get("force_zeros_for_empty_prompt") else "encode"
        ),
        "num_blank_tokens": 0 if has_t5 else family.t5_length,
    }


def _write_tokenizer(tokenizer: Any, max_length: int | None, folder: Path) -> dict[str, Any]:
    """Write the tokenizer in the one file that the engine reads; returns its manifest record."""
    folder.mkdir()
    file = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return {
        "file": f"{folder.name}/{file.name}",
        "max_length": tokenizer.model_max_length if max_length is None else max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _noise_schedule(scheduler: Any, family: Family) -> dict[str, Any]:
    config = scheduler.config
    if family.denoiser == "transformer":
        return {
            "prediction_type": "flow_prediction",
            "shift": float(config.shift),
            "num_train_timesteps": config.num_train_timesteps,
        }
    alphas_cumprod = scheduler.alphas_cumprod
    return {
        "train_sigmas": (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).tolist(),
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": config.steps_offset,
        # A key of DDIM's, which other schedulers carry along.
        "set_alpha_to_one": bool(config.get("set_alpha_to_one", True)),
    }


def _solver(scheduler: Any) -> dict[str, Any]:
    """UniPC's settings: its own defaults where the scheduler is another."""
    defaults = diffusers.UniPCMultistepScheduler().config
    return {key: scheduler.config.get(key, defaults[key]) for key in _SOLVER_KEYS}


def _denoiser(pipeline: Any, family: Family, *, is_controlled: bool) -> dict[str, Any]:
    config = getattr(pipeline, family.denoiser).config
    return {
        "network": family.denoiser,
        "sample": family.sample,
        "output": family.output,
        "extra_channels": config.in_channels - pipeline.vae.config.latent_channels,
        "time_ids": list(family.time_ids),
        "guidance_embedding_size": config.get("time_cond_proj_dim") or 0,
        "residuals": [vars(residual) for residual in residuals(pipeline)] if is_controlled else [],
    }


def _limits(checkpoint: Checkpoint, family: Family, defaults: Defaults) -> dict[str, Any]:
    pipeline = checkpoint.pipeline
    sizes = size_limits(pipeline, family)
    own = _own_defaults(checkpoint, family) | defaults.given()
    if own["sampler"] not in family.samplers:
        raise ExportError(
            f"sampler: {own['sampler']!r} does not exist for this checkpoint, there are "
            f"{', '.join(family.samplers)}"
        )
    return {
        "default_width": sizes.default,
        "default_height": sizes.default,
        **{f"default_{name}": value for name, value in own.items()},
        "size_multiple": sizes.multiple,
        "min_size": sizes.min,
        "max_size": sizes.max,
        "max_num_inference_steps": MAX_NUM_INFERENCE_STEPS,
        "max_guidance_scale": MAX_GUIDANCE_SCALE,
        "max_num_images_per_prompt": 16,
        # At least one layer reads the prompt; that which conditions in later families is not last.
        "max_clip_skip": min(
            getattr(pipeline, encoder.network).config.num_hidden_layers
            - (1 if encoder.hidden == "last_hidden_state" else 2)
            for encoder in text_encoders(family, pipeline)
            if encoder.kind == "clip"
        ),
        "max_embeddings_multiples": family.max_embeddings_multiples,
    }


def _own_defaults(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """What the checkpoint was made for, as its own scheduler tells."""
    own = checkpoint.own_scheduler
    class_name = type(own).__name__
    if class_name == "LCMScheduler":
        has_guidance = checkpoint.pipeline.unet.config.time_cond_proj_dim is not None
        return {
            "num_inference_steps": NUM_STEPS_OF_DISTILLED,
            "guidance_scale": GUIDANCE_SCALE_OF_LCM if has_guidance else 1.0,
            "sampler": "lcm",
        }
    if class_name in _TURBO_SAMPLERS and own.config.get("timestep_spacing") == "trailing":
        return {
            "num_inference_steps": NUM_STEPS_OF_DISTILLED,
            "guidance_scale": 0.0,
            "sampler": _TURBO_SAMPLERS[class_name],
        }
    return {
        "num_inference_steps": family.num_inference_steps,
        "guidance_scale": family.guidance_scale,
        "sampler": family.sampler,
    }
