"""Measure how well the shapes model follows its prompts.

``python -m shapes.evaluate`` draws 200 full prompts, of which 60 ask for combinations held out of
training, samples each with a seed of its own, reads the pictures with :mod:`shapes.classify`,
prints the fractions read as asked and writes them to a JSON file.
"""

import argparse
import json
import random
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from shapes.classify import Reading, classify
from shapes.draw import Combination, prompt, split

PROMPTS = 200
HELD_OUT_PROMPTS = 60
STEPS = 20
GUIDANCE = 5.0
BATCH = 20


def choose(
    count: int, held_out_count: int, seed: int
) -> tuple[list[Combination], list[Combination]]:
    """Distinct combinations: ``count - held_out_count`` seen ones and ``held_out_count`` others."""
    rng = random.Random(f"{seed} evaluate")
    seen, held_out = split()
    return rng.sample(seen, count - held_out_count), rng.sample(held_out, held_out_count)


def sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], seeds: list[int]
) -> list[Image.Image]:
    """One picture per prompt, each from its own seed, so that batching does not change them."""
    images = []
    for first in tqdm(range(0, len(prompts), BATCH), "sample"):
        part = slice(first, first + BATCH)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images += pipeline(
            prompts[part],
            generator=generator,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images
    return images


def accuracies(wanted: list[Combination], readings: list[Reading]) -> dict[str, float]:
    """Fraction read as asked, by word and for all of them together."""
    right = np.array([np.equal(w, astuple(r)) for w, r in zip(wanted, readings, strict=True)])
    shape, colour, size, background = right.mean(axis=0).tolist()
    return {
        "shape": shape,
        "colour": colour,
        "background": background,
        "size": size,
        "shape, colour and background": right[:, [0, 1, 3]].all(axis=1).mean().item(),
        "all": right.all(axis=1).mean().item(),
    }


def evaluate(
    checkpoint: Path,
    *,
    count: int = PROMPTS,
    held_out_count: int = HELD_OUT_PROMPTS,
    seed: int = 0,
    device: str = "cpu",
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Accuracies over all, seen and held-out prompts, and the prompts that were missed.

    With ``sheet`` the pictures are also saved there, twenty in a row, the held-out ones last.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.to(device).set_progress_bar_config(disable=True)
    seen, held_out = choose(count, held_out_count, seed)
    wanted = seen + held_out
    prompts = [prompt(combination) for combination in wanted]
    images = sample(pipeline, prompts, [seed + index for index in range(count)])
    if sheet is not None:
        contact_sheet(images).save(sheet)
    readings = [classify(image) for image in images]
    missed = [
        {"prompt": text, "read": " ".join(astuple(reading)), "held_out": index >= len(seen)}
        for index, (text, want, reading) in enumerate(zip(prompts, wanted, readings, strict=True))
        if astuple(reading) != want
    ]
    result = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": seed,
        "prompts": {"seen": len(seen), "held_out": len(held_out)},
        "overall": accuracies(wanted, readings),
        "missed": missed,
    }
    if seen:
        result["seen"] = accuracies(seen, readings[: len(seen)])
    if held_out:
        result["held_out"] = accuracies(held_out, readings[len(seen) :])
    return result


def contact_sheet(images: list[Image.Image], columns: int = 20) -> Image.Image:
    """The images side by side in rows, with a gap of two pixels."""
    width, height = images[0].width + 2, images[0].height + 2
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "grey")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("shapes/checkpoint"))
    parser.add_argument("--out", type=Path, default=Path("shapes/evaluation.json"))
    parser.add_argument("--sheet", type=Path, help="also save all pictures as one PNG")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    result = evaluate(args.checkpoint, device=args.device, sheet=args.sheet)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for part in ("overall", "seen", "held_out"):
        figures = ", ".join(f"{name} {value:.1%}" for name, value in result[part].items())
        tqdm.write(f"{part}: {figures}")


if __name__ == "__main__":
    main()
