"""What an evaluation is: a bench, methods, and what scores them; nothing is loaded yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, MiniBench
from pipeline.evaluation.benches.folders import open_bench
from pipeline.evaluation.drawing import PicturesStage, spans, unit_name
from pipeline.evaluation.exact import ExactScorer
from pipeline.evaluation.judging import SIDE
from pipeline.evaluation.methods import Method, make_methods
from pipeline.evaluation.scoring import MetricScorer, ScoresStage, measures_of
from pipeline.generation.recipe import check_denoising
from pipeline.units import Stage

FOLDER = "evaluation"
Scorers = Sequence[MetricScorer | ExactScorer]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: a bench, the methods, and what scores them. Loads no model."""

    cfg: EvaluateConfig
    bench: Bench
    methods: Sequence[Method]
    scorers: Scorers
    name: str | None = None
    """Its folder under evaluation/; None = the bench's name."""

    def check(self) -> None:
        """Refuse what cannot be drawn, or not be judged, before anything is drawn."""
        for method in self.methods:
            method.check(self.bench)
        for scorer in self.scorers:
            scorer.check(self.bench)

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.name or self.bench.name}"

    def units(self, method: Method) -> list[str]:
        found = spans(self.bench, self.cfg.unit_pictures, method.learns)
        return [unit_name(*span) for span in found]

    def stages(self, method: Method) -> list[Stage]:
        """Drawing by the method, then scoring."""
        return [
            PicturesStage(self.bench, method, self.folder),
            ScoresStage(self.bench, method.name, self.folder, self.scorers),
        ]


def plan(cfg: EvaluateConfig) -> Evaluation:
    """What the settings ask for, checked against what is there. Raises UserError."""
    bench = open_bench(cfg, check_models(cfg))
    scorers = scorers_of(cfg, bench)
    methods = make_methods(cfg)
    if not methods:
        raise UserError("methods: none is given; for example --methods text-only ssr-text")
    return Evaluation(cfg, bench, methods, scorers)


def check_models(cfg: EvaluateConfig) -> int:
    """Refuse what could not be drawn, or not be judged. Returns the side of the base model's
    pictures, pixels.
    """
    check_denoising(cfg)
    models.device(cfg.device)
    side = models.side(cfg.models.base, cfg.models.revision)
    if cfg.bench == MiniBench.name and side != SIDE:
        raise UserError(
            f"models.base: {cfg.models.base} draws {side} pixels, the mini bench's judge knows "
            f"pictures of {SIDE}; use miniworld:sd, or another --bench"
        )
    return side


def scorers_of(cfg: EvaluateConfig, bench: Bench) -> Scorers:
    """What scores pictures of the bench: the exact measures where it knows all, and the metrics
    whose backbones are named.
    """
    scorers: list[MetricScorer | ExactScorer] = [MetricScorer(cfg.look, cfg.device)]
    if bench.name == MiniBench.name:
        scorers.insert(0, ExactScorer())
    if not measures_of(scorers):
        raise UserError(
            "look: no metric is left: name a backbone, for example --look.clip "
            "openai/clip-vit-base-patch32 --look.dino facebook/dino-vits16"
        )
    return scorers
