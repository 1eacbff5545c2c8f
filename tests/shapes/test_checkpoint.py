"""The committed checkpoint: small, complete, loadable, its tokenizer files in agreement."""

import json
from pathlib import Path

import pytest

import shapes

pytestmark = pytest.mark.torch

CHECKPOINT = Path(shapes.__file__).parent / "checkpoint"
MAX_BYTES = 16 * 1024**2
TEXTS = [
    "",
    "a large red circle on a blue background",
    "SMALL Orange STAR, white background",
    "a photograph of an astronaut riding a horse",
    "naïve 42 zebras — don't 🙂",
    "  red   ring\non\tblack ",
]


def test_size() -> None:
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_weights_are_half_precision_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors")
    names = {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    found = {str(file.relative_to(CHECKPOINT)) for file in CHECKPOINT.rglob("*.safetensors")}
    assert found == names
    for name in names:
        with safetensors.safe_open(CHECKPOINT / name, "np") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a mapping)
                assert weights.get_slice(key).get_dtype() in {"F16", "I64"}


def test_tokenizer_files_agree() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = CHECKPOINT / "tokenizer"
    slow = transformers.CLIPTokenizer.from_pretrained(folder)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert slow.model_max_length == 77
    for text in TEXTS:
        ids = slow(text).input_ids
        assert ids == fast.encode(text).ids
        assert ids[0] == slow.bos_token_id
        assert ids[-1] == slow.eos_token_id
        assert slow.eos_token_id not in ids[1:-1]
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert vocabulary == slow.get_vocab()
    assert slow(TEXTS[1].upper()).input_ids == slow(TEXTS[1]).input_ids
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    assert merges[0].startswith("#version")
    assert len(merges) > 50


def test_special_token_ids_agree() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    config = json.loads((CHECKPOINT / "text_encoder" / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    assert config["vocab_size"] == len(tokenizer)
    for token in ("bos", "eos", "pad"):
        assert config[f"{token}_token_id"] == getattr(tokenizer, f"{token}_token_id")


def test_pipeline_loads_and_draws() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(CHECKPOINT)
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    assert isinstance(pipeline.scheduler, diffusers.UniPCMultistepScheduler)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.unet.config.sample_size == 16
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a large red circle on a blue background",
        num_inference_steps=12,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (128, 128)

    from shapes.classify import classify

    reading = classify(image)
    assert (reading.colour, reading.background) == ("red", "blue")
