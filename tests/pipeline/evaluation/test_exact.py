from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.benches import MiniBench, Request, mini_bench
from pipeline.evaluation.exact import (
    MEASURES,
    ExactScorer,
    attention_iou,
    colour_scores,
    peak_on,
    texture_matches,
)
from pipeline.miniworld import world

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
    assert scored == {"nearer": 0.0, "distance_target": None, "distance_other": None}


def test_peak_lies_on_a_subject_or_on_the_ground() -> None:
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 4:12, 4:12] = True
    masks[1, 20:28, 20:28] = True
    for at, expected in (((1, 1), 0), ((6, 6), 1), ((0, 7), None), ((2, 2), 0)):
        attention = np.full((8, 8), 0.01)
        attention[at] = 0.5
        assert peak_on(attention, list(masks)) == expected
    assert peak_on(np.ones((1, 1)), list(masks)) == 0, "one patch is the whole picture"


def test_texture_is_told_by_the_share_of_the_second_colour() -> None:
    """Every held-out subject drawn as it is matches; drawn with the other texture it does not."""
    right, wrong = 0, 0
    for reference in mini_bench(60, 32):
        for subject in reference.subjects:
            spec = subject.spec
            other = "plain" if spec.identity.texture == "striped" else "striped"
            for texture in (spec.identity.texture, other):
                as_if = replace(spec, identity=replace(spec.identity, texture=texture))
                scene = world.Scene((as_if,), "grass", (0.3, 0.1))
                (mask,) = world.masks(scene)
                matches = texture_matches(world.render(scene)[mask], spec)
                right += texture != other and matches
                wrong += texture == other and matches
    assert right == 120 and wrong == 0


def test_attention_iou() -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:20] = True  # two patches of 4 x 4 down, three across
    looks = np.zeros((8, 8), np.float32)
    looks[2:4, 2:5] = 1
    assert attention_iou(looks, mask) == 1
    assert attention_iou(np.roll(looks, 1, axis=0), mask) == pytest.approx(3 / 9)
    assert attention_iou(np.roll(looks, 4, axis=0), mask) == 0
    speck = np.zeros((32, 32), bool)
    speck[0, 0] = True
    corner = np.zeros((8, 8), np.float32)
    corner[0, 0] = 1
    assert attention_iou(corner, speck) == 1, "the patch that it covers most counts"


def test_the_judge_scores_the_references_themselves() -> None:
    """A picture that shows both subjects: A present, B not absent, colours and texture A's."""
    bench = MiniBench(30, 32)
    requests = bench.requests(0, len(bench))
    scorer = ExactScorer()
    scorer.open()
    pictures = [request.reference.image for request in requests]
    attentions = [_on(request) for request in requests]
    rows = scorer(requests, pictures, attentions)
    means = {key: np.mean([row[key] for row in rows if row[key] is not None]) for key in rows[0]}
    assert means["target_present"] > 0.95 and means["other_absent"] < 0.05
    assert means["nearer"] > 0.95 and means["selected"] < 0.05 and means["texture"] > 0.85
    assert means["distance_target"] < 40 < 100 < means["distance_other"]
    assert means["peak_target"] == 1 and means["peak_other"] == 0 and means["attention_iou"] > 0.9
    assert {measure.name for measure in MEASURES} == set(rows[0])


def test_pictures_of_another_size_are_refused() -> None:
    (request,) = MiniBench(1, 32).requests(0, 1)
    scorer = ExactScorer()
    scorer.open()
    with pytest.raises(UserError, match="64x64"):
        scorer([request], [request.reference.image.resize((64, 64))], [None])


def _on(request: Request) -> np.ndarray:
    """A map that looks at the asked subject alone, more where it covers more."""
    mask = request.selections[0].subject.mask
    assert mask is not None
    return mask.reshape(8, 4, 8, 4).mean(axis=(1, 3)).astype(np.float32)
