"""Mini DINO: a ViT that learns from pictures alone, by self-distillation (arXiv 2104.14294).

A student that sees crops of a picture, large and small, must answer as its own moving average, the
teacher, answers to the large ones. No caption, mask, class or identity is used. What crops share is
what the embedding keeps, so they are varied in what identity is not: place, size, side, brightness
and sharpness, never in hue. The teacher is the model.

All crops of a picture share its ground, which is all that a small model learns if it may: with
DINO's running centre the teacher soon had six answers, one for each ground (250 steps; 0.50 of
identities told apart, which is chance). So its answers are balanced over each batch instead, as in
DINOv2, and sharpened more: at 0.04 the ground was still 0.95 of the embeddings' variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.miniworld.foundation import identities
from pipeline.miniworld.foundation.clip import MEAN, STD, normalised
from pipeline.miniworld.foundation.corpus import IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit
from ssr_model.metrics import ClipBackbone, DinoBackbone

SEED = 6  # of the first weights
BATCH = 64
PATCH = 8
LOCAL_SIZE = 16
LOCAL_CROPS = 4
GLOBAL_AREA, LOCAL_AREA = (0.5, 1.0), (0.25, 0.6)  # of the picture
PROTOTYPES = 512
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.01
TEACHER_DECAY = 0.99  # rises to 1 by a cosine
ROUNDS = 3  # of balancing


def image_processor() -> ViTImageProcessorPil:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ViTImageProcessorPil(size=side, image_mean=MEAN, image_std=STD)


def build() -> ViTModel:
    config = ViTConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


class Network(nn.Module):
    """The ViT and the head whose answers are compared; the head is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build()
        width = self.vit.config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
        )
        self.prototypes = nn.Parameter(functional.normalize(torch.randn(PROTOTYPES, 64), dim=-1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cosines (n, PROTOTYPES) of pictures (n, 3, side, side)."""
        seen = self.vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        unit = functional.normalize(self.head(seen), dim=-1)
        return unit @ functional.normalize(self.prototypes, dim=-1).T


class Distillation(nn.Module):
    """Student and teacher, as one module for `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Network(), Network().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    def loss(self, large: list[torch.Tensor], small: list[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the student's answer to each crop with the teacher's to each other
        large one. large, small: crops (n, 3, side, side) of the same n pictures.
        """
        with torch.no_grad():
            targets = balanced(self.teacher(torch.cat(large)))
        seen = [self.student(torch.cat(views)) for views in (large, small)]
        said = (torch.cat(seen) / STUDENT_TEMPERATURE).log_softmax(dim=-1)
        losses = [
            -(target * answer).sum(dim=-1).mean()
            for i, target in enumerate(targets.chunk(len(large)))
            for j, answer in enumerate(said.chunk(len(large) + len(small)))
            if i != j
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the teacher towards the student."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for mean, value in pairs:
            mean.lerp_(value, 1 - decay)


def balanced(cosines: torch.Tensor) -> torch.Tensor:
    """The teacher's answers as shares (n, PROTOTYPES) that sum to one per row, and by which every
    prototype is meant equally often (Sinkhorn and Knopp, as in arXiv 2304.07193).
    """
    shares = (cosines.double() / TEACHER_TEMPERATURE).exp()  # float32 would overflow
    for _ in range(ROUNDS):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares.float()


def crops(
    images: torch.Tensor, area: tuple[float, float], side: int, rng: np.random.Generator
) -> torch.Tensor:
    """A crop (n, 3, side, side) of each normalised picture: somewhere, of a share `area` of it, as
    it is or mirrored, a little brighter or darker, as sharp as it is or less.
    """
    n = len(images)
    scale = np.sqrt(rng.uniform(*area, n))
    flip = rng.choice([-1.0, 1.0], n)
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * (1 - scale[:, None])
    grid = functional.affine_grid(torch.from_numpy(theta), [n, 3, side, side], align_corners=False)
    seen = functional.grid_sample(
        images, grid.to(images), align_corners=False, padding_mode="border"
    )
    soft = functional.avg_pool2d(functional.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur, light = (
        torch.from_numpy(values).to(images).view(n, 1, 1, 1)
        for values in (rng.uniform(0, 1, n) * (rng.random(n) < 0.5), rng.uniform(0.85, 1.15, n))
    )
    black = normalised(np.zeros((1, 1, 1, 3), np.uint8)).to(images)
    return (seen.lerp(soft, blur) - black) * light + black


def train(
    corpus: Corpus, work: Path, steps: int, device: torch.device, say: Callable[[str], None]
) -> ViTModel:
    """The teacher's ViT, in eval mode."""
    torch.manual_seed(SEED)
    both = Distillation().to(device)

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        rise = 0.5 * (1 + math.cos(math.pi * number / steps))
        both.follow(1 - (1 - TEACHER_DECAY) * rise)
        images = normalised(corpus.images[rng.integers(len(corpus), size=BATCH)]).to(device)
        large = [crops(images, GLOBAL_AREA, IMAGE_SIZE, rng) for _ in range(2)]
        small = [crops(images, LOCAL_AREA, LOCAL_SIZE, rng) for _ in range(LOCAL_CROPS)]
        return {"loss": both.loss(large, small)}

    fit("dino", both, step, steps=steps, peak=1.5e-3, work=work, weight_decay=0.05, say=say)
    return both.teacher.vit


@torch.no_grad()
def scores(dino: DinoBackbone, clip: ClipBackbone, corpus: Corpus) -> dict[str, float]:
    """Held-out: how often the same subject is nearer than another of its class, on whole pictures
    and cut out of them, by this embedding, by CLIP's and by plain pixels.

    `..._texture`: where the other differs in texture alone. `spread`: 1 - the mean cosine of two
    pictures; 0 where all are embedded alike.
    """
    embeds = {"dino": dino.images, "clip": clip.images, "pixels": as_pixels}
    known = identities.triplets(len(corpus))
    kinds = {"": known, "_texture": identities.near_misses(known)}
    found = {
        f"{name}_{what}{kind}": identities.accuracy(embed, asked, blank)
        for kind, asked in kinds.items()
        for what, blank in {"whole": None, "cut_out": dino.blank}.items()
        for name, embed in embeds.items()
    }
    vectors = dino.images([Image.fromarray(image) for image in corpus.images])
    n = len(vectors)
    pairs = float(vectors.sum(dim=0).square().sum()) - n
    return {**found, "spread": 1 - pairs / (n * (n - 1))}


def as_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What an embedding has to beat: a picture's own normalised pixels, of unit length."""
    resized = [np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE))) for picture in pictures]
    return functional.normalize(normalised(np.stack(resized)).flatten(start_dim=1), dim=-1)
