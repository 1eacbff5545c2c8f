"""The safety checker of Stable Diffusion 1.x, with its thresholds in the graph."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from darkroom_export.networks import TOLERANCE, NetworkSpec, TensorSpec

NETWORK = "safety_checker"
_SPECIAL_CARE_ADJUSTMENT = 0.01


def safety_checker_spec(pipeline: Any) -> NetworkSpec:
    """The network that tells of a picture whether it is not safe for work."""
    checker = pipeline.safety_checker
    size = checker.config.vision_config.image_size
    num_concepts = len(checker.concept_embeds)
    return NetworkSpec(
        name=NETWORK,
        module=_SafetyChecker(checker),
        inputs=(TensorSpec("clip_input", torch.float32, (3, size, size)),),
        outputs=(
            TensorSpec("has_nsfw_concept", torch.float32, ()),
            TensorSpec("concept_scores", torch.float32, (num_concepts,)),
        ),
        tolerance=TOLERANCE,
        # A decision is not to depend on the precision.
        float32_parts=("",),
    )


def describe_safety_checker(pipeline: Any) -> dict[str, Any]:
    """The manifest's record: how a picture becomes the network's input."""
    extractor = pipeline.feature_extractor
    return {
        "network": NETWORK,
        "size": pipeline.safety_checker.config.vision_config.image_size,
        "mean": list(extractor.image_mean),
        "std": list(extractor.image_std),
    }


class _SafetyChecker(nn.Module):
    """1 for each row that comes closer to a concept than allowed, and by how much it does so.

    As diffusers does, it rounds to three decimals, and is stricter where a concept of special care
    is near.
    """

    def __init__(self, checker: Any) -> None:
        super().__init__()
        self.checker: Any = checker

    def forward(self, clip_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        checker = self.checker
        embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
        special = _cosines(embeds, checker.special_care_embeds)
        is_special = _rounded(special - checker.special_care_embeds_weights).amax(dim=1) > 0
        scores = _cosines(embeds, checker.concept_embeds) - checker.concept_embeds_weights
        scores = scores + _SPECIAL_CARE_ADJUSTMENT * is_special.float().unsqueeze(1)
        return (_rounded(scores).amax(dim=1) > 0).float(), scores


def _cosines(embeds: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """(B, K) of (B, D) and (K, D)."""
    return functional.normalize(embeds) @ functional.normalize(concepts).T


def _rounded(scores: torch.Tensor) -> torch.Tensor:
    return torch.round(scores * 1000)
