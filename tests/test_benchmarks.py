"""The benchmarks run; what they measure is not judged here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import planning
from tests.untrained import save_encoder, tiny_parts

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]


def test_attention() -> None:
    command = [sys.executable, "benchmarks/attention.py", "--size", "small", "--rounds", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:]] == [
        "plain",
        "SSR, 1 subject",
        "SSR, 3 subjects",
        "SSR, 1 subject in a region",
        "IP-Adapter, 462 tokens",
        "IP-Adapter, 1,386 tokens",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[2:])


@pytest.mark.timeout(1300)
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["--rounds", "1"],
            ["polars alone", "ours, the scan", "ours, the stage", "Ray Data, filter(expr)"],
        ),
        pytest.param(
            ["--memory", "--bound", "0"], ["50,000", "100,000", "200,000"], marks=pytest.mark.long
        ),
    ],
)
def test_filter(words: list[str], names: list[str]) -> None:
    small = ["--rows", "200000", "--files", "4", "--passing", "0.01"]
    command = [sys.executable, "benchmarks/filter.py", *small, *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "][2:]
    assert [row[0].strip() for row in rows] == names
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


def test_features() -> None:
    """End to end against the bare loop, and reading; Ray Data's cluster is left to a real run."""
    small = ["--size", "small", "--rows", "8", "--rounds", "1", "--passes", "1"]
    lines = []
    for what in (["extract", "--image-size", "32"], ["read", "--only", "webdataset|mosaicml"]):
        command = [sys.executable, "benchmarks/features.py", *what, *small]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        lines += [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "]
        left_out = "mosaicml-streaming is left out" in ran.stderr
    names = [cells[0].strip() for cells in lines if cells[1].strip(" -:")]
    read = ["pyarrow, raw", "shards", "webdataset", "mosaicml-streaming"]
    read = [name for name in read if not (left_out and name.startswith("mosaicml"))]
    assert [name for name in names if not name.startswith("shards, ")] == [
        "features of one unit", "bare loop", "stage features",
        "all scales", *read, "one scale", *read,
    ]  # fmt: skip
    rates = [cells[-1].strip() for cells in lines if cells[0].strip() in read]
    assert all(float(rate.replace(",", "")) > 0 for rate in rates)


def test_scales() -> None:
    command = [sys.executable, "benchmarks/scales.py", "--train", "60", "--test", "20"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and "LOAD REPORT" not in ran.stderr, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:]] == ["2", "4", "6 (last)", "all"]
    assert all(0 <= float(row[3]) <= 1 for row in rows[2:])


@pytest.mark.long
def test_download() -> None:
    sizes = {"images": 12, "pool": 4, "largest": 0.5, "rounds": 1, "threads": 4, "side": 256}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "benchmarks/download.py", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    tables = [part for part in ran.stdout.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 2
    for table in tables:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        assert [row[0] for row in rows[2:]] == [
            "img2dataset.download()",
            "ours",
            "ours, decode full",
        ]
    alive = [line.split("|") for line in tables[0].splitlines()[2:]]
    assert [int(row[2]) for row in alive] == [12, 12, 12]
    assert all(float(row[4]) > 0 for row in alive)
    # decoded in full, our images are img2dataset's own, byte by byte
    assert "| ours, decode full | 361.2 (361.2) |" in tables[1]


@pytest.mark.long
def test_train_step() -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "][2:]
    assert [row[0].strip() for row in rows] == [
        "the step alone, batches ready",
        "the loop through Ray Train",
        "the step alone, layout pixels (CLIP in it)",
        "encoders online",
        "as the released trainer works",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)


@pytest.mark.long
def test_startup() -> None:
    command = [sys.executable, "benchmarks/startup.py", "--rounds", "0"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "][2:]
    assert len(rows) == 10 and rows[-1][0].strip() == "first step"
    reached = [float(row[2]) for row in rows]
    assert reached == sorted(reached) and reached[-1] > 0


def test_train_gpu() -> None:
    """Its path on the CPU; on a machine without CUDA it measures nothing, and says so."""
    few = ["--batches", "2", "--steps", "1", "--rounds", "1", "--compile", "no"]
    command = [sys.executable, "benchmarks/train_gpu.py", "--device", "cpu", "--size", "tiny", *few]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "][2:]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [
        ["precomputed", "2"],
        ["online", "2"],
    ]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
    if not torch.cuda.is_available():
        ran = subprocess.run(command[:2], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 1 and ran.stdout == ""
        assert ran.stderr.splitlines()[-1].startswith("no CUDA device is here: nothing was run")


def test_train_gpu_counts_as_the_plan_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train_gpu = importlib.import_module("train_gpu")
    size = train_gpu.SIZES["sd15"]
    one, online = (train_gpu.gflop(size, size.depths[-1:], kind) for kind in (False, True))
    assert one == pytest.approx(planning.step_gflop("float16", 1), rel=0.01)
    assert online - one == pytest.approx(planning.VAE + planning.CLIP, rel=0.01)
    case = train_gpu.Case(train_gpu.PRECOMPUTED, True, 16)
    line = train_gpu.row(case, rate=200.0, peak=30.04, each=2000.0, most=1000.0)
    assert line == "| precomputed, compiled | 16 | 200.0 | 400 | 40.0% | 30.0 |"
    names = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L40S": 362}
    assert {name: train_gpu.peak_tflops(name) for name in names} == names
    assert train_gpu.peak_tflops("a strange one") is None


def test_lanes() -> None:
    few = ["--size", "small", "--rows", "32", "--shards", "2", "--rounds", "1", "--passes", "1"]
    command = [sys.executable, "benchmarks/lanes.py", "--only", "lanes|pyarrow", *few]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "]
    names = [row[0].strip() for row in rows if row[1].strip()[0].isdigit()]
    assert names == ["pyarrow, raw", "lanes"] * 2
    assert ran.stdout.count("Seek to step 1,000,000") == 2


def test_scale_units() -> None:
    """Ray Data's part is left to a real run."""
    small = ["--units", "3000", "9000", "--shards", "20", "--row-groups", "7", "--markers", "20"]
    command = [sys.executable, "benchmarks/scale_units.py", "--only", "driver", "manifest", "s3"]
    ran = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line[:2] == "| "]
    rows = [[cell.strip() for cell in row] for row in rows if row[0].strip()[0].isdigit()]
    assert [row[0] for row in rows] == ["3,000", "9,000", "40,000", "20"]
    few, many, sealed, _ = rows
    asked = [int(row[6]) for row in (few, many)]  # 200 markers a stage, and a few pages
    assert all(600 < requests < 620 for requests in asked), "a look grows with the run"
    assert sealed[1:3] == ["20", "140"]
    assert all(float(cell.replace(",", "")) >= 0 for row in rows for cell in row)


def test_serve(tiny_models: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_encoder(model, tiny_parts(tiny_models))
    where = ["--base", str(tiny_models / "sd"), "--vision", str(tiny_models / "clip")]
    small = ["--clients", "2", "--pictures", "1", "--steps", "1", "--rounds", "1", "--batch", "2"]
    command = [sys.executable, "benchmarks/serve.py", "--model", str(model), *where, *small]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:]] == ["batches of up to 2", "one at a time"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:2])
