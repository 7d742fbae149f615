"""Trains the judge: exact masks, on pictures blurred, shifted in colour and made noisy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from pipeline.miniworld import world
from pipeline.miniworld.foundation.corpus import Corpus
from pipeline.miniworld.foundation.fitting import fit
from pipeline.miniworld.judge import Judge

SEED = 5  # of the first weights
BATCH = 32


def _roughened(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the pictures softened, all with noise of random strength: what a sampler may do."""
    soft = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    n = len(images)
    mix = torch.from_numpy(
        rng.uniform(0, 1, (n, 1, 1, 1)) * (rng.random((n, 1, 1, 1)) < 0.5)
    ).float()
    noise = torch.from_numpy(rng.uniform(0, 0.08, (n, 1, 1, 1))).float()
    shift = torch.from_numpy(rng.normal(0, 0.04, (n, 3, 1, 1))).float()
    mixed = images * (1 - mix) + soft * mix
    return (mixed + shift + noise * torch.randn_like(images)).clamp(0, 1)


def labels(corpus: Corpus, index: np.ndarray) -> torch.Tensor:
    """(n, 32, 32): 0 the ground, i + 1 = CLASSES[i]."""
    classes = corpus.class_map(index)
    return torch.from_numpy(np.where(classes >= len(world.CLASSES), 0, classes + 1))


def pictures(corpus: Corpus, index: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(corpus.images[index]).permute(0, 3, 1, 2).float() / 255.0


def train(
    corpus: Corpus, work: Path, steps: int, device: torch.device, say: Callable[[str], None]
) -> Judge:
    torch.manual_seed(SEED)
    judge = Judge().to(device)

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        index = rng.integers(len(corpus), size=BATCH)
        logits = judge(_roughened(pictures(corpus, index), rng).to(device))
        return {"loss": functional.cross_entropy(logits, labels(corpus, index).to(device))}

    fit("judge", judge, step, steps=steps, peak=2e-3, work=work, say=say)
    return judge


def scores(judge: Judge, corpus: Corpus) -> dict[str, float]:
    """Held-out: pixels named rightly, and pictures in which exactly the right classes are found."""
    index = np.arange(len(corpus))
    images = pictures(corpus, index)
    pixel = (judge.segment(images) == labels(corpus, index)).float().mean()
    found = judge.present(images)
    right = [
        {world.CLASSES[i] for i in row.nonzero().flatten().tolist()}
        == {s.cls for s in scene.subjects}
        for row, scene in zip(found, corpus.scenes, strict=True)
    ]
    return {"pixel_accuracy": float(pixel), "exact_classes": float(np.mean(right))}
