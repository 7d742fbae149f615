"""Similarities of drawn pictures to texts, references and subjects: cosines, -1 to 1.

Nothing is clamped at zero or multiplied by 100. Where a picture is compared with several things,
its value is the mean over them, as DreamBooth defines it over pairs: a maximum would reward the
copy of one reference, and grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from ssr_model.images import Mask
from ssr_model.metrics.backbones import Backbone, ClipBackbone, DinoBackbone
from ssr_model.metrics.embeddings import Embeddings
from ssr_model.metrics.masking import is_found, subject_view
from ssr_model.metrics.samples import MaskedSubject, Sample, SampleError, Scores, require


def clip_t(samples: Sequence[Sample], clip: ClipBackbone, seen: Embeddings | None = None) -> Scores:
    """CLIP-T: cos(CLIP(picture), CLIP(text)); higher = the picture shows what the text says.

    The text is read as it stands, without a template.
    """
    require("CLIP-T", samples, "text")
    seen = seen or Embeddings()
    images = seen.images(clip, [sample.image for sample in samples])
    texts = seen.texts(clip, [sample.text or "" for sample in samples])
    parts = [[_cosine(a, b)] for a, b in zip(images, texts, strict=True)]
    return Scores.of("clip_t", parts, clip.describe())


def clip_es(
    samples: Sequence[Sample], clip: ClipBackbone, seen: Embeddings | None = None
) -> Scores:
    """CLIP-ES: mean over the reference's other subjects B of cos(CLIP(picture), CLIP(text of B));
    lower = the picture leaves them out.

    It is a picture drawn for subject A. Low values are also those of a bad picture: read it beside
    CLIP-T.
    """
    require("CLIP-ES", samples, "others")
    seen = seen or Embeddings()
    images = seen.images(clip, [sample.image for sample in samples])
    texts = seen.texts(clip, [text for sample in samples for text in sample.others])
    parts = _against(images, texts, [len(sample.others) for sample in samples])
    return Scores.of("clip_es", parts, clip.describe())


def clip_i(samples: Sequence[Sample], clip: ClipBackbone, seen: Embeddings | None = None) -> Scores:
    """CLIP-I: mean over references r of cos(CLIP(picture), CLIP(r)); higher = more alike."""
    return _to_references("CLIP-I", "clip_i", samples, clip, seen)


def dino(samples: Sequence[Sample], dino: DinoBackbone, seen: Embeddings | None = None) -> Scores:
    """DINO: mean over references r of cos(CLS(picture), CLS(r)); higher = more alike.

    Unlike CLIP, DINO was not taught to ignore what tells two things of one class apart.
    """
    return _to_references("DINO", "dino", samples, dino, seen)


def dino_m(samples: Sequence[Sample], dino: DinoBackbone, seen: Embeddings | None = None) -> Scores:
    """DINO-M: mean over the subjects s that a picture was asked to show of m(s), where
    m(s) = mean over references r of cos(CLS(s cut out of the picture), CLS(s cut out of r)), and
    m(s) = 0 where s is not found in the picture; higher = the subjects keep their identity.

    How a subject is cut out is `subject_view`'s, the same for both sides; one that covers less than
    SMALLEST of the picture is not found, and counted in `missing`. Masks of the picture come with
    the samples, or from a segmenter through `locate`; a subject without one is a ValueError.
    """
    require("DINO-M", samples, "subjects")
    seen = seen or Embeddings()
    drawn, shown, counts = [], [], []
    found: list[list[bool]] = []
    for number, sample in enumerate(samples):
        found.append([])
        for subject in sample.subjects:
            with _of(number, subject):
                mask = _masks(subject)
                found[-1].append(is_found(sample.image, mask))
                if found[-1][-1]:
                    drawn.append(subject_view(sample.image, mask, dino.blank))
                    shown += [subject_view(*known, dino.blank) for known in subject.references]
                    counts.append(len(subject.references))
    cosines = iter(_against(seen.images(dino, drawn), seen.images(dino, shown), counts))
    parts = [[float(np.mean(next(cosines))) if there else 0.0 for there in each] for each in found]
    missing = [each.count(False) for each in found]
    return Scores.of("dino_m", parts, dino.describe(), missing)


def _masks(subject: MaskedSubject) -> Mask:
    """The subject's mask in the drawn picture; a ValueError where it or every reference lacks."""
    if not len(subject.references):
        raise ValueError("there is no reference: give at least one, with its mask.")
    if subject.mask is None:
        raise ValueError("there is no mask in the picture that was drawn: give it, or a segmenter.")
    return subject.mask


@contextmanager
def _of(number: int, subject: MaskedSubject) -> Iterator[None]:
    """Say which sample's which subject a fault is of."""
    try:
        yield
    except ValueError as error:
        raise SampleError(number, f", {subject.name!r}: {error}") from None


def _to_references(
    title: str, metric: str, samples: Sequence[Sample], backbone: Backbone, seen: Embeddings | None
) -> Scores:
    require(title, samples, "references")
    seen = seen or Embeddings()
    images = seen.images(backbone, [sample.image for sample in samples])
    shown = seen.images(backbone, [image for sample in samples for image in sample.references])
    parts = _against(images, shown, [len(sample.references) for sample in samples])
    return Scores.of(metric, parts, backbone.describe())


def _against(vectors: Tensor, others: Tensor, counts: Sequence[int]) -> list[list[float]]:
    """Cosines of vector i with each of its counts[i] others, which follow one another."""
    groups = others.split(list(counts)) if counts else []
    return [
        [_cosine(vector, other) for other in group]
        for vector, group in zip(vectors, groups, strict=True)
    ]


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors of unit length, whose rounding must not leave the range."""
    return min(1.0, max(-1.0, float(a @ b)))
