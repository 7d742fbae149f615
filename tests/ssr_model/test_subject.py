"""What a subject may say: its query, mask, scale, region and schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssr_model.images import as_region
from ssr_model.subject import Subject, subject_rows

IMAGE = np.zeros((4, 4, 3), np.uint8)
LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor",
    "up_blocks.10.attentions.0.transformer_blocks.0.attn2.processor",
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor",
]


def test_scales_of_blocks() -> None:
    assert set(Subject(IMAGE, "cup", scale=0.3).scale_at(LAYERS).values()) == {0.3}
    given = {"up_blocks.1": 0.0, "down_blocks": 0.5, "down_blocks.1": 2, LAYERS[4]: 0.25}
    scales = Subject(IMAGE, "cup", scale=given).scale_at(LAYERS)
    assert list(scales.values()) == [0.5, 2.0, 0.0, 1.0, 0.25]  # up_blocks.10 is not up_blocks.1
    with pytest.raises(ValueError, match="did you mean 'down_blocks'"):
        Subject(IMAGE, "cup", scale={"down_block": 1}).scale_at(LAYERS)
    with pytest.raises(ValueError, match=r"in 'encoder'; it has down_blocks"):
        Subject(IMAGE, "cup", scale={"encoder": 1}).scale_at(LAYERS)


def test_schedules() -> None:
    fading = Subject(IMAGE, "cup", schedule=[1, 0])
    assert [fading.factor_at(p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    each = Subject(IMAGE, "cup", schedule=[0.1, 0.2, 0.4])
    assert [each.factor_at(step / 2) for step in range(3)] == [0.1, 0.2, 0.4]
    assert Subject(IMAGE, "cup", schedule=(0.5,)).factor_at(0.7) == 0.5
    assert Subject(IMAGE, "cup").factor_at(0.7) == 1


def test_regions_of_any_size() -> None:
    region = np.zeros((3, 6))
    region[:, 3:] = 1
    assert as_region(region, (2, 4)).tolist() == [[0, 0, 1, 1]] * 2
    assert as_region(region, (1, 3)).tolist() == [[0, 0.5, 1]]
    assert as_region(region, (6, 12)).tolist() == [[0] * 6 + [1] * 6] * 6
    assert as_region(None, (2, 2)).tolist() == [[1, 1], [1, 1]]
    for bad, message in (
        (np.zeros((2, 2)), "region selects nothing"),
        (np.ones((2, 2, 3)), "region must be"),
        (np.full((2, 2), np.nan), "region must lie in"),
        ("left", "PIL image, an array or a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            as_region(bad, (1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has neither"),
        ({"query": "  "}, "has neither"),
        ({"query": 3}, "a query must be text"),
        ({"query": "a", "scale": float("nan")}, "scale must be a finite number"),
        ({"query": "a", "scale": True}, "scale must be a finite number"),
        ({"query": "a", "scale": "1"}, "scale must be a finite number"),
        ({"query": "a", "scale": None}, "scale must be a finite number"),
        ({"query": "a", "scale": {"up_blocks": float("inf")}}, "scale at 'up_blocks'"),
        ({"query": "a", "schedule": []}, "schedule must be a list"),
        ({"query": "a", "schedule": 0.5}, "schedule must be a list"),
        ({"query": "a", "schedule": "10"}, "schedule must be a list"),
        ({"query": "a", "schedule": [1, None]}, "factor of a subject's schedule"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Subject(IMAGE, **fields)
    assert "\n" not in str(error.value)


def test_rows() -> None:
    a, b = Subject(IMAGE, "cup"), Subject(IMAGE, "fish")
    assert subject_rows([a, b]) == [[a, b]]
    assert subject_rows([[a], []]) == [[a], []]
    assert subject_rows([]) == [[]]
    with pytest.raises(ValueError, match="even for one"):
        subject_rows(a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one such list per prompt"):
        subject_rows([a, [a]])  # type: ignore[list-item]
