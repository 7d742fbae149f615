"""Training on the report: made of what lies in storage, whatever is absent, broken or hostile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import report
from pipeline.report_training import overview
from pipeline.storage import Storage
from tests.made import write_training


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    write_training(tmp_path)
    return tmp_path


def test_everything_is_told(trained: Path) -> None:
    told = overview(Storage(trained))
    (stage,) = told["stages"]
    assert stage["name"] == "semantic" and stage["steps"] == 400
    titles = [chart.partition('class="t">')[2].partition("<")[0] for chart in stage["charts"]]
    assert titles[:2] == ["Loss", "L_LDM"] and len(titles) == 9
    by_timestep, over_steps = stage["charts"][-2:]
    assert by_timestep.count("stroke=") == 3 and over_steps.count("stroke=") == 10
    steps = [int(grid["step"]) for grid in stage["grids"]]
    assert len(steps) == 8 and steps[0] == 400 and steps[-1] == 0, "evenly, the newest first"
    assert steps == sorted(steps, reverse=True)
    assert stage["told"] == [
        "2 attempts; 50 steps were taken twice",
        "1 steps were not a number, and not taken (nonfinite.jsonl)",
    ]
    assert [row[2:] for row in stage["attempts"]] == [
        ("0", "250", "2:00:00", "0.0347"),
        ("200", "400", "2:00:00", "0.0278"),
    ]
    assert told["cost"] == [
        ("GPU-hours", "32.00"),
        ("samples trained on", "57,600"),
        ("at 2.5 per GPU-hour", "80.00"),
    ]
    assert ("torch", "2.1, then 2.2") in told["versions"]
    assert ("train", "2,000 rows, 2 shards, 2.00 GiB") in told["data"]
    assert ("depths", "4, 24") in told["data"]


def test_what_an_enemy_wrote_does_no_harm(trained: Path) -> None:
    storage = Storage(trained)
    report.build(storage)
    page = (trained / "report.html").read_text()
    assert "&lt;img src=x" in page and "<img src=x" not in page
    assert "hunter2" not in page and "deadbeef" not in page
    assert "<script" not in page


@pytest.mark.parametrize("broken", ["[1]", "{}", "", "\udcff", '{"step": "x", "started": 3}'])
def test_any_file_may_be_broken(trained: Path, broken: str) -> None:
    data = broken.encode(errors="surrogateescape")
    for path in [*trained.glob("train/semantic/*.jsonl"), *trained.glob("train/semantic/*/*"),
                 trained / "features/manifest.json"]:  # fmt: skip
        kept = path.read_bytes()
        path.write_bytes(data)
        told = overview(Storage(trained))
        assert bool(told) == (path.name != "metrics.jsonl")
        report.build(Storage(trained))
        path.write_bytes(kept)


def test_records_alone_are_enough(trained: Path) -> None:
    for folder in ("samples", "attempts"):
        shutil.rmtree(trained / "train/semantic" / folder)
    (trained / "features/manifest.json").unlink()
    lines = [json.dumps({"step": step, "ldm": 1.0}) for step in (1, 2)]
    (trained / "train/semantic/metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "l']))
    told = overview(Storage(trained))
    (stage,) = told["stages"]
    assert len(stage["charts"]) == 1 and stage["steps"] == 2
    assert not told["cost"] and not told["data"] and not told["versions"] and not stage["grids"]
