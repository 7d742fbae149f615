"""jobs/plan.py as a person runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.config import PlanConfig, parse
from pipeline.planning import plan
from pipeline.planning.text import text
from tests.pipeline.planning.formulas import evaluate

ROOT = Path(__file__).parents[3]


def ran(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs/plan.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def test_a_plan_is_printed_and_nothing_is_left(tmp_path: Path) -> None:
    done = ran("--gpus", "32", "--codec=int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 h800 on 4 nodes" in done.stdout and "Fewest GPU hours: int8" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert list(tmp_path.iterdir()) == []


def test_every_figure_is_explained_and_written(tmp_path: Path) -> None:
    page = tmp_path / "plans" / "plan.md"
    done = ran("--explain", "true", "--out", str(page))
    assert done.returncode == 0, done.stderr
    formula = "8 GPUs × 989 TFLOP/s × 0.4 × 1,000 / 1,817.3 GFLOP"
    source = "the paper, section 4.1; the maker's data sheet; assumption; counted by"
    assert f"      = {formula}\n      [{source}" in done.stdout
    assert f"plan:     {page}" in done.stdout
    written = page.read_text()
    assert f"| {formula} |" in written and "## Layouts of the features" in written
    assert [path.name for path in page.parent.iterdir()] == ["plan.md"]
    data = tmp_path / "plan.json"
    assert ran("--out", str(data), "--get_price", "0.4").returncode == 0
    told = json.loads(data.read_text())
    lines = {(line["phase"], line["name"]): line for line in told["lines"]}
    whole = lines["in all", "cost"]
    assert evaluate(whole["formula"]) == pytest.approx(whole["value"], rel=1e-5)
    assert told["layouts"]["int8"]["GETs"] < told["layouts"]["float16"]["GETs"]
    uses = {use["name"]: use["use"] for use in told["phases"][-1]["resources"]}
    assert uses["GPUs"] == 1 and 0.4 < uses["network"] < 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "5"], "5 gpus must divide 64 lanes, and those the global_batch 128"),
        (["--calibrate", "nowhere-at-all"], "nothing was measured there"),
        (["--out", "plan.pdf"], "it must end in .md or .json"),
        (["--put-prise", "3"], "did you mean --put_price?"),
    ],
)
def test_refusals_are_one_line(words: list[str], said: str) -> None:
    refused = ran(*words)
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("page", ["docs/planning.md", "infra/README.md"])
def test_what_the_documentation_shows_is_what_is_printed(page: str) -> None:
    fenced = r"^```\n\$ python (jobs/plan.py .*?)^```$"
    blocks = re.findall(fenced, (ROOT / page).read_text(), re.M | re.S)
    for block in blocks:
        command, _, shown = block.replace("\\\n", "").partition("\n")
        words = shlex.split(command)[1:]
        if "--calibrate" not in words:  # of a root that is not here
            made = plan(parse(PlanConfig, words, "sd15-h800"))
            assert text(made, []).splitlines() == shown.splitlines()
    assert blocks


def test_help_documents_every_setting() -> None:
    shown = ran("--help").stdout
    assert "An assumption" in shown
    assert all(f"--{each.name} " in shown for each in fields(PlanConfig))
