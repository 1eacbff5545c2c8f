"""Train the shapes model from nothing: tokenizer, autoencoder, then UNet and text encoder jointly.

``python -m shapes.train`` runs the whole recipe and writes a diffusers pipeline folder. It can be
stopped at any time and started again: it goes on from the last saved state. The pictures are drawn
and the captions worded as they are needed, each from a seed made of ``--seed`` and the iteration.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from tokenizers import Regex as TokenizerRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shapes.draw import IMAGE_SIZE, Combination, caption, combinations, draw, jitter, split

VAE_ITERATIONS = 2600
VAE_BATCH = 8
VAE_LEARNING_RATE = 1.5e-3
VAE_DECAY = 1000
EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-4

JITTERS = 32
"""Drawings per training combination in the latent cache."""

UNET_ITERATIONS = 4800
UNET_BATCH = 32
CPU_WORKERS = 2
UNET_LEARNING_RATE = 6e-4
UNET_DECAY = 1200
EMA_DECAY = 0.995
MIN_SNR_GAMMA = 5.0
DROPPED_PROMPTS = 0.1
LAYOUT = range(1500, 2250)
"""Iterations that favour the noisiest timesteps, which decide what is where."""
SMALL_WEIGHT = 2
STAR_WEIGHT = 2
"""How much more often small shapes, and stars, are shown after that: thin arms are learnt last."""

WARMUP = 100
SAVE_EVERY = 250
VOCABULARY_SIZE = 768
TOKENS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def learning_rate(iteration: int, iterations: int, decay: int, peak: float) -> float:
    """Linear warm-up, then constant, then half a cosine to zero over the last ``decay`` steps."""
    warm = min(1.0, (iteration + 1) / WARMUP)
    left = min(1.0, (iterations - iteration) / decay)
    return peak * warm * 0.5 * (1 - math.cos(math.pi * left))


def generators(seed: int, stage: str, iteration: int) -> tuple[random.Random, torch.Generator]:
    """The sources of randomness of one iteration, so that a resumed run repeats an unbroken one."""
    rng = random.Random(f"{seed} {stage} {iteration}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(63))


def autocast(device: torch.device) -> torch.autocast:
    """Half-precision arithmetic with float32 weights."""
    return torch.autocast(device.type, torch.bfloat16)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images as float32 (n, 3, height, width) in [-1, 1]."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def write_atomically(state: object, path: Path) -> None:
    """Save so that an interruption leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


# --- tokenizer ----------------------------------------------------------------------------------


def build_tokenizer(seed: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format, its merges learnt from captions.

    All 256 bytes, bare and with ``</w>``, are in the vocabulary, so any UTF-8 text has tokens.
    """
    rng = random.Random(f"{seed} tokenizer")
    captions = [caption(combination, rng) for combination in combinations() for _ in range(20)]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizerRegex(r"[\p{L}]+|[^\s\p{L}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, end_of_word_suffix="</w>")
    )
    with tempfile.TemporaryDirectory() as folder:
        _, merges_file = trained.model.save(folder)
        lines = Path(merges_file).read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    tokens += ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys([*tokens, BOS, EOS]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=TOKENS, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json and, beside it, the older vocab.json, merges.txt and special tokens."""
    # Tokenizing a batch leaves its padding and truncation set; neither belongs in the file.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    special = json.dumps(tokenizer.special_tokens_map, indent=2)
    (folder / "special_tokens_map.json").write_text(special + "\n", "utf-8")


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (n, 77), padded with the end-of-text token as in Stable Diffusion 1."""
    batch = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


# --- models -------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """The autoencoder: 128 x 128 pixels to 16 x 16 latents of four channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )


@torch.no_grad()
def initialise(vae: AutoencoderKL) -> None:
    """Start the autoencoder as a plain linear map: variance-preserving, its residual branches zero.

    With PyTorch's default each of the many convolutions in a row shrinks the signal and adds a
    random bias, which drowns the colour of a plain area; learning it takes several times longer.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    for half in (vae.encoder, vae.decoder):
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].weight)
    # The second half of the channels are log variances: begin with little noise.
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0


def new_unet() -> UNet2DConditionModel:
    """The denoiser, with cross attention to the text at 16 x 16 and 8 x 8."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text transformer of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def noise_schedule() -> dict[str, object]:
    """Stable Diffusion's forward process, common to training and sampling."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }


# --- autoencoder --------------------------------------------------------------------------------


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return images.diff(dim=-1), images.diff(dim=-2)


def train_vae(seed: int, device: torch.device, state_file: Path) -> AutoencoderKL:
    """Train the autoencoder with L1, squared error, L1 of pixel differences and a slight KL."""
    torch.manual_seed(seed)
    vae = new_vae()
    initialise(vae)
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    seen, _ = split()
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["iteration"]
    bar = tqdm(range(start, VAE_ITERATIONS), "vae", VAE_ITERATIONS, initial=start, mininterval=10)
    for iteration in bar:
        rng, generator = generators(seed, "vae", iteration)
        images = to_tensor([draw(jitter(rng.choice(seen), rng)) for _ in range(VAE_BATCH)])
        images = images.to(device)
        with autocast(device):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        output = output.float()
        pixel = l1_loss(output, images)
        across, down = gradients(images)
        output_across, output_down = gradients(output)
        edge = l1_loss(output_across, across) + l1_loss(output_down, down)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        square = mse_loss(output, images)
        loss = pixel + square + EDGE_WEIGHT * edge + KL_WEIGHT * kl
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, VAE_ITERATIONS, VAE_DECAY, VAE_LEARNING_RATE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if iteration % 25 == 0:
            bar.set_postfix(l1=pixel.item(), edge=edge.item(), kl=kl.item(), refresh=False)
        done = iteration + 1
        if done % SAVE_EVERY == 0 or done == VAE_ITERATIONS:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            write_atomically(state | {"iteration": done}, state_file)
    # The committed weights are float16: the latents are taken from the same rounded autoencoder.
    return vae.half().float().eval().requires_grad_(False)


@torch.no_grad()
def latent_cache(vae: AutoencoderKL, seed: int, device: torch.device, file: Path) -> Tensor:
    """Latent means (combinations, jitters, 4, 16, 16), unscaled, of drawings of every seen one."""
    if file.exists():
        cached: Tensor = torch.load(file, weights_only=True)
        return cached
    rng = random.Random(f"{seed} latents")
    rows = []
    for combination in tqdm(split()[0], "latents", mininterval=10):
        images = to_tensor([draw(jitter(combination, rng)) for _ in range(JITTERS)])
        images = images.to(device)
        with autocast(device):
            rows.append(vae.encode(images).latent_dist.mean.float().cpu())
    latents = torch.stack(rows)
    write_atomically(latents, file)
    return latents


# --- denoiser -----------------------------------------------------------------------------------


class Average:
    """An exponential moving average of a module's weights, warmed up as (1 + n) / (10 + n)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights = {k: v.detach().clone() for k, v in module.named_parameters()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        current = dict(self.module.named_parameters())
        torch._foreach_lerp_(
            [self.weights[name] for name in current], list(current.values()), 1 - decay
        )


def min_snr_weights(alphas_cumprod: Tensor) -> Tensor:
    """Loss weight min(SNR, gamma) / SNR of each timestep for epsilon prediction.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def layout_weights(alphas_cumprod: Tensor) -> Tensor:
    """Min-SNR weights, but 1 / sqrt(SNR) where the SNR is below one.

    An error in the picture counts SNR times in the error of epsilon. Its square root still lets the
    last timesteps matter, where alone the background has to be taken from the words: 256 latents of
    one colour show through the noise as soon as SNR > 1 / 256.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.where(snr < 1, snr.rsqrt(), min_snr_weights(alphas_cumprod))


class Batch(NamedTuple):
    """Noised latents, timesteps, token ids, the noise to be found and the weights of the errors."""

    noisy: Tensor
    timesteps: Tensor
    tokens: Tensor
    noise: Tensor
    weights: Tensor

    def chunks(self, count: int, device: torch.device) -> list["Batch"]:
        """The batch on the device, cut into ``count`` parts of like size."""
        parts = zip(*(tensor.to(device).chunk(count) for tensor in self), strict=True)
        return [Batch(*part) for part in parts]


def new_batch(latents: Tensor, tokenizer: CLIPTokenizer, seed: int, iteration: int) -> Batch:
    """The batch of one iteration; ``latents`` are scaled, (combinations, jitters, 4, 16, 16)."""
    seen, _ = split()
    alphas_cumprod = DDPMScheduler(**noise_schedule()).alphas_cumprod
    count = len(alphas_cumprod)
    rng, generator = generators(seed, "unet", iteration)
    rows = rng.choices(range(len(seen)), _shares(seen, iteration), k=UNET_BATCH)
    texts = ["" if rng.random() < DROPPED_PROMPTS else caption(seen[row], rng) for row in rows]
    clean = latents[rows, [rng.randrange(latents.shape[1]) for _ in rows]]
    noise = torch.randn(clean.shape, generator=generator)
    if iteration in LAYOUT:
        position = 1 - torch.rand(UNET_BATCH, generator=generator).square()
        timesteps = (position * count).long().clamp(max=count - 1)
    else:
        timesteps = torch.randint(0, count, (UNET_BATCH,), generator=generator)
    early = iteration < LAYOUT.start
    weights = min_snr_weights(alphas_cumprod) if early else layout_weights(alphas_cumprod)
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    return Batch(noisy, timesteps, tokenize(tokenizer, texts), noise, weights[timesteps])


def _shares(seen: list[Combination], iteration: int) -> list[int]:
    """How often each combination is shown, relative to the others."""
    if iteration < LAYOUT.stop:
        return [1] * len(seen)
    return [
        (SMALL_WEIGHT if combination.size == "small" else 1)
        * (STAR_WEIGHT if combination.shape == "star" else 1)
        for combination in seen
    ]


def differentiate(both: nn.ModuleDict, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
    """The share of a part of the batch in the mean weighted squared error, and its gradients."""
    with autocast(batch.noisy.device):
        hidden = both["text_encoder"](batch.tokens).last_hidden_state
        predicted = both["unet"](batch.noisy, batch.timesteps, hidden).sample
    error = mse_loss(predicted.float(), batch.noise, reduction="none").mean((1, 2, 3))
    loss = (error * batch.weights).sum() / UNET_BATCH
    return loss.item(), torch.autograd.grad(loss, list(both.parameters()))


def train_unet(
    latents: Tensor,
    tokenizer: CLIPTokenizer,
    seed: int,
    device: torch.device,
    state_file: Path,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train denoiser and text encoder jointly; returns both with their averaged weights.

    ``latents`` are scaled, float32 (combinations, jitters, 4, 16, 16).
    """
    torch.manual_seed(seed)
    unet = new_unet().to(device)
    # At this size PyTorch's fused attention is slower on CPUs than the plain one.
    unet.set_attn_processor(AttnProcessor())
    text_encoder = new_text_encoder(tokenizer).to(device)
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    parameters = list(both.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = Average(both)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        both.load_state_dict(state["model"])
        average.weights = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        start = state["iteration"]
    # On CPUs, halves of the batch in threads of their own wait for each other once an iteration,
    # where parallel operators would wait at each of several thousand.
    workers = CPU_WORKERS if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    bar = tqdm(
        range(start, UNET_ITERATIONS), "unet", UNET_ITERATIONS, initial=start, mininterval=10
    )
    for iteration in bar:
        parts = new_batch(latents, tokenizer, seed, iteration).chunks(workers, device)
        results = list(pool.map(partial(differentiate, both), parts))
        for parameter, first, *others in zip(parameters, *(g for _, g in results), strict=True):
            parameter.grad = first
            for other in others:
                first.add_(other)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, UNET_ITERATIONS, UNET_DECAY, UNET_LEARNING_RATE)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(iteration)
        if iteration % 25 == 0:
            bar.set_postfix(loss=sum(value for value, _ in results), refresh=False)
        done = iteration + 1
        if done % SAVE_EVERY == 0 or done == UNET_ITERATIONS:
            state = {"model": both.state_dict(), "average": average.weights}
            state |= {"optimizer": optimizer.state_dict(), "iteration": done}
            write_atomically(state, state_file)
    pool.shutdown()
    both.load_state_dict(average.weights, strict=False)
    return unet, text_encoder


# --- the whole ----------------------------------------------------------------------------------


def save_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    out: Path,
) -> None:
    """Write the pipeline folder with float16 weights."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=UniPCMultistepScheduler(
            **noise_schedule(), solver_order=2, solver_type="bh2", timestep_spacing="linspace"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    save_tokenizer(tokenizer, out / "tokenizer")
    # transformers loads in the dtype its config names, diffusers in float32: name the same.
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")


def train(
    out: Path,
    state: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Run or resume the whole recipe; ``out`` gets the pipeline, ``state`` what resuming needs."""
    device = torch.device(device)
    state.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed)
    vae = train_vae(seed, device, state / "vae.pt")
    latents = latent_cache(vae, seed, device, state / "latents.pt")
    scaling_factor = round(1 / latents.std().item(), 5)
    tqdm.write(
        f"latents: mean {latents.mean((0, 1, 3, 4)).tolist()}, scaling_factor {scaling_factor}"
    )
    vae.register_to_config(scaling_factor=scaling_factor)
    latents *= scaling_factor
    unet, text_encoder = train_unet(latents, tokenizer, seed, device, state / "unet.pt")
    save_pipeline(vae, text_encoder, tokenizer, unet, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shapes/checkpoint"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    # Progress is kept beside the checkpoint and removed once that is written.
    state = args.out.with_name(f"{args.out.name}.state")
    train(args.out, state, args.seed, args.device)
    shutil.rmtree(state)


if __name__ == "__main__":
    main()
