"""A run as its markers tell it: fast, without Ray, torch or any data file."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.curation.status import status
from pipeline.errors import UserError
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from tests.made import START, write_run

REPOSITORY = Path(__file__).resolve().parents[3]


def columns(text: str, stage: str) -> dict[str, str]:
    lines = text.splitlines()
    titles = next(line for line in lines if line.startswith("stage "))
    row = next(line for line in lines if line.startswith(f"{stage} "))
    names = [name for name in titles.replace("rows in", "rows_in").split() if name]
    return dict(zip(names, row.replace(" ago", "").split(), strict=False))


def test_every_stage_is_counted(tmp_path: Path) -> None:
    write_run(tmp_path, 40, done=[30, 20, 10], every_s=10)
    now = START.timestamp() + 300
    said = status(Storage(tmp_path), now)
    images = columns(said, "images")
    assert images["units"] == "30/40" and images["rows_in"] == "3,000"
    assert images["kept"] == "1,950" and images["dropped"] == "150" and images["failed"] == "900"
    assert images["rows/s"] == "10" and images["ETA"] == "1:43" and images["last"] == "0:10"
    assert columns(said, "captions")["units"] == "20/40"
    assert "images failed: http_404 600, timeout 300 (transient)" in said
    assert "units dropped: low_aesthetic 4,000" in said
    assert "splits: test 260, train 390 rows" in said
    assert "not sealed; 10 of 40 units are through" in said
    assert "commits: 2026-01-01 00:00:00 UTC to 2026-01-01 00:04:50 UTC" in said


def test_a_run_that_stands_still_has_no_eta(tmp_path: Path) -> None:
    write_run(tmp_path, 40, done=[30, 20, 10])
    said = status(Storage(tmp_path), START.timestamp() + 86_400)
    assert columns(said, "images")["ETA"] == "?"


def test_a_sealed_run_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, 20)
    storage = Storage(tmp_path)
    assert "all units are through" in status(storage)
    storage.write_json(MANIFEST, {})
    said = status(storage, START.timestamp() + 300)
    assert said.startswith(f"{tmp_path}: sealed, 20 units")
    assert columns(said, "features")["ETA"] == "done"


def test_units_of_an_earlier_filter_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path, 40)
    write_run(tmp_path, 20)
    assert columns(status(Storage(tmp_path)), "images")["units"] == "20/20"


def test_an_empty_root_says_what_to_run(tmp_path: Path) -> None:
    root = tmp_path / "new"
    assert status(Storage(root)) == (
        f"{root}: no curation yet; begin it with python jobs/curate.py --root {root}"
    )
    assert not root.exists()


def test_a_root_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        status(Storage(tmp_path / "file"))


def test_before_the_filter_is_through(tmp_path: Path) -> None:
    write_run(tmp_path, 10)
    (tmp_path / "units/_done/_all.json").unlink()
    said = status(Storage(tmp_path))
    assert "there are no units yet" in said and columns(said, "images")["units"] == "10"


def test_while_the_filter_scans_its_parts_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path, 10)
    (tmp_path / "images").rename(tmp_path / "scan")
    for stage in ("units", "captions", "features"):
        shutil.rmtree(tmp_path / stage)
    said = status(Storage(tmp_path), START.timestamp() + 100)
    assert "the filter is at work or was stopped" in said
    assert columns(said, "scan")["units"] == "10" and columns(said, "images")["units"] == "0"
    assert "scan dropped: too_small 50" in said


def test_the_optional_stage_is_shown_where_it_is(tmp_path: Path) -> None:
    write_run(tmp_path, 10)
    assert "\nscores " not in status(Storage(tmp_path))
    shutil.copytree(tmp_path / "captions", tmp_path / "scores")
    assert "\nscores " not in status(Storage(tmp_path)), "left by a run that had it turned on"
    for path in (tmp_path / "captions/_done").iterdir():
        marker = json.loads(path.read_text())
        marker["settings"]["scores.enabled"] = True
        path.write_text(json.dumps(marker))
    said = status(Storage(tmp_path), START.timestamp() + 100)
    assert columns(said, "scores")["units"] == "10/10"
    names = [line.split()[0] for line in said.splitlines()[3:8]]
    assert names == ["units", "images", "scores", "captions", "features"]
    shutil.rmtree(tmp_path / "captions")
    assert "\nscores " in status(Storage(tmp_path)), "while nothing is captioned yet"


def test_on_s3(bucket: str, tmp_path: Path) -> None:
    write_run(tmp_path, 12)
    storage = Storage(f"{bucket}/run")
    storage.upload_tree(tmp_path, "")
    assert columns(status(storage), "features")["units"] == "12/12"


def test_the_command_needs_neither_ray_nor_torch_and_is_quick(tmp_path: Path) -> None:
    write_run(tmp_path, 40, done=[30, 20, 10])
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['jobs/curate.py', 'status', '--root', {str(tmp_path)!r}]\n"
        "try: runpy.run_path('jobs/curate.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'polars'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = time.process_time()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "30/40" in done.stdout and done.stderr == ""
    assert time.monotonic() - started < 60 and time.process_time() - before < 5
    assert not (tmp_path / "report.html").exists(), "it writes nothing"
