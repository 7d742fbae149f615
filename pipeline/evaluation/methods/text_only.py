"""The base model alone: it reads the prompt and never sees the reference. The floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from pipeline.config import EvaluateConfig
from pipeline.evaluation.benches import Bench, Request
from pipeline.evaluation.methods.method import Drawn
from pipeline.evaluation.methods.shared import denoising, in_batches
from pipeline.generation.sampler import denoise, load_base


class TextOnly:
    """Stable Diffusion, prompted."""

    native, learns = True, False

    def __init__(self, name: str, cfg: EvaluateConfig, title: str = "Text only") -> None:
        self.name, self.title, self.cfg = name, title, cfg
        self.settings: dict[str, Any] = {"method": "text-only", **denoising(cfg)}
        self._pipe: Any = None

    def check(self, bench: Bench) -> None: ...

    def open(self) -> None:
        self._pipe = self._pipe or load_base(self.cfg)

    def close(self) -> None:
        self._pipe = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        return [Drawn(p) for p in in_batches(requests, self.cfg.batch_size, self._draw)]

    def _draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        return denoise(self._pipe, self.cfg, prompts, seeds)
