"""DreamBooth (arXiv 2208.12242) by LoRA (arXiv 2106.09685): the U-Net learns "a sks cup".

As diffusers' example train_dreambooth_lora.py does: adapters on the projections of every attention,
scaled by alpha = rank, gradients cut to a norm of one, the text encoder frozen, and no prior
preservation, which is off there too. Each set of subjects that is asked for is learned by itself,
from the reference's whole pictures, under the paper's prompt, "a [identifier] [class noun]".
Several subjects have an identifier each, and a picture is called by those of them that it shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import nn

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request, Selection, SubjectName
from pipeline.evaluation.methods.learned_words import renamed, reworded
from pipeline.evaluation.methods.method import Drawn
from pipeline.evaluation.methods.shared import denoising, in_batches
from pipeline.evaluation.methods.tuning import (
    Lesson,
    fit,
    frozen_base,
    generator_of,
    key_of,
    lessons,
)
from pipeline.generation.sampler import denoise

IDENTIFIERS = ("sks", "ktn", "pll", "ucd")
"""Rare tokens of CLIP's tokenizer: of diffusers' examples dreambooth and custom_diffusion."""
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
MAX_NORM = 1.0


class DreamBoothLoRA:
    """Learns the subjects of each request together."""

    native, learns = True, True
    title = "DreamBooth-LoRA"

    def __init__(self, name: str, cfg: EvaluateConfig) -> None:
        if find_spec("peft") is None:
            raise UserError("methods: dreambooth-lora needs peft; pip install 'ssr-on-ray[tuning]'")
        self.name, self.cfg = name, cfg
        self.settings: dict[str, Any] = {
            "method": "dreambooth-lora",
            "learning": asdict(cfg.tuning.dreambooth),
            "rank": cfg.tuning.dreambooth_rank,
            "masked": cfg.tuning.masked,
            "seed": cfg.seed,
            **denoising(cfg),
        }
        self._pipe: Any = None

    def check(self, bench: Bench) -> None:
        for request in bench.outlines():
            reworded(request, called(request.subjects))

    def open(self) -> None:
        self._pipe = self._pipe or frozen_base(self.cfg)

    def close(self) -> None:
        self._pipe = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        prompts = {
            request.key: reworded(request.outline, called(request.outline.subjects))
            for request in requests
        }

        def draw(some: Sequence[Request]) -> list[Image.Image]:
            said, seeds = [prompts[r.key] for r in some], [r.seed for r in some]
            return denoise(self._pipe, self.cfg, said, seeds)

        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(tuple(map(key_of, request.selections)), []).append(place)
        pictures: dict[int, Image.Image] = {}
        for places in groups.values():
            alike = [requests[place] for place in places]
            with self._learned(alike[0].selections):
                drawn = in_batches(alike, self.cfg.batch_size, draw)
            pictures.update(zip(places, drawn, strict=True))
        return [Drawn(pictures[place]) for place in range(len(requests))]

    @contextmanager
    def _learned(self, selections: Sequence[Selection]) -> Iterator[None]:
        """Within the block the U-Net knows the subjects."""
        generator = generator_of(self.cfg.seed, [key_of(s) for s in selections])
        with lora(self._pipe.unet, self.cfg.tuning.dreambooth_rank, generator) as trained:
            pictures = self._lessons(selections)
            learning = self.cfg.tuning.dreambooth
            fit(self._pipe, trained, pictures, learning, generator, MAX_NORM)
            yield

    def _lessons(self, selections: Sequence[Selection]) -> list[Lesson]:
        made = []
        calls = called([selection.subject for selection in selections])
        for reference in {s.reference.key: s.reference for s in selections}.values():
            shown = [i for i, s in enumerate(selections) if s.reference.key == reference.key]
            phrases = [selections[i].subject.phrase for i in shown]
            names = [selections[i].subject.name for i in shown]
            text = " and ".join(map(renamed, phrases, names, [calls[i] for i in shown]))
            targets = [selections[i].target for i in shown]
            made += lessons(self._pipe, reference, targets, [text], self.cfg.tuning.masked)
        return made


def called(subjects: Sequence[SubjectName]) -> list[str]:
    """What each subject is called: "sks cup". Raises UserError for more than there are words."""
    if len(subjects) > len(IDENTIFIERS):
        raise UserError(
            f"dreambooth-lora learns {len(IDENTIFIERS)} subjects at once at most, and a request "
            f"asks for {len(subjects)}; leave it out of methods for this bench"
        )
    return [f"{word} {s.name}" for word, s in zip(IDENTIFIERS, subjects, strict=False)]


@contextmanager
def lora(unet: Any, rank: int, generator: torch.Generator) -> Iterator[list[nn.Parameter]]:
    """Within the block the U-Net has an adapter, whose tensors are given; it begins as nothing."""
    from peft import LoraConfig

    settings = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(ATTENTION)
    )
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
            torch.default_generator.manual_seed(generator.initial_seed())
            unet.add_adapter(settings)
        yield [parameter for parameter in unet.parameters() if parameter.requires_grad]
    finally:
        unet.unload_lora()
