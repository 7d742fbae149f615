"""Mini AutoencoderKL: 32 x 32 pictures to 8 x 8 latents, L1 + MSE + a little KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipeline.miniworld.foundation.corpus import IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit

KL_WEIGHT = 1e-5
BATCH = 32


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train(
    corpus: Corpus, work: Path, steps: int, device: torch.device, say: Callable[[str], None]
) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    ).to(device, memory_format=torch.channels_last)

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        batch = pixels(corpus.images[rng.integers(len(corpus), size=BATCH)])
        batch = batch.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - batch
        l1, mse, kl = error.abs().mean(), error.square().mean(), posterior.kl().mean()
        return {"loss": l1 + 2.0 * mse + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    fit("vae", vae, step, steps=steps, peak=2e-3, work=work, ema_decay=0.995, say=say)
    with torch.no_grad():
        sample = pixels(corpus.images[:2048]).to(device).split(256)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in sample])
    # Stable Diffusion's convention: latents times scaling_factor have unit standard deviation
    vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, corpus: Corpus) -> float:
    """Peak signal-to-noise ratio of the reconstruction from the posterior's mean, dB."""
    batch = pixels(corpus.images).to(vae.device)
    decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
    mse = ((decoded - batch) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())
