"""What the rivals' tests share: requests of the mini bench, drawn by the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline import models
from pipeline.config import EvaluateConfig, ModelsConfig
from pipeline.evaluation import benches
from pipeline.evaluation.benches import Request, Selection
from pipeline.evaluation.methods import Method

NOISE = 1
"""Levels of 255 by which batches of other sizes may differ in a picture."""


def settings(tiny_models: Path, **chosen: Any) -> EvaluateConfig:
    parts = ModelsConfig(base=str(tiny_models / "sd"), vision=str(tiny_models / "clip"))
    return EvaluateConfig(models=parts, steps=3, device="cpu", **chosen)


def write_ssr(folder: Path, parts: ModelsConfig, seed: int = 0, heads: int = 2) -> Path:
    """An untrained SSR-Encoder for the models; its aligner is 16 wide, whatever the heads."""
    import torch

    from ssr_model import SSRAdapter, SSRConfig
    from ssr_model.weights import save_adapter

    vision, text = models.load_vision_config(parts.vision), models.load_text_config(parts.base)
    unet = models.load_unet_config(parts.base)
    shape = SSRConfig.from_models(vision, text, unet, heads=heads, head_dim=16 // heads)
    torch.manual_seed(seed)
    save_adapter(folder, SSRAdapter(shape))
    return folder


def requests(count: int) -> list[Request]:
    """One of each reference, of different seeds."""
    references = benches.mini_bench(count, 32)
    return [benches.request(each, 0, seed) for seed, each in enumerate(references)]


def of_two(first: Request, second: Request) -> Request:
    """Both requests' subjects in the first one's picture."""
    chosen = (*first.selections, *second.selections)
    return Request(f"{first.key}-both", chosen, first.prompt, first.seed)


def of_one_photo(asked: Request) -> Request:
    """Both subjects of the request's one reference."""
    chosen = (Selection(asked.reference, 0), Selection(asked.reference, 1))
    return Request(f"{asked.key}-both", chosen, asked.prompt, asked.seed)


def draw(method: Method, asked: list[Request]) -> np.ndarray:
    """(n, h, w, 3) int16, so that differences do not wrap."""
    return np.stack([np.asarray(drawn.image, np.int16) for drawn in method(asked)])


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, levels of 255."""
    return int(np.abs(a - b).max())
