"""What methods that are trained on a reference have in common: its pictures, and the loop.

The loop is the one of diffusers' examples textual_inversion.py and train_dreambooth_lora.py: the
base model's own loss on noised latents of the pictures, AdamW at a constant rate. Two things
differ. Pictures are cropped to their central square, which is what the encoder sees of them; the
first script squeezes them, the second crops at random. And none is mirrored, which the first
script does with half of them: letters and stripes would turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from pipeline.config import EvaluateConfig, LearningConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Reference, Selection
from pipeline.generation.sampler import load_base, side_of
from ssr_model.losses import diffusion_target, ldm_loss
from ssr_model.text import tokenize

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Key = tuple[str, int]
"""A subject: its reference's key, and its place there."""


def key_of(selection: Selection) -> Key:
    return selection.reference.key, selection.target


def generator_of(seed: int, keys: Sequence[Key]) -> torch.Generator:
    """Of all that is random in learning these subjects. On the CPU, so that devices agree."""
    digest = hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def frozen_base(cfg: EvaluateConfig) -> StableDiffusionPipeline:
    """The base model's pipeline, none of whose own tensors is trained."""
    pipe = load_base(cfg)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


@dataclass(frozen=True, eq=False)
class Lesson:
    """A picture to learn from, and what it may be called."""

    mean: Tensor
    """Of the scaled latents that the VAE gives, (C, h, w) float32."""
    deviation: Tensor
    """Of the same."""
    weight: Tensor
    """Of each latent in the loss, (1, h, w): ones, or what the subjects cover."""
    texts: Sequence[str]
    """Prompts of it, one of which is drawn in each step."""


@torch.no_grad()
def lessons(
    pipe: Any, reference: Reference, targets: Sequence[int], texts: Sequence[str], masked: bool
) -> list[Lesson]:
    """One lesson for each of the reference's images.

    targets: the subjects that are learned.
    masked: only what they cover counts in the loss, as in Break-A-Scene (arXiv 2305.16311, Eq. 1),
        wherever all their masks are known. Otherwise the whole picture is learned.
    """
    made = []
    for view, image in enumerate(reference.images):
        pixels = torch.from_numpy(np.array(_square(image, side_of(pipe)))).permute(2, 0, 1)
        batch = (pixels[None].float() / 127.5 - 1).to(pipe.vae.device)
        seen, scale = pipe.vae.encode(batch).latent_dist, pipe.vae.config.scaling_factor
        weight = torch.ones_like(seen.mean[0, :1])
        masks = [reference.subjects[target].masks[view] for target in targets]
        known = [mask for mask in masks if mask is not None]
        if masked and len(known) == len(masks):
            weight = _cover(np.logical_or.reduce(known), weight, reference.key)
        made.append(Lesson(seen.mean[0] * scale, seen.std[0] * scale, weight, texts))
    return made


def _square(image: Image.Image, side: int) -> Image.Image:
    """The central square."""
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def _cover(mask: Any, like: Tensor, key: str) -> Tensor:
    """Share of each latent that the mask covers, in the central square; of the shape of `like`."""
    side = min(mask.shape)
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    seen = torch.from_numpy(np.array(ImageOps.fit(picture, (side, side)))).float() / 255
    cover = functional.adaptive_avg_pool2d(seen[None], (like.shape[-2], like.shape[-1])).to(like)
    if not cover.any():
        raise UserError(
            f"{key}: the subject lies outside the picture's central square, which is all that is "
            "learned; set tuning.masked false, or crop the picture"
        )
    return cover


def fit(
    pipe: Any,
    parameters: Iterable[torch.nn.Parameter],
    pictures: Sequence[Lesson],
    settings: LearningConfig,
    generator: torch.Generator,
    max_norm: float | None = None,
) -> None:
    """Train the parameters, which are the text encoder's or the U-Net's.

    max_norm: of the gradient, which is cut down to it.

    Raises UserError where the loss does not stay finite.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr)  # as the scripts: decay 0.01
    losses = []
    for _ in range(settings.steps):
        loss = denoising_loss(pipe, pictures, settings.batch_size, generator)
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    finite = torch.stack(losses).isfinite().tolist()  # looked at once: a look waits for the device
    if not all(finite):
        raise UserError(
            f"the loss is not finite in step {finite.index(False) + 1} of {settings.steps} on a "
            f"reference; lower tuning's lr, {settings.lr}"
        )


def denoising_loss(
    pipe: Any, pictures: Sequence[Lesson], count: int, generator: torch.Generator
) -> Tensor:
    """Of `count` lessons, each with one of its prompts, noise and a timestep of its own."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    chosen = [pictures[draw(len(pictures))] for _ in range(count)]
    texts = [lesson.texts[draw(len(lesson.texts))] for lesson in chosen]
    mean = torch.stack([lesson.mean for lesson in chosen])

    def normal() -> Tensor:
        return torch.randn(mean.shape, generator=generator).to(mean)

    latents = mean + torch.stack([lesson.deviation for lesson in chosen]) * normal()
    noise, steps = normal(), pipe.scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (count,), generator=generator).to(mean.device)
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    told = pipe.text_encoder(tokenize(pipe.tokenizer, texts).to(mean.device))[0]
    prediction = pipe.unet(noisy, timesteps, told, return_dict=False)[0]
    target = diffusion_target(pipe.scheduler, latents, noise, timesteps)
    weight = torch.stack([lesson.weight for lesson in chosen])
    return ldm_loss(prediction, target, weight)
