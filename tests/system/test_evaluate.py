"""jobs/evaluate.py as a user runs it: over Ray, killed and gone on with, an ablation, refusals. On
tiny random models: nothing is learned here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.storage import Storage
from tests.sealed import write_features

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


def command(tiny_models: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "jobs" / "evaluate.py"),
        *("--models.base", str(tiny_models / "sd"), "--models.vision", str(tiny_models / "clip")),
        *("--references", "2", "--steps", "2", "--resamples", "200", "--device", "cpu"),
        *arguments,
    ]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run(arguments: Sequence[str], code: int = 0) -> str:
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=600, env=environment(), cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lose_power(arguments: Sequence[str], log: Path, reached: Callable[[], bool]) -> None:
    """Run until something is reached, then kill -9 the job and all that it started."""
    with log.open("w") as file:
        job = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment(), cwd=ROOT)
    deadline = time.monotonic() + 500
    while not reached():
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    processes = [job, *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert job.wait(60) == -signal.SIGKILL


def scores(root: Path, name: str = "mini") -> list[dict]:
    return pq.read_table(root / f"evaluation/{name}/scores.parquet").to_pylist()


@pytest.fixture(scope="module")
def data(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_features(root, tiny_models)
    return root


def test_an_ablation_is_killed_and_goes_on(tiny_models: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "ablation"
    asked = command(
        tiny_models,
        *("--preset", "mini-ablation", "--root", str(root), "--ablation.data", str(data)),
        *("--ablation.steps", "8", "--ablation.seeds", "2"),
        *("--ablation.arms", "text-only", "full", "no-reg"),
    )

    def made() -> list[Path]:
        over = root.glob("arms/*/train/done.json")  # before it, a model is written again
        models = [path.parents[1] / "model/model.safetensors" for path in over]
        return [*models, *root.glob("evaluation/mini-ablation/*/*/_done/*.json")]

    trained = root / "arms/full-s0/train/done.json"
    lose_power(asked, tmp_path / "log", lambda: trained.exists())
    before = {path: path.stat().st_mtime_ns for path in made()}
    printed = run(asked)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is made twice"
    assert "Traceback" not in printed

    arms = json.loads((root / "evaluation/mini-ablation/ablation.json").read_text())
    assert list(arms["arms"]) == ["text-only", "full", "no-reg"]
    assert all(arm["means"]["selected"]["seeds"] == 2 for arm in arms["arms"].values())
    assert {claim["worse"] for claim in arms["claims"]} == {"no-reg"}
    rows = scores(root, "mini-ablation")
    assert len(rows) == 3 * 2 * 4 and {row["method"] for row in rows} >= {"full-s0", "full-s1"}
    seeds = {
        row["method"]: {r["seed"] for r in rows if r["method"] == row["method"]} for row in rows
    }
    assert seeds["full-s0"] == seeds["no-reg-s0"] != seeds["full-s1"], "noise is a seed's own"
    settings = Storage(root).read_json("arms/no-reg-s1/train/multi_scale/settings.json")
    assert settings["tau"] == 0 and settings["seed"] == 1 and settings["multi_scale.steps"] == 5
    assert "| Without L\\_reg | " in printed and "mini world" in printed

    page = (root / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 1
    before = {path: path.stat().st_mtime_ns for path in made()}
    run(asked)
    assert {path: path.stat().st_mtime_ns for path in made()} == before


def test_over_ray_and_killed_as_in_one_process(tiny_models: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    methods = ("text-only", "reference-only")
    asked = ("--methods", *methods, "--unit_pictures", "2")
    run(command(tiny_models, "--root", str(one), *asked))
    workers = ("--drawing.max_workers", "2", "--scoring.max_workers", "1")
    over_ray = command(tiny_models, "--root", str(many), *asked, *workers)

    def done(stage: str) -> dict[Path, int]:
        found = many.glob(f"evaluation/mini/{stage}/*/_done/*.json")
        return {path: path.stat().st_mtime_ns for path in found}

    lose_power(over_ray, tmp_path / "log", lambda: bool(done("pictures")))
    before = done("pictures") | done("scores")
    assert len(before) < 8
    printed = run(over_ray)
    assert before.items() <= (done("pictures") | done("scores")).items(), "nothing is made twice"
    assert scores(one) == scores(many) and len(scores(one)) == 8
    assert "evaluation/mini/pictures/reference-only" in printed, "progress is shown"
    made = sorted((path.parts[-3], path.name) for path in done("scores"))
    units = ("000000-000002.json", "000002-000004.json")
    assert made == [(method, unit) for method in sorted(methods) for unit in units]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ablation.arms", "fulll"), "did you mean full?"),
        (
            ("--ablation.arms", "full", "--ablation.data", "/nowhere"),
            "python jobs/curate.py --root",
        ),
        (("--ablation.arms", "int8", "--ablation.data_int8", "/no"), "--features.codec int8"),
        (("--methods", "ssr-text"), "run jobs/train.py first"),
        (("--methods", "ssr-txt"), "did you mean ssr-text?"),
        (("--methods", "text-only", "--look.clip", "{models}/dino"), "not a CLIP of both towers"),
        (("--methods", "text-only", "--images_from", "x={models}"), "has no pictures"),
        (("--bench", "/nowhere"), "/nowhere"),
        (("compare", "--other", "/nowhere"), "comes first"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...], said: str, tiny_models: Path, tmp_path: Path
) -> None:
    told = [argument.format(models=tiny_models) for argument in arguments]
    printed = run(command(tiny_models, "--root", str(tmp_path), *told), code=2)
    assert printed.count("\n") == 1 and printed.startswith("error: ") and said in printed
    assert not list(tmp_path.rglob("*.parquet"))
