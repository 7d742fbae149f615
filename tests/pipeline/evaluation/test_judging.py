"""The mini world's judge as a segmenter: exact scenes, and what it cannot judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluation.judging import JudgeSegmenter
from pipeline.miniworld import world
from ssr_model.metrics import MaskedSubject, Sample, locate

SCENES = [world.scene(seed, "val", 2) for seed in range(40)]


@pytest.fixture(scope="module")
def judge() -> JudgeSegmenter:
    return JudgeSegmenter.load()


def picture(scene: world.Scene) -> Image.Image:
    return Image.fromarray(world.render(scene))


def test_its_masks_are_nearly_the_exact_ones(judge: JudgeSegmenter) -> None:
    names = [[spec.cls for spec in scene.subjects] for scene in SCENES]
    found = judge([picture(scene) for scene in SCENES], names)
    overlaps = []
    for scene, masks in zip(SCENES, found, strict=True):
        for mask, exact in zip(masks, world.masks(scene), strict=True):
            seen = np.zeros_like(exact) if mask is None else mask
            assert seen.shape == (32, 32) and seen.dtype == bool
            overlaps.append((seen & exact).sum() / (seen | exact).sum())
    assert np.mean(overlaps) > 0.8


def test_what_is_not_there_is_none(judge: JudgeSegmenter) -> None:
    shown = [{spec.cls for spec in scene.subjects} for scene in SCENES]
    absent = [[name for name in world.CLASSES if name not in classes] for classes in shown]
    found = judge([picture(scene) for scene in SCENES], absent)
    assert np.mean([mask is not None for masks in found for mask in masks]) < 0.02
    assert judge([], []) == [] and judge([picture(SCENES[0])], [[]]) == [[]]


def test_it_finds_subjects_for_metrics(judge: JudgeSegmenter) -> None:
    scene = SCENES[0]
    image, masks = picture(scene), world.masks(scene)
    subjects = [
        MaskedSubject(spec.cls, [(image, mask)])
        for spec, mask in zip(scene.subjects, masks, strict=True)
    ]
    located = locate([Sample(image, subjects=subjects)], judge)[0]
    for subject, exact in zip(located.subjects, masks, strict=True):
        assert isinstance(subject.mask, np.ndarray)
        assert (subject.mask != exact).mean() < 0.1


def test_what_it_says_of_itself(judge: JudgeSegmenter) -> None:
    said = judge.describe()
    assert said["name"] == judge.name == "miniworld:judge" and len(said["sha256"]) == 64
    assert json.loads(json.dumps(said)) == said


def test_what_it_cannot_judge_is_one_line(judge: JudgeSegmenter) -> None:
    image = picture(SCENES[0])
    for pictures, names, match in (
        ([image, image.resize((64, 32))], [["cup"], ["cup"]], "knows pictures of 32 x 32, and"),
        ([image], [["cup", "zebra"]], "does not know 'zebra', only the mini world's classes"),
    ):
        with pytest.raises(UserError, match=match) as error:
            judge(pictures, names)
        assert "\n" not in str(error.value)
