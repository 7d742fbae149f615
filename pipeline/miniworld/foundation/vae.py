"""Mini AutoencoderKL: 32 x 32 pictures to 8 x 8 latents, L1 + MSE + a little KL.

So little KL leaves the basis of the latents to chance: whatever the decoder uses comes out with
unit variance, detail that hardly moves a pixel as well as the outline of a subject, and a diffusion
model would spend as much of its loss on the one as on the other. `in_pixel_metric` mends that once
the training is over, without changing a decoded pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipeline.miniworld.foundation.corpus import IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit

KL_WEIGHT = 1e-5
SEED = 1  # of the first weights
BATCH = 32
METRIC_POWER = 0.25  # half-way; after 1,200 steps of the U-Net 1/2 drew fewer classes (0.25, 0.31)
POSTERIOR_STD = 0.05  # of scaled latents: the U-Net learns from means, SSR from samples


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train(
    corpus: Corpus, work: Path, steps: int, device: torch.device, say: Callable[[str], None]
) -> AutoencoderKL:
    torch.manual_seed(SEED)
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
    in_pixel_metric(vae, pixels(corpus.images[:2048]))
    return vae


@torch.no_grad()
def sensitivity(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean J^T J of the decoder over places and pictures, (c, c): pixel error by latent error.

    Finite differences along each channel, a fifteenth of the latents' deviation, with random signs
    over the places, so that neighbours do not add up. images: float32 (n, 3, h, w) in [-1, 1].
    """
    latents = vae.encode(images.to(vae.device)).latent_dist.mean
    decoded, step = vae.decode(latents).sample, latents.std() / 15
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, latents[:, 0].shape, generator=generator).to(latents) * 2 - 1
    moves = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += step * signs
        moves.append((vae.decode(moved).sample - decoded).flatten() / step)
    jacobian = torch.stack(moves)
    return jacobian @ jacobian.T / signs.numel()


@torch.no_grad()
def in_pixel_metric(vae: AutoencoderKL, images: torch.Tensor, power: float = METRIC_POWER) -> None:
    """Change the latents' basis in place; what is decoded stays as it was.

    z' = S^power (z - mean z), S the decoder's sensitivity: with power 1/2 equal steps in any
    direction would move the pixels equally, with 0 nothing changes. The 1x1 convolutions beside
    the latents take up the change. The posterior becomes narrow, and scaling_factor gives unit
    deviation, by Stable Diffusion's convention. images: float32 (n, 3, h, w) in [-1, 1].
    """
    values, vectors = torch.linalg.eigh(sensitivity(vae, images[:256]).double().cpu())
    stretch = values.clamp_min(1e-3 * values.max()) ** power
    forth = (vectors * stretch) @ vectors.T
    back = (vectors / stretch) @ vectors.T
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(values)

    def encoded() -> torch.Tensor:
        parts = [vae.encode(part.to(vae.device)).latent_dist.mean for part in images.split(256)]
        return torch.cat(parts)

    forth, back = forth.to(before.weight), back.to(before.weight)
    before.weight[:channels, :, 0, 0] = forth @ before.weight[:channels, :, 0, 0]
    before.bias[:channels] = forth @ before.bias[:channels]
    after.weight[:, :, 0, 0] = after.weight[:, :, 0, 0] @ back
    mean = encoded().mean(dim=(0, 2, 3))
    before.bias[:channels] -= mean
    after.bias += after.weight[:, :, 0, 0] @ mean
    scaling = float(1.0 / encoded().std())
    before.weight[channels:] = 0.0
    before.bias[channels:] = 2 * math.log(POSTERIOR_STD / scaling)
    vae.register_to_config(scaling_factor=scaling)


@torch.no_grad()
def psnr(vae: AutoencoderKL, corpus: Corpus) -> float:
    """Peak signal-to-noise ratio of the reconstruction from the posterior's mean, dB."""
    batch = pixels(corpus.images).to(vae.device)
    decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
    mse = ((decoded - batch) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())
