"""Cutting subjects out, and asking a segmenter where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssr_model.metrics import DinoBackbone, MaskedSubject, Sample, locate, measure, subject_view
from ssr_model.metrics.masking import SMALLEST, is_found
from ssr_model.vision import clip_crop
from tests.ssr_model.metrics.pictures import drawing

BLANK = (124, 116, 104)
CUP, CUP_MASK = drawing("green", "red")  # a box of 16 x 22
FISH, FISH_MASK = drawing("white", "blue", box=(2, 5, 41, 20))
GREEN = (0, 128, 0)


def test_the_view_is_the_subject_on_a_square_of_one_colour() -> None:
    view = np.asarray(subject_view(CUP, CUP_MASK, BLANK))
    assert view.shape == (28, 28, 3)  # 22 and an eighth of it, rounded up, on both ends
    inside = np.zeros((28, 28), bool)
    inside[3:25, 6:22] = True
    assert (view[~inside] == BLANK).all()
    assert np.array_equal(view[3:25, 6:22], np.asarray(CUP)[8:30, 12:28])


def test_what_the_mask_leaves_out_of_its_own_box_is_blank() -> None:
    holes = CUP_MASK.copy()
    holes[10:14, 14:20] = False
    view = np.asarray(subject_view(CUP, holes, BLANK))
    assert (view[5:9, 8:14] == BLANK).all() and (view[4, 6:22] != BLANK).any()
    soft = CUP_MASK.astype(np.float32) * 0.5
    soft[10:14, 14:20] = 0.49
    assert np.array_equal(np.asarray(subject_view(CUP, soft, BLANK)), view)


def test_masks_of_any_kind_are_the_same() -> None:
    expected = np.asarray(subject_view(CUP, CUP_MASK, BLANK))
    for mask in (CUP_MASK * np.uint8(255), CUP_MASK.astype(float), Image.fromarray(CUP_MASK)):
        assert np.array_equal(np.asarray(subject_view(CUP, mask, BLANK)), expected)
    array = np.asarray(CUP)
    assert np.array_equal(np.asarray(subject_view(array, CUP_MASK, BLANK)), expected)


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_every_backbone_sees_the_whole_subject_and_zeros_around(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A DINOv2's crop takes an eighth away: of the margin, not of the subject."""
    backbone: DinoBackbone = request.getfixturevalue(kind)
    long = Image.new("RGB", (200, 60), "white")
    mask = np.zeros((60, 200), bool)
    mask[10:50, 5:195] = True
    seen = clip_crop(backbone.image_processor, subject_view(long, mask, backbone.blank))
    row = seen[seen.shape[0] // 2].astype(int).min(axis=-1)
    assert row[0] < 130 and row[-1] < 130 and (row > 240).mean() > 0.7
    values = backbone.image_processor(
        Image.new("RGB", (64, 64), backbone.blank), return_tensors="np"
    ).pixel_values
    assert np.abs(values).max() < 0.5 / 255 / 0.22


def test_a_speck_is_no_subject() -> None:
    picture = Image.new("RGB", (64, 64))
    mask = np.zeros((64, 64), bool)
    assert not is_found(picture, mask)
    least = round(SMALLEST * 64 * 64)
    mask.flat[: least - 1] = True
    assert not is_found(picture, mask)
    mask.flat[:least] = True
    assert is_found(picture, mask)
    assert not is_found(picture, mask * 0.4)


def test_a_mask_that_selects_nothing() -> None:
    with pytest.raises(ValueError, match=r"below 0\.5 everywhere"):
        subject_view(CUP, CUP_MASK * 0.3, BLANK)
    with pytest.raises(ValueError, match="selects nothing"):
        subject_view(CUP, np.zeros((40, 48), bool), BLANK)


class Table:
    """Knows where a few things are; sees no fish."""

    name = "table"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> Any:
        self.asked += [list(each) for each in names]
        assert all(isinstance(image, Image.Image) for image in images)
        return [[{"cup": CUP_MASK}.get(name) for name in each] for each in names]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def subject(name: str, mask: Any = None) -> MaskedSubject:
    return MaskedSubject(name, [(CUP, CUP_MASK)], mask)


def test_the_segmenter_is_asked_for_what_nobody_looked_for() -> None:
    given = CUP_MASK[::-1].copy()
    samples = [
        Sample(CUP, subjects=[subject("cup"), subject("key", given), subject("fish")]),
        Sample(CUP, subjects=[subject("cup", given)]),
        Sample(CUP),
        Sample(np.asarray(CUP), subjects=[subject("fish")]),
    ]
    table = Table()
    located = locate(samples, table)
    assert table.asked == [["cup", "fish"], ["fish"]]
    masks = [[s.mask for s in sample.subjects] for sample in located]
    assert np.array_equal(masks[0][0], CUP_MASK) and masks[0][1] is given  # type: ignore[arg-type]
    assert not masks[0][2].any() and masks[0][2].shape == (40, 48)  # type: ignore[union-attr]
    assert located[1] is samples[1] and located[2] is samples[2]
    assert locate(located, table) == located and len(table.asked) == 2


def test_measure_asks_the_segmenter(dino: DinoBackbone) -> None:
    samples = [
        Sample(CUP, subjects=[subject("cup"), subject("fish")]),
        Sample(FISH, subjects=[subject("cup", FISH_MASK)]),
    ]
    scores = measure(["dino_m"], samples, {"dino": dino}, Table())["dino_m"]
    assert scores.parts[0] == pytest.approx([1, 0], abs=1e-6)
    assert scores.values[0] == pytest.approx(0.5, abs=1e-6)
    assert scores.missing is not None and scores.missing.tolist() == [1, 0]
    assert scores.backbone == {**dino.describe(), "segmenter": {"name": "table"}}


def test_a_segmenter_that_answers_something_else() -> None:
    class Lazy(Table):
        def __call__(self, images: Any, names: Any) -> Any:
            return [[]] * len(images)

    with pytest.raises(ValueError, match="table must give a mask or None for each name"):
        locate([Sample(CUP, subjects=[subject("cup")])], Lazy())
