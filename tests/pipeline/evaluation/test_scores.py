import numpy as np
import pytest

from pipeline.evaluation import table
from pipeline.evaluation.scores import colour_scores, peak_on

RED_WHITE = ((222, 32, 36), (252, 252, 252))
BLUE_BLACK = ((44, 70, 226), (22, 22, 28))


def picture(colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    region = np.zeros((32, 32), bool)
    region[8:16, 8:16] = True
    pixels = np.full((32, 32, 3), 128, np.uint8)
    pixels[region] = colour
    return pixels, region


def test_colours_are_compared_with_both_palettes() -> None:
    scored = colour_scores(*picture((222, 32, 36)), RED_WHITE, [BLUE_BLACK])
    assert scored["nearer"] and scored["distance_target"] == 0
    assert scored["distance_other"] == pytest.approx(np.linalg.norm([200, 10, 8]), abs=0.01)
    swapped = colour_scores(*picture((222, 32, 36)), BLUE_BLACK, [RED_WHITE])
    assert not swapped["nearer"] and swapped["distance_other"] == 0


def test_a_picture_without_the_subject_is_not_nearer() -> None:
    pixels, region = picture((222, 32, 36))
    region[:] = False
    scored = colour_scores(pixels, region, RED_WHITE, [BLUE_BLACK])
    assert scored == {"nearer": False, "distance_target": None, "distance_other": None}


def test_peak_lies_on_a_subject_or_on_the_ground() -> None:
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 4:12, 4:12] = True
    masks[1, 20:28, 20:28] = True
    for at, expected in (((1, 1), 0), ((6, 6), 1), ((0, 7), None), ((2, 2), 0)):
        attention = np.full((8, 8), 0.01)
        attention[at] = 0.5
        assert peak_on(attention, list(masks)) == expected
    assert peak_on(np.ones((1, 1)), list(masks)) == 0, "one patch is the whole picture"


def test_summary_leaves_out_what_was_not_measured() -> None:
    samples = [
        {"target_present": True, "distance_target": 10.0, "peak_target": None},
        {"target_present": False, "distance_target": None, "peak_target": None},
    ]
    summary = table.summarise(samples)
    assert summary["samples"] == 2 and summary["target_present"] == 0.5
    assert summary["distance_target"] == 10.0 and summary["peak_target"] is None
    text = table.markdown("bench", {"SSR": summary})
    assert text.splitlines()[2].startswith("| SSR | 0.50 |")
    assert len({line.count("|") for line in text.splitlines()}) == 1
