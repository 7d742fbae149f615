"""Scoring units of drawn pictures: what an error names, what is in memory, what was not found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EvaluateConfig, LookConfig
from pipeline.errors import UserError
from pipeline.evaluation import run, scoring
from pipeline.evaluation.benches import MiniBench, Request, Selection, mini_bench
from pipeline.evaluation.benches import request as asked_of
from pipeline.evaluation.evaluation import Evaluation, scorers_of
from pipeline.evaluation.publish import publish
from pipeline.evaluation.scoring import MetricScorer
from pipeline.progress import Progress
from pipeline.report_evaluation import overview
from pipeline.storage import Storage
from tests.pipeline.evaluation.test_run import Oracle, made

LOOK = LookConfig(dino="miniworld:dino", segmenter="miniworld:judge")


def with_mask(request: Request, mask: Any) -> Request:
    """The request with another mask of what it selects; None = without one."""
    (chosen,) = request.selections
    subjects = [
        replace(subject, masks=(mask,)) if subject is chosen.subject else subject
        for subject in chosen.reference.subjects
    ]
    reference = replace(chosen.reference, subjects=tuple(subjects))
    return replace(request, selections=(Selection(reference, chosen.target),))


def test_an_error_names_the_picture_that_it_is_of() -> None:
    requests = [asked_of(each, 0, 0) for each in mini_bench(4, 32)]
    requests[0] = with_mask(requests[0], None)  # which DINO-M leaves out
    requests[2] = with_mask(requests[2], np.ones((8, 8), bool))
    scorer = MetricScorer(LOOK, "cpu")
    scorer.open()
    pictures = [request.reference.image for request in requests]
    with pytest.raises(UserError) as caught:
        scorer(requests, pictures, [None] * 4)
    (chosen,) = requests[2].selections
    said = f"{requests[2].key}, {chosen.subject.name!r}: the mask is (8, 8)"
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_an_error_of_no_picture_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked_of(each, 0, 0) for each in mini_bench(2, 32)]
    scorer = MetricScorer(LOOK, "cpu")
    scorer.open()
    weights = scorer._backbones["dino"].model
    for parameter in weights.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UserError) as caught:
        scorer(requests, [request.reference.image for request in requests], [None] * 2)
    assert str(caught.value).startswith("miniworld:dino gives vectors without a direction")


def evaluation(*methods: Any) -> Evaluation:
    cfg = EvaluateConfig(look=LOOK, resamples=100, unit_pictures=6)
    bench = MiniBench(3, 32)
    return Evaluation(cfg, bench, methods, scorers_of(cfg, bench))


def test_large_pictures_are_scored_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(evaluation(Oracle("right")), Storage(tmp_path / "whole"))["right"]
    asked, sizes = evaluation(Oracle("right")), []
    exact = asked.scorers[0]

    class Counted:
        measures, settings, open = exact.measures, exact.settings, exact.open

        def __call__(self, requests: Any, pictures: list[Image.Image], looks: Any) -> Any:
            sizes.append((len(requests), len(pictures), len(looks)))
            return exact(requests, pictures, looks)

    monkeypatch.setattr(scoring, "MOST_PIXELS", 3 * 32 * 32 + 1)
    counted = replace(asked, scorers=[Counted(), asked.scorers[1]])
    few = made(counted, Storage(tmp_path / "few"))["right"]
    assert sizes == [(4, 4, 4), (2, 2, 2)]
    assert [row["key"] for row in few] == [row["key"] for row in whole]
    for name in ("dino", "dino_m", "selected", "distance_target", "attention_iou"):
        assert [row[name] for row in few] == pytest.approx([row[name] for row in whole], abs=1e-5)


def test_pictures_drawn_elsewhere_are_in_memory_one_by_one(tmp_path: Path) -> None:
    foreign = Oracle("right")
    foreign.native = False
    made(evaluation(foreign), Storage(tmp_path))
    assert foreign.calls == [1] * 6


def test_subjects_that_were_not_found_are_told(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    asked = evaluation(Oracle("right"), Oracle("wrong", 1))
    rows = made(asked, storage)
    assert [(row["looked_for"], row["not_found"]) for row in rows["right"]] == [(1, 0)] * 6
    assert [(row["looked_for"], row["not_found"]) for row in rows["wrong"]] == [(1, 1)] * 6
    assert {row["dino_m"] for row in rows["wrong"]} == {0.0}
    text = publish(asked, storage).text
    assert "DINO-M: subjects that were not found, counted as 0: Right 0 of 6; Wrong 6 of 6." in text
    told = storage.read_json("evaluation/mini/scores.json")["methods"]
    assert told["wrong"]["missing"] == {"looked_for": 6, "not_found": 6}
    (bench,) = overview(storage)
    table = next(table for table in bench["tables"] if table["title"] == "Metrics")
    place = [title.startswith("DINO-M") for title in table["head"][1:]].index(True)
    notes = [line["cells"][place]["note"] for line in table["lines"]]
    assert notes == ["0 of 6 not found", "6 of 6 not found"]
    assert all(not cell["note"] for line in table["lines"] for cell in line["cells"][:place]), (
        "beside DINO-M alone"
    )


def test_a_bench_that_nobody_looked_for_subjects_on_tells_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    asked = evaluation(Oracle("right"))
    asked = replace(asked, scorers=[asked.scorers[0]])
    for method in asked.methods:
        run.make(asked, method, storage, Progress(terminal=False))
    assert "not found" not in publish(asked, storage).text
    told = storage.read_json("evaluation/mini/scores.json")["methods"]
    assert told["right"]["missing"] is None
