"""Metrics of subject-driven generation, under written-down definitions: docs/metrics.md.

samples = [Sample(picture, text="a cup on the beach", references=[photo])]
look = {"clip": load_clip("openai/clip-vit-large-patch14").to("cuda")}
scores = measure(["clip_t", "clip_i"], samples, look)
scores["clip_t"].values  # float32 (B,)
"""

from ssr_model.metrics.aesthetic import AestheticPredictor, AestheticScorer
from ssr_model.metrics.backbones import Backbone, ClipBackbone, DinoBackbone
from ssr_model.metrics.embeddings import Embeddings
from ssr_model.metrics.loading import load_clip, load_clipseg, load_dino
from ssr_model.metrics.masking import Segmenter, locate, subject_view
from ssr_model.metrics.registry import METRICS, Metric, measure
from ssr_model.metrics.samples import MaskedSubject, Sample, SampleError, Scores
from ssr_model.metrics.segmenting import ClipSegSegmenter

__all__ = [
    "METRICS",
    "AestheticPredictor",
    "AestheticScorer",
    "Backbone",
    "ClipBackbone",
    "ClipSegSegmenter",
    "DinoBackbone",
    "Embeddings",
    "MaskedSubject",
    "Metric",
    "Sample",
    "SampleError",
    "Scores",
    "Segmenter",
    "load_clip",
    "load_clipseg",
    "load_dino",
    "locate",
    "measure",
    "subject_view",
]
