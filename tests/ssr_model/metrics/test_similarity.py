"""Every similarity: pinned values on fixed drawings, the formula written out, its properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssr_model.metrics import (
    METRICS,
    ClipBackbone,
    DinoBackbone,
    MaskedSubject,
    Sample,
    Scores,
    subject_view,
)
from ssr_model.metrics.similarity import clip_es, clip_i, clip_t, dino_m
from ssr_model.metrics.similarity import dino as dino_score
from tests.ssr_model.metrics.pictures import drawing

CUP, CUP_MASK = drawing("sandybrown", "red")
SNOW_CUP, SNOW_MASK = drawing("lightblue", "red", box=(20, 4, 40, 31))
FISH, FISH_MASK = drawing("green", "blue", box=(5, 15, 40, 30), spots="yellow")
DARK, DARK_MASK = drawing("purple", "orange", size=(40, 40))
NOWHERE = np.zeros((40, 48), bool)

SAMPLES = [
    Sample(
        SNOW_CUP,
        text="a red cup on snow",
        others=["a fish"],
        references=[CUP],
        subjects=[MaskedSubject("cup", [(CUP, CUP_MASK)], SNOW_MASK)],
    ),
    Sample(
        FISH,
        text="a fish on grass",
        others=["a cup", "a star"],
        references=[CUP, SNOW_CUP, DARK],
        subjects=[
            MaskedSubject("fish", [(DARK, DARK_MASK), (CUP, CUP_MASK)], FISH_MASK),
            MaskedSubject("cup", [(CUP, CUP_MASK)], NOWHERE),
            MaskedSubject("star", [(DARK, DARK_MASK)], FISH_MASK),
        ],
    ),
    Sample(
        DARK,
        text="",
        others=["a house"],
        references=[DARK],
        subjects=[MaskedSubject("star", [(DARK, DARK_MASK)], DARK_MASK)],
    ),
]

PINNED = {
    "clip_t": [-0.10588, -0.17140, -0.13983],
    "clip_es": [-0.04695, -0.30362, -0.26648],
    "clip_i": [0.97537, 0.63407, 1.00000],
    "dino": [0.71314, -0.12836, 1.00000],
    "dino_m": [0.99635, -0.13608, 1.00000],
    "dino@2": [0.49969, 0.10224, 1.00000],
    "dino_m@2": [0.99405, 0.10231, 1.00000],
}
"""Of the tiny models, to see that nothing moves; the formulas are written out further down."""


@pytest.fixture
def score(
    clip: ClipBackbone, dino: DinoBackbone, dinov2: DinoBackbone
) -> Callable[[str, list[Sample]], Scores]:
    """`score(name, samples)`, on the tiny CLIP, DINO or (name@2) DINOv2."""
    looks: dict[str, Any] = {"clip": clip, "dino": dino}

    def compute(name: str, samples: list[Sample]) -> Scores:
        metric = METRICS[name.removesuffix("@2")]
        backbone = dinov2 if name.endswith("@2") else looks[metric.backbone]
        return metric.compute(samples, backbone)

    return compute


NAMES = ["clip_t", "clip_es", "clip_i", "dino", "dino_m", "dino@2", "dino_m@2"]


@pytest.mark.parametrize("name", NAMES)
def test_pinned(name: str, score: Any) -> None:
    scores = score(name, SAMPLES)
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores.values, PINNED[name], atol=2e-4)
    assert scores.metric == name.removesuffix("@2")


@pytest.mark.parametrize("name", NAMES)
def test_neither_order_nor_neighbours_count(name: str, score: Any) -> None:
    together = score(name, SAMPLES)
    alone = [score(name, [sample]) for sample in SAMPLES]
    np.testing.assert_allclose(together.values, [one.values[0] for one in alone], atol=1e-5)
    turned = score(name, SAMPLES[::-1])
    np.testing.assert_allclose(turned.values[::-1], together.values, atol=1e-5)
    # the order of a sample's own references, texts and subjects
    inside = [
        replace(
            sample,
            others=sample.others[::-1],
            references=sample.references[::-1],
            subjects=[replace(s, references=s.references[::-1]) for s in sample.subjects[::-1]],
        )
        for sample in SAMPLES
    ]
    found = score(name, inside)
    np.testing.assert_allclose(found.values, together.values, atol=1e-5)
    for part, expected in zip(found.parts, together.parts, strict=True):
        assert part[::-1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_means_of_parts_within_the_range(name: str, score: Any) -> None:
    scores, metric = score(name, SAMPLES), METRICS[name.removesuffix("@2")]
    for value, parts in zip(scores.values, scores.parts, strict=True):
        assert value == pytest.approx(np.mean(parts), abs=1e-6)
        assert all(metric.low <= part <= metric.high for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_no_samples_have_no_scores(name: str, score: Any) -> None:
    scores = score(name, [])
    assert scores.values.shape == (0,) and scores.parts == []


def test_batch_sizes_are_the_same(clip: ClipBackbone, dinov2: DinoBackbone) -> None:
    pictures = [CUP, SNOW_CUP, FISH, DARK, CUP.resize((200, 90))]
    for backbone in (clip, dinov2):
        expected = backbone.images(pictures)
        torch.testing.assert_close(expected.norm(dim=-1), torch.ones(5))
        for size in (1, 2, 5):
            backbone.batch_size = size
            torch.testing.assert_close(backbone.images(pictures), expected, atol=1e-5, rtol=0)
        backbone.batch_size = 32
    texts = ["a cup", "", "a red fish on the beach", "a cup"]
    expected = clip.texts(texts)
    clip.batch_size = 3
    torch.testing.assert_close(clip.texts(texts), expected, atol=1e-5, rtol=0)
    clip.batch_size = 32


@pytest.mark.parametrize("name", ["clip_i", "dino", "dino@2"])
def test_a_picture_is_itself(name: str, score: Any) -> None:
    sample = Sample(FISH, references=[FISH, FISH.copy()])
    assert score(name, [sample]).parts[0] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("name", ["dino_m", "dino_m@2"])
def test_a_subject_is_itself_wherever_it_stands(name: str, score: Any) -> None:
    """Elsewhere, on another ground, in a picture of another shape: the cut-out is the same."""
    moved, mask = drawing("lightblue", "red", box=(60, 30, 75, 51), size=(90, 61))
    sample = Sample(moved, subjects=[MaskedSubject("cup", [(CUP, CUP_MASK)], mask)])
    scores = score(name, [sample])
    assert scores.values[0] == pytest.approx(1, abs=1e-6) and scores.missing.tolist() == [0]
    # unmasked, the grounds count
    assert score(name.replace("_m", ""), [Sample(moved, references=[CUP])]).values[0] < 0.99


@torch.no_grad()
def test_clip_is_the_cosine_of_its_embeddings(clip: ClipBackbone) -> None:
    """Written out with the library's own processing; no clamp, no factor, no template."""

    def image(picture: Any) -> torch.Tensor:
        pixels = clip.image_processor(picture, return_tensors="pt").pixel_values
        return clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)[0]

    def text(words: str) -> torch.Tensor:
        ids = clip.tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        return clip.model.text_projection(clip.model.text_model(ids).pooler_output)[0]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    for i, found in enumerate(clip_t(SAMPLES, clip).values):
        expected = cosine(image(SAMPLES[i].image), text(SAMPLES[i].text or ""))
        assert found == pytest.approx(expected, abs=1e-4)
    for i, parts in enumerate(clip_es(SAMPLES, clip).parts):
        expected = [cosine(image(SAMPLES[i].image), text(other)) for other in SAMPLES[i].others]
        assert parts == pytest.approx(expected, abs=1e-4)
    for i, parts in enumerate(clip_i(SAMPLES, clip).parts):
        expected = [cosine(image(SAMPLES[i].image), image(r)) for r in SAMPLES[i].references]
        assert parts == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_is_the_cosine_of_cls_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(kind)

    def cls(picture: Any) -> torch.Tensor:
        pixels = backbone.image_processor(picture, return_tensors="pt").pixel_values
        return backbone.model(pixels).last_hidden_state[0, 0]

    def cosine(a: Any, b: Any) -> float:
        return float(torch.nn.functional.cosine_similarity(cls(a), cls(b), dim=0))

    for sample, parts in zip(SAMPLES, dino_score(SAMPLES, backbone).parts, strict=True):
        expected = [cosine(sample.image, reference) for reference in sample.references]
        assert parts == pytest.approx(expected, abs=1e-4)
    fish, blank = SAMPLES[1].subjects[0], backbone.blank
    drawn = subject_view(FISH, FISH_MASK, blank)
    views = [subject_view(image, mask, blank) for image, mask in fish.references]
    expected = np.mean([cosine(drawn, view) for view in views])
    assert dino_m(SAMPLES, backbone).parts[1][0] == pytest.approx(expected, abs=1e-4)


def test_a_subject_that_is_not_there_counts_as_zero(score: Any) -> None:
    """Three subjects, one of them not found: its zero is in the mean."""
    scores = score("dino_m", SAMPLES)
    assert scores.missing.tolist() == [0, 1, 0]
    there, gone, third = scores.parts[1]
    assert gone == 0 and there != 0
    assert scores.values[1] == pytest.approx((there + third) / 3, abs=1e-6)
    everything_gone = Sample(CUP, subjects=[MaskedSubject("cup", [(CUP, CUP_MASK)], NOWHERE)])
    scores = score("dino_m", [everything_gone])
    assert scores.values.tolist() == [0] and scores.missing.tolist() == [1]


def test_several_references_are_averaged(score: Any) -> None:
    one, two = (score("dino", [Sample(FISH, references=[r])]).values[0] for r in (CUP, DARK))
    both = score("dino", [Sample(FISH, references=[CUP, DARK])])
    assert both.parts[0] == pytest.approx([one, two], abs=1e-5)
    assert both.values[0] == pytest.approx((one + two) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "sample", "match"),
    [
        ("clip_t", Sample(CUP), r"sample 1 has no text, which CLIP-T needs"),
        ("clip_es", Sample(CUP), r"sample 1 has no text of another subject .* CLIP-ES needs"),
        ("clip_i", Sample(CUP), r"sample 1 has no reference, which CLIP-I needs"),
        ("dino", Sample(CUP), r"sample 1 has no reference, which DINO needs"),
        ("dino_m", Sample(CUP), r"sample 1 has no masked subject, which DINO-M needs"),
        (
            "dino_m",
            Sample(CUP, subjects=[MaskedSubject("cup", [(CUP, CUP_MASK)])]),
            r"sample 1, 'cup': there is no mask in the picture .* give it, or a segmenter",
        ),
        (
            "dino_m",
            Sample(CUP, subjects=[MaskedSubject("cup", [], CUP_MASK)]),
            r"sample 1, 'cup': there is no reference",
        ),
        (
            "dino_m",
            Sample(CUP, subjects=[MaskedSubject("cup", [(CUP, CUP_MASK.T)], CUP_MASK)]),
            r"sample 1, 'cup': the mask is \(48, 40\)",
        ),
        (
            "dino_m",
            Sample(CUP, subjects=[MaskedSubject("cup", [(CUP, NOWHERE)], CUP_MASK)]),
            r"sample 1, 'cup': the mask selects nothing",
        ),
        (
            "dino_m",
            Sample(CUP, subjects=[MaskedSubject("cup", [(CUP, CUP_MASK)], CUP_MASK[1:])]),
            r"sample 1, 'cup': the mask is \(39, 48\)",
        ),
    ],
)
def test_samples_that_lack_are_one_line(name: str, sample: Sample, match: str, score: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        score(name, [SAMPLES[0], sample])
    assert "\n" not in str(error.value)
