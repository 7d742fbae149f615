"""Values and their formulas are one: what a formula says, evaluated, is what was reckoned."""

from __future__ import annotations

import pytest

from pipeline.planning.quantities import Quantity, Sheet, ceil, floor, known, largest, least, total
from tests.pipeline.planning.formulas import evaluate

A, B, C = known(12, "images", "paper"), known(0.25, "", "assumption"), known(3e9, "B/s", "set")
CASES: list[tuple[Quantity, float, str]] = [
    (A * B, 3, "12 images × 0.25"),
    (A / (B * C), 12 / 0.75e9, "12 images / (0.25 × 3,000,000,000 B/s)"),
    (A / B / C, 48 / 3e9, "12 images / 0.25 / 3,000,000,000 B/s"),
    (A / (B / C), 12 * 3e9 / 0.25, "12 images / (0.25 / 3,000,000,000 B/s)"),
    ((A + B) * C, 12.25 * 3e9, "(12 images + 0.25) × 3,000,000,000 B/s"),
    (A + B * 2, 12.5, "12 images + 0.25 × 2"),
    (ceil(A / 5), 3, "ceil(12 images / 5)"),
    (floor(A / 5), 2, "floor(12 images / 5)"),
    (least(A, B * 4), 1, "min(12 images, 0.25 × 4)"),
    (largest(A, known(1, "images")), 12, "max(12 images, 1 image)"),
    (total([A, B, B]), 12.5, "12 images + 0.25 + 0.25"),
]


@pytest.mark.parametrize(("of", "value", "formula"), CASES, ids=[case[2] for case in CASES])
def test_a_formula_says_what_was_reckoned(of: Quantity, value: float, formula: str) -> None:
    assert of.formula == formula
    assert of.value == pytest.approx(value, rel=1e-12)
    assert evaluate(formula) == pytest.approx(value, rel=1e-12)


def test_whole_numbers_stay_whole() -> None:
    """0.1 times 30 is a little more than three: no piece more for that."""
    assert ceil(known(0.1, "") * 30).value == 3
    assert floor(known(0.7, "") / known(0.1, "")).value == 7
    assert ceil(known(1, "") / 1e14).value == 1, "a little of a piece is one"


def test_a_line_is_a_number_of_its_own_in_other_formulas() -> None:
    sheet = Sheet("download")
    links = sheet.put("links", A / B, "links")
    sheet.put("requests", links * C, "requests")
    one, two = sheet
    assert (one.value, one.formula, one.source) == (48, "12 images / 0.25", "paper; assumption")
    assert two.formula == "48 links × 3,000,000,000 B/s"
    assert two.source == "line links; set"
    assert two.roots == ("paper", "assumption", "set")
    other = Sheet("in all")
    other.put("links", links + 1, "links")
    assert next(iter(other)).source == "line download: links"
    with pytest.raises(ValueError, match="two lines 'links'"):
        sheet.put("links", A, "links")
