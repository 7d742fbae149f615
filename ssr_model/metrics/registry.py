"""The metrics by name, with what each needs, so that a runner can ask before it draws."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ssr_model.metrics import similarity
from ssr_model.metrics.aesthetic import AestheticScorer, aesthetic
from ssr_model.metrics.backbones import Backbone
from ssr_model.metrics.embeddings import Embeddings
from ssr_model.metrics.masking import MARGIN, SMALLEST, Segmenter, locate
from ssr_model.metrics.samples import Need, Sample, Scores

Look = Literal["clip", "dino", "aesthetic"]
"""What a metric looks with: a ClipBackbone, a DinoBackbone, or an AestheticScorer."""


@dataclass(frozen=True)
class Metric:
    """A metric's definition."""

    name: str
    """Its key in METRICS, and its column in results."""
    title: str
    formula: str
    source: str
    """Who defines it so."""
    low: float
    high: float
    better: Literal["higher", "lower"]
    backbone: Look
    needs: frozenset[Need]
    """Fields of a Sample that it compares the picture with."""
    compute: Callable[..., Scores]
    """(samples, backbone, embeddings or None) -> Scores."""

    @property
    def needs_masks(self) -> bool:
        """Whether subjects must be found in the drawn picture: by masks, or by a segmenter."""
        return "subjects" in self.needs


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "clip_t", "CLIP-T", "cos(CLIP(picture), CLIP(text))", "DreamBooth, arXiv 2208.12242",
            -1, 1, "higher", "clip", frozenset({"text"}), similarity.clip_t,
        ),
        Metric(
            "clip_i", "CLIP-I", "mean over references of cos(CLIP(picture), CLIP(reference))",
            "DreamBooth, arXiv 2208.12242",
            -1, 1, "higher", "clip", frozenset({"references"}), similarity.clip_i,
        ),
        Metric(
            "dino", "DINO", "mean over references of cos(CLS(picture), CLS(reference))",
            "DreamBooth, arXiv 2208.12242",
            -1, 1, "higher", "dino", frozenset({"references"}), similarity.dino,
        ),
        Metric(
            "dino_m", "DINO-M",
            "mean over subjects of (mean over references of cos(CLS(subject cut out of the picture)"
            ", CLS(subject cut out of the reference)); 0 where it is not found); cut out with a "
            f"margin of {MARGIN:g}, not found below {SMALLEST:g} of the picture",
            "SSR-Encoder, arXiv 2312.16272; how it is cut out is ours",
            -1, 1, "higher", "dino", frozenset({"subjects"}), similarity.dino_m,
        ),
        Metric(
            "clip_es", "CLIP-ES", "mean over other subjects of cos(CLIP(picture), CLIP(its text))",
            "SSR-Encoder, arXiv 2312.16272",
            -1, 1, "lower", "clip", frozenset({"others"}), similarity.clip_es,
        ),
        Metric(
            "aesthetic", "Aesthetic", "w . CLIP(picture) + b",
            "LAION, sac+logos+ava1-l14-linearMSE (V2)",
            -math.inf, math.inf, "higher", "aesthetic", frozenset(), aesthetic,
        ),
    )
}  # fmt: skip


def measure(
    names: Sequence[str],
    samples: Sequence[Sample],
    backbones: Mapping[Look, Backbone | AestheticScorer],
    segmenter: Segmenter | None = None,
) -> dict[str, Scores]:
    """Scores of the samples by several metrics, each picture and text embedded once.

    names: keys of METRICS. backbones: what they look with, by `Metric.backbone`. segmenter: finds
    the subjects without a mask, for the metrics that need them; `Scores.backbone` tells of it then.
    An unknown name, a backbone or a sample that lacks is a ValueError.
    """
    metrics = [_known(name) for name in names]
    for metric in metrics:
        look: Any = backbones.get(metric.backbone)
        if look is None or look.describe()["kind"] != metric.backbone:
            raise ValueError(
                f"{metric.title} looks with a backbone of kind {metric.backbone!r}, which is not "
                "given: load it, or leave the metric out."
            )
    if segmenter is not None and any(metric.needs_masks for metric in metrics):
        samples = locate(samples, segmenter)
    seen = Embeddings()
    results = {}
    for metric in metrics:
        scores = metric.compute(samples, backbones[metric.backbone], seen)
        if segmenter is not None and metric.needs_masks:
            told = {**scores.backbone, "segmenter": segmenter.describe()}
            scores = replace(scores, backbone=told)
        results[metric.name] = scores
    return results


def _known(name: str) -> Metric:
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METRICS)}."
        raise ValueError(f"no metric is called {name!r}; {hint}")
    return METRICS[name]
