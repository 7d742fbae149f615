"""Evaluation on the report: from files that evaluating leaves, whatever is absent or hostile."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import page, report
from pipeline.config import AblationConfig, CompareConfig, EvaluateConfig, LookConfig
from pipeline.evaluation import ablation_tables, run
from pipeline.evaluation.arms import Trial
from pipeline.evaluation.benches import MiniBench
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.evaluation import Evaluation, scorers_of
from pipeline.evaluation.publish import Published, publish
from pipeline.evaluation.results import Measure
from pipeline.progress import Progress
from pipeline.report_evaluation import headline, leaders, overview
from pipeline.report_figures import Figure
from pipeline.storage import Storage
from tests.pipeline.evaluation.test_run import Oracle

EVIL = "<img src=x onerror=\"document.title='owned'\">\u202e"
NUMBERS = ["NaN", "Infinity", "1" + "0" * 400, "1e300", '"0.5"', "[1]", "null", "true", "{}"]


def published(cfg: EvaluateConfig, methods: list[Any], storage: Storage, **bench: Any) -> Published:
    """Drawn, scored and published. bench: what it has in place of the mini bench's attributes."""
    of = MiniBench(3, 32)
    for name, value in bench.items():
        setattr(of, name, value)
    asked = Evaluation(cfg, of, methods, scorers_of(cfg, of))
    for method in methods:
        run.make(asked, method, storage, Progress(terminal=False))
    return publish(asked, storage)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benches: `mini` of an ablation, `photos` of methods, with the paper's figures and a
    comparison.
    """
    root = tmp_path_factory.mktemp("evaluated")
    storage, drawing = Storage(root), {"unit_pictures": 6, "resamples": 100, "root": str(root)}
    cfg = EvaluateConfig(**drawing, ablation=AblationConfig(seeds=2, steps=80))
    trials = [Trial(arm, seed) for arm in ("full", "no-multi-scale", "no-reg") for seed in (0, 1)]
    drawn = [Oracle(t.name, int(t.arm == "no-multi-scale")) for t in trials]
    ablation_tables.write(cfg, trials, published(cfg, drawn, storage), storage)
    right = Oracle("right", method="ssr-text", model="https://user:hunter2@host/x?token=deadbeef")
    wrong = Oracle("wrong", 1)
    wrong.native = False
    cfg = EvaluateConfig(**drawing, look=LookConfig(clip="miniworld:clip"))
    published(cfg, [right, wrong], storage, name="photos", published=True, title="Some photos")
    compare(CompareConfig(str(root), bench="photos", methods=["wrong:right"], resamples=100))
    return root


@pytest.fixture
def root(evaluated: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(evaluated / "evaluation", tmp_path / "evaluation")
    yield tmp_path


def built(root: Path) -> str:
    report.build(Storage(root))
    return (root / "report.html").read_text()


def edit(root: Path, path: str, **changes: Any) -> dict[str, Any]:
    file = root / "evaluation" / path
    told = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(told))
    return told


def cells(table: dict[str, Any], line: int) -> dict[str, Any]:
    return dict(zip(table["head"][1:], table["lines"][line]["cells"], strict=True))


def test_a_bench_is_told(root: Path) -> None:
    _, photos = overview(Storage(root))
    assert photos["title"] == "Some photos" and not photos["trials"] and photos["few"] == 3
    assert photos["told"] == [
        "3 references, 6 pictures of each method", "intervals by 100 resamples of references",
    ]  # fmt: skip
    (table,) = photos["tables"]
    assert table["title"] == "Metrics" and table["head"][1] == "CLIP-T\u00a0↑"
    right, wrong = cells(table, 0)["CLIP-T\u00a0↑"], cells(table, 1)["CLIP-T\u00a0↑"]
    told = json.loads((root / "evaluation/photos/scores.json").read_text())
    of = told["methods"]["right"]["means"]["clip_t"]
    assert right["mean"] == f"{of['mean']:.3f}"
    assert right["small"] == f"[{of['low']:.3f}, {of['high']:.3f}]"
    assert right["best"] == (of["low"] > told["methods"]["wrong"]["means"]["clip_t"]["high"])
    assert not wrong["best"]
    assert [line.get("tag") for line in table["lines"][:2]] == ["", "pictures from a folder"]
    assert table["looked"][0].startswith("miniworld:clip (") and "CLIP-T" in table["looked"][0]
    assert [bool(sheet["image"]) for sheet in photos["sheets"]] == [True, True]
    assert [chart.count("<circle") for chart in photos["charts"]] == [2, 2, 2]
    assert headline([photos]) == [("Right: CLIP-T", right["mean"])]


def test_the_papers_lines_are_marked_and_only_there(root: Path) -> None:
    _, photos = overview(Storage(root))
    paper = [line for line in photos["tables"][0]["lines"] if line.get("paper")]
    assert len(paper) == 8 and paper[-1]["title"] == "SSR-Encoder"
    assert all(line["tag"] == "the paper’s" for line in paper)
    assert not any(cell.get("best") for line in paper for cell in line["cells"])
    assert built(root).count('<tr class="paper">') == 8
    edit(root, "photos/scores.json", paper={})
    assert "the paper’s</span>" not in built(root)


def test_an_ablation_is_told(root: Path) -> None:
    mini, _ = overview(Storage(root))
    told = mini["ablation"]
    assert mini["trials"] and told["seeds"] == 2 and told["steps"] == "80"
    (arms,) = told["arms"]
    assert [line["title"] for line in arms["lines"]] == [
        "Full", "Without multi-scale", "Without L_reg",
    ]  # fmt: skip
    assert cells(arms, 0)["all three\u00a0↑"] == {"mean": "1.00", "small": "± 0.00"}
    (differences,) = told["differences"]
    other, same = (cells(differences, n)["all three\u00a0↑"] for n in (0, 1))
    assert other == {"mean": "+1.00", "word": "full is better", "kind": "better"}
    assert same == {"mean": "+0.00", "word": "undecided", "kind": "undecided"}
    assert "L_reg raises exclusivity: undecided in 3 of 3 measures" in told["claims"]["sentences"]
    seen = {line["title"]: line["cells"] for line in told["claims"]["table"]["lines"]}
    assert seen["multi-scale raises subject detail"][1]["mean"] in ("seen", "undecided")
    assert [chart.count("<circle") for chart in mini["charts"]] == [3, 2]  # of wrong ones no colour
    assert headline([mini]) == [("SSR (Full): all three right", "100 %")]
    page_of = built(root)
    assert "its figures are not the paper’s" in page_of and "Every training by itself" in page_of


def test_what_is_seen_and_what_is_not_is_counted(root: Path) -> None:
    file = "mini/ablation.json"
    claims = edit(root, file)["claims"]
    claims[0]["seen"] = {
        "distance_target": "seen", "texture": "the opposite is seen", "selected": "seen",
        "nearer": "invented",
    }  # fmt: skip
    edit(root, file, claims=claims)
    mini, _ = overview(Storage(root))
    first = mini["ablation"]["claims"]["sentences"][0]
    assert first == (
        "multi-scale raises subject detail: seen in 2 of 3 measures, the opposite is seen in 1"
    )


def test_a_comparison_is_told(root: Path) -> None:
    _, photos = overview(Storage(root))
    (told,) = photos["comparisons"]
    (pair,) = told["pairs"]
    assert pair["title"] == "A: wrong, B: right" and told["few"] == 3 and told["verdicts"] == 3
    assert told["a"].endswith("/evaluation/photos/scores.parquet")
    better = [line["cells"][0]["kind"] for line in pair["table"]["lines"]].count("better")
    assert pair["summary"].startswith(f"B is better in {better} of 3 measures")
    assert "Compared: is B better than A?" in built(root)


def test_only_what_the_intervals_tell_apart_is_marked() -> None:
    def marked(better: Any, **means: Figure) -> set[str]:
        methods = [SimpleNamespace(name=n, means={"m": of}) for n, of in means.items()]
        return leaders(Measure("m", "m", better), [*methods, SimpleNamespace(name="x", means={})])

    low, middle, high = Figure(1, 0.5, 1.5), Figure(2, 1.4, 2.6), Figure(3, 2.5, 3.5)
    assert marked("higher", a=low, b=high) == {"b"}
    assert marked("lower", a=low, b=high) == {"a"}
    assert marked("higher", a=low, b=middle, c=high) == {"b", "c"}
    assert marked("higher", a=low, b=middle) == set(), "nothing is told apart"
    assert marked("higher", a=low, b=Figure(3)) == set(), "without an interval nothing is"
    assert marked("higher", a=high) == set() and marked("higher") == set()


def test_too_large_sheets_are_named_only(root: Path) -> None:
    (root / "evaluation/photos/grid.png").write_bytes(b"\x89PNG" + bytes(page.MOST_BYTES))
    (root / "evaluation/photos/extremes.png").write_bytes(b"<svg onload=alert(1)>")
    found = built(root)
    for name in ("grid", "extremes"):
        assert f"it lies at <code><bdi>evaluation/photos/{name}.png</bdi></code>" in found
    assert "onload" not in found and found.count("data:image/png") == 2


def test_what_an_enemy_wrote_does_no_harm(root: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{key}": poisoned(of) for key, of in value.items()} | {EVIL: EVIL}
        if isinstance(value, list):
            return [poisoned(of) for of in value] + [EVIL]
        keep = ("higher", "lower", "seen", "undecided", "better", "worse", "full", "right", "wrong")
        known = not isinstance(value, str) or value in keep or value.isidentifier()
        return value if known else f"{EVIL}{value} https://user:hunter2@host/"

    for file in (root / "evaluation").rglob("*.json"):
        if file.parent.name != "_done":
            file.write_text(json.dumps(poisoned(json.loads(file.read_text()))))
    (root / "evaluation" / "<b>x").mkdir()
    (root / "evaluation" / "<b>x" / "scores.json").write_text("{}")
    found = built(root)
    assert found.count("&lt;img src=x") > 20 and "<img src=x" not in found
    assert "\u202e" not in found and "‹U+202E›" in found and "<b>x" not in found
    assert "hunter2" not in found and "deadbeef" not in found
    assert "Some photos" in found and "full is better" in found and "Compared" in found


FILES = (
    "mini/scores.json", "mini/ablation.json", "photos/scores.json", "photos/grid.png", "comparison",
)  # fmt: skip


@pytest.mark.parametrize("broken", ["", "[1]", "{}", '{"methods": ', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("path", FILES)
def test_any_file_may_be_broken(root: Path, path: str, broken: str) -> None:
    (file,) = (root / "evaluation").rglob("comparison.json") if path == FILES[-1] else [
        root / "evaluation" / path
    ]  # fmt: skip
    file.write_bytes(broken.encode(errors="surrogateescape"))
    found = built(root)
    marks = {
        "mini/scores.json": "evaluation/<bdi>mini</bdi> has no finished scores",
        "mini/ablation.json": "What each part is worth",
        "photos/scores.json": "evaluation/<bdi>photos</bdi> has no finished scores",
        "photos/grid.png": "evaluation/photos/grid.png",
        "comparison": "is B better than A?",
    }
    for part, mark in marks.items():
        is_told = part not in ("mini/ablation.json", "comparison")
        assert (mark in found) == ((part == path) == is_told), part


@pytest.mark.parametrize("value", NUMBERS)
def test_any_figure_may_be_none(root: Path, value: str) -> None:
    def spoilt(told: Any) -> Any:
        if isinstance(told, dict):
            sound = ("digits", "settings")
            return {key: of if key in sound else spoilt(of) for key, of in told.items()}
        if isinstance(told, list):
            return [spoilt(of) for of in told]
        return "@" if type(told) in (int, float) else told

    for file in [*(root / "evaluation").glob("*/*.json"),
                 *(root / "evaluation").rglob("comparison.json")]:  # fmt: skip
        text = json.dumps(spoilt(json.loads(file.read_text())))
        file.write_text(text.replace('"@"', value))
    found = re.sub('data:[^"]+', "", built(root))
    assert not re.search(r"\b(nan|inf|infinity)\b", found, re.IGNORECASE) and "0" * 30 not in found
    assert found.count("has no finished scores") == 2 and "What each part is worth" not in found
    for bench in overview(Storage(root)):
        assert not bench["tables"] and not bench["charts"] and not bench["headline"]


@pytest.mark.parametrize("depth", [200, 900, 980])
def test_deep_settings_cost_only_themselves(root: Path, depth: int) -> None:
    deep: Any = "@"
    told = edit(root, "photos/scores.json")
    told["methods"]["right"]["settings"] = told["bench"]["settings"] = deep
    nested = '{"a": ' * depth + "1" + "}" * depth
    text = json.dumps(told).replace('"@"', nested)
    (root / "evaluation/photos/scores.json").write_text(text)
    arms = edit(root, "mini/ablation.json")
    arms["arms"]["full"]["train"] = deep
    (root / "evaluation/mini/ablation.json").write_text(json.dumps(arms).replace('"@"', nested))
    found = built(root)
    assert "3 held-out mini scenes" in found and "is B better than A?" in found
    if depth == 200:  # JSON of others may be refused
        assert "Some photos" in found and "What each part is worth" in found


def test_an_unfinished_bench_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("evaluation/<i>mini/pictures/ssr-text/000000-000004.parquet", b"x")
    found = built(tmp_path)
    assert "evaluation/<bdi>&lt;i&gt;mini</bdi> has no finished scores" in found
    assert overview(Storage(tmp_path / "nothing")) == []
