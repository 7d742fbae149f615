"""Drawing and scoring on methods whose pictures are known: an oracle draws the asked subject."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.command_line import load, presets
from pipeline.config import EvaluateConfig, LookConfig
from pipeline.config import evaluate as evaluate_config
from pipeline.errors import UserError
from pipeline.evaluation import run
from pipeline.evaluation.benches import MiniBench, Request
from pipeline.evaluation.drawing import spans
from pipeline.evaluation.evaluation import Evaluation, plan, scorers_of
from pipeline.evaluation.methods import METHODS, Drawn
from pipeline.evaluation.publish import publish
from pipeline.evaluation.results import Results
from pipeline.progress import Progress
from pipeline.storage import Storage
from tests.pipeline.evaluation import folders, rivals
from tests.pipeline.evaluation.dreambench_text import published_text


class Oracle:
    """Draws the reference's subject `offset` places after the asked one, on grey ground, and looks
    at it."""

    native, learns = True, False

    def __init__(self, name: str, offset: int = 0, **settings: Any) -> None:
        self.name, self.title, self.offset = name, name.title(), offset
        self.settings = settings
        self.calls: list[int] = []
        self.opened = 0

    def check(self, bench: Any) -> None: ...

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None: ...

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        self.calls.append(len(requests))
        drawn = []
        for request in requests:
            (chosen,) = request.selections
            subjects = chosen.reference.subjects
            mask = subjects[(chosen.target + self.offset) % len(subjects)].mask
            pixels = np.where(mask[..., None], np.asarray(chosen.reference.image), 128)
            looks = mask.reshape(8, 4, 8, 4).mean(axis=(1, 3)).astype(np.float32)
            drawn.append(Drawn(Image.fromarray(pixels.astype(np.uint8)), looks))
        return drawn


def evaluation(
    methods: Sequence[Any], references: int = 5, look: LookConfig | None = None, **settings: Any
) -> Evaluation:
    cfg = EvaluateConfig(unit_pictures=4, look=look or LookConfig(), resamples=200, **settings)
    bench = MiniBench(references, 32)
    return Evaluation(cfg, bench, methods, scorers_of(cfg, bench))


def made(asked: Evaluation, storage: Storage) -> dict[str, list[dict[str, Any]]]:
    """Every method's rows of scores, by its name."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in asked.methods:
        run.make(asked, method, storage, Progress(terminal=False))
        rows[method.name] = []
        for unit in asked.units(method):
            with storage.open_input(f"{asked.folder}/scores/{method.name}/{unit}.parquet") as file:
                rows[method.name] += pq.read_table(file).to_pylist()
    return rows


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows if row[key] is not None]))


def test_known_pictures_get_known_scores(tmp_path: Path) -> None:
    look = LookConfig(clip="miniworld:clip")
    asked = evaluation([Oracle("right"), Oracle("wrong", 1)], look=look)
    found = made(asked, Storage(tmp_path))
    assert [len(rows) for rows in found.values()] == [10, 10]
    right, wrong = found["right"], found["wrong"]
    for key in ("target_present", "other_absent", "nearer", "selected", "peak_target"):
        assert mean(right, key) > 0.85 > 0.15 > mean(wrong, key)
    assert mean(right, "distance_target") < 40 < 80 < mean(right, "distance_other")
    assert mean(right, "clip_t") > mean(wrong, "clip_t") + 0.1
    assert mean(right, "clip_es") < mean(wrong, "clip_es") - 0.1
    assert [row["seed"] for row in right] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({row["key"] for row in right}) == 10
    assert {row["about"] for row in right} == {'{"asked": "A"}', '{"asked": "B"}'}


def test_finished_units_are_not_made_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    first, again = Oracle("right"), Oracle("right")
    before = made(evaluation([first]), storage)
    assert first.calls == [4, 4, 2]
    storage.delete("evaluation/mini/pictures/right/_done/000004-000008.json")
    storage.delete("evaluation/mini/scores/right/_done/000008-000010.json")
    after = made(evaluation([again]), storage)
    assert again.calls == [4] and after == before


def test_another_metric_draws_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    made(evaluation([Oracle("right")]), storage)
    again = Oracle("right")
    rows = made(evaluation([again], look=LookConfig(clip="miniworld:clip")), storage)
    assert again.calls == [] and mean(rows["right"], "clip_t") != 0


def test_a_bench_may_grow_and_shrink(tmp_path: Path) -> None:
    storage, calls = Storage(tmp_path), []
    for references in (3, 5, 3, 2):
        method = Oracle("right")
        rows = made(evaluation([method], references), storage)["right"]
        assert len(rows) == 2 * references
        calls.append(sum(method.calls))
    assert calls == [6, 6, 0, 0]


def test_pictures_of_other_settings_are_made_again(tmp_path: Path, capsys) -> None:
    storage = Storage(tmp_path)
    made(evaluation([Oracle("right", guidance=7.5)]), storage)
    again = Oracle("right", guidance=2.0)
    made(evaluation([again]), storage)
    assert sum(again.calls) == 10
    assert "made with other settings before (guidance)" in capsys.readouterr().out


def test_a_method_that_learns_gets_one_reference_at_a_time() -> None:
    assert spans(MiniBench(3, 32), 4, learns=True) == [(0, 2), (2, 4), (4, 6)]
    assert spans(MiniBench(3, 32), 4, learns=False) == [(0, 4), (4, 6)]
    assert spans(MiniBench(3, 32), 1, learns=False) == [(0, 2), (2, 4), (4, 6)], "never half of one"


def test_what_is_published(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    asked = evaluation([Oracle("right"), Oracle("wrong", 1)], 15)
    made(asked, storage)
    written = publish(asked, storage)
    told = storage.read_json("evaluation/mini/scores.json")
    found = told["methods"]["right"]["means"]["selected"]
    assert found["samples"] == 30 and found["clusters"] == 15
    assert found["low"] <= found["mean"] <= found["high"] and found["mean"] > 0.8
    assert told["methods"]["wrong"]["means"]["selected"]["mean"] == 0
    assert told["paper"] == {} and told["bench"]["published"] is False
    lines = written.text.splitlines()
    assert lines[0].startswith("| 15 held-out mini scenes of two subjects | A present ↑ |")
    assert lines[2].startswith("| Right | ") and "[" in lines[2]
    rows = Results.read(storage, "evaluation/mini/scores.parquet")
    assert len(rows.rows) == 60 and list(rows.methods) == ["right", "wrong"]
    with Image.open(tmp_path / "evaluation/mini/grid.png") as sheet:
        assert sheet.width > 5 * 160 and sheet.height > 12 * 160
    with Image.open(tmp_path / "evaluation/mini/extremes.png") as sheet:
        assert sheet.width > 9 * 160 and sheet.height > 4 * 160


def test_figures_of_the_paper_stand_beside_its_own_bench_alone(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    asked = evaluation([Oracle("right")], look=LookConfig(clip="miniworld:clip"))
    made(asked, storage)
    assert "the paper's figures" not in publish(asked, storage).text
    asked.bench.published = True  # type: ignore[misc]
    text = publish(asked, storage).text
    assert "SSR-Encoder, the paper's figures" in text and "does not say which CLIP" in text


def test_a_bench_without_masks_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    folder = folders.write_dreambench(tmp_path / "bench", published_text())
    cfg = EvaluateConfig(
        root=str(tmp_path / "run"),
        bench=str(folder),
        methods=["text-only", "ssr-mask"],
        look=LookConfig(clip="miniworld:clip"),
    )
    rivals.write_ssr(tmp_path / "run" / "model", cfg.models)
    with pytest.raises(UserError, match="ssr-mask: 750 of the bench's 750 requests ask for a"):
        run.evaluate(cfg, Storage(cfg.root), Progress(terminal=False))
    assert not (tmp_path / "run" / "evaluation").exists()


@pytest.mark.parametrize(
    ("look", "said"),
    [
        ({"clip": "dino"}, "look.clip: .*/dino is a model of type 'vit', not a CLIP"),
        ({"dino": "clip"}, "look.dino: .*/clip is a model of type 'clip', not a DINO"),
        ({"dino": "dino", "segmenter": "clip"}, "look.segmenter: .*/clip is .* not a CLIPSeg"),
        ({"clip": "nothing"}, "look.clip: .*/nothing: no such folder"),
        ({"aesthetic": "clip/config.json", "aesthetic_clip": "clip"}, r"config.json: MD5 is \w+, "),
        ({"aesthetic": "nothing"}, "look.aesthetic: .*/nothing: no such file"),
    ],
)
def test_what_cannot_look_is_refused_before_anything_is_drawn(
    look: dict[str, str], said: str, tiny_models: Path, tmp_path: Path
) -> None:
    cfg = rivals.settings(
        tiny_models,
        root=str(tmp_path),
        methods=["text-only"],
        look=LookConfig(**{key: str(tiny_models / name) for key, name in look.items()}),
    )
    with pytest.raises(UserError, match=said) as caught:
        run.evaluate(cfg, Storage(cfg.root), Progress(terminal=False))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


def test_the_judge_of_another_world_is_refused_before_anything_is_drawn(
    tiny_models: Path, tmp_path: Path
) -> None:
    cfg = rivals.settings(
        tiny_models,
        root=str(tmp_path / "run"),
        bench=str(folders.write_break_a_scene(tmp_path / "scenes")),
        methods=["text-only"],
        look=LookConfig(dino="miniworld:dino", segmenter="miniworld:judge"),
    )
    with pytest.raises(UserError, match="the judge does not know 'creature'"):
        run.evaluate(cfg, Storage(cfg.root), Progress(terminal=False))
    assert not (tmp_path / "run").exists()
    cfg.bench = str(folders.write_dreambench(tmp_path / "dreams", folders.OWN_TEXT))
    plan(cfg).check()  # it has no masks, so that nobody will look for its subjects


def test_what_was_checked_goes_to_workers_without_its_models() -> None:
    asked = evaluation([Oracle("right")], look=LookConfig(clip="miniworld:clip"))
    before = len(pickle.dumps(asked.scorers))
    asked.check()
    assert len(pickle.dumps(asked.scorers)) == before < 20_000


def test_settings_and_their_help_name_the_methods_that_there_are() -> None:
    for name in presets():
        with contextlib.suppress(UserError):  # a preset of other jobs
            for said in load(EvaluateConfig, [], preset=name).methods:
                assert said.partition("@")[0] in METHODS, name
    told = inspect.getsource(evaluate_config)
    assert all(re.search(rf"\b{method}\b", told) for method in METHODS)


def test_a_method_that_learned_is_not_given_up_unasked(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    first, again = Oracle("word", steps=1), Oracle("word", steps=2)
    first.learns = again.learns = True
    made(evaluation([first]), storage)
    with pytest.raises(UserError, match=r"changed: steps \(was 1, now 2\).*--redo .*/word"):
        made(evaluation([again]), storage)
    assert again.calls == []
    made(evaluation([again], redo=["word"]), storage)
    assert sum(again.calls) == 10


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"methods": ["ssr-txt"]}, "did you mean ssr-text"),
        ({"methods": []}, "methods: none"),
        ({"methods": ["text-only", "text-only"]}, "text-only is there twice"),
        ({"methods": ["../x=text-only"]}, "cannot name a method"),
        ({"methods": ["text-only@x"]}, "takes no weights"),
        ({"methods": ["whole-image"]}, "trained without selection"),
        ({"methods": ["x=ssr-txt@runs/lr=3e-4/model"]}, "did you mean ssr-text"),
        ({"references": 0}, "references"),
        ({"device": "cuda"}, "device 'cuda' is not there"),
        ({"guidance_rescale": 3.0}, "guidance_rescale"),
        ({"look": LookConfig(clip="miniworld:no")}, "no such mini model"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    cfg = EvaluateConfig(root=str(tmp_path), **{"methods": ["text-only"], **settings})
    with pytest.raises(UserError, match=reason) as caught:
        plan(cfg)
    assert "\n" not in str(caught.value)
