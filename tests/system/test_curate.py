"""jobs/curate.py, whole, on tiny random models and a small mini web."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline import lease
from pipeline.curation.seal import STAGES
from pipeline.shards import Manifest, open_shard, read_row_group
from pipeline.storage import Storage
from pipeline.units import Ledger
from tests.made import write_run
from tests.system.curating import REPOSITORY, Job, accounted, shards
from tests.system.listening import Watch, assert_no_dashboard

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]
SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def job(tiny_models: Path) -> Job:
    return Job(tiny_models)


@pytest.fixture(scope="module")
def watch(job: Job) -> Watch:
    return Watch(job.environment)


@pytest.fixture(scope="module")
def run(job: Job, watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole curation, watched, and what it said."""
    root = tmp_path_factory.mktemp("curated")
    with pytest.MonkeyPatch.context() as patch, watch:
        patch.setattr(job, "environment", watch.environment)
        code, said = job.run(str(root))
    assert code == 0, said
    return root, said


def files(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / folder).iterdir() if path.is_file())


def test_exactly_these_files_are_left_behind(run: tuple[Path, str]) -> None:
    root, _ = run
    units = json.loads((root / "units/_done/_all.json").read_text())["tally"]["extra"]["units"]
    parquet = sorted(f"{unit}.parquet" for unit in units)
    assert any(unit.startswith("train-") for unit in units)
    assert any(unit.startswith("test-") for unit in units)
    for stage in STAGES:
        extra = ["manifest.json"] if stage == "features" else []
        assert files(root, stage) == sorted([*parquet, *extra])
        marked = ["_all"] if stage == "units" else units
        assert files(root, f"{stage}/_done") == sorted(f"{unit}.json" for unit in marked)
    names = {path.name for path in root.iterdir()}
    assert names == {*STAGES, "web", "curation.json", "report.html"}
    assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]


def test_no_row_is_lost_on_the_way(run: tuple[Path, str]) -> None:
    root, _ = run
    stages = accounted(root)
    assert stages["units"]["rows_in"] == 300
    assert stages["units"]["dropped"] and stages["images"]["failed"]
    assert stages["features"]["kept"]
    assert stages["captions"]["failed"] == {} and stages["features"]["failed"] == {}


def test_the_shards_hold_what_the_manifest_says(run: tuple[Path, str]) -> None:
    storage = Storage(str(run[0]))
    manifest = Manifest.load(storage)
    assert manifest.depths == [2, 4, 6] and set(manifest.encoders) == {"vision", "vae", "text"}
    assert manifest.rows("train") > 0 and manifest.rows("test") > 0
    keys = set()
    for shard in manifest.shards:
        with open_shard(storage, shard["path"]) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert groups == shard["row_groups"]
            for index in range(len(groups)):
                rows = read_row_group(file, index)
                keys.update(rows["key"])
                for name, spec in manifest.tensors.items():
                    assert rows[name].shape[1:] == tuple(spec["shape"])
                    assert rows[name].dtype == np.dtype(spec["dtype"])
                assert all(rows["caption"]) and all(rows["subjects"])
    assert len(keys) == manifest.rows("train") + manifest.rows("test")


def test_it_says_what_it_wrote_and_what_comes_next(run: tuple[Path, str]) -> None:
    root, said = run
    assert f"features: {root}/features" in said and "filter:" in said
    assert f"next:     python jobs/train.py --root {root}" in said
    assert "Warning" not in said and "Traceback" not in said


def test_it_listens_on_loopback_only(run: tuple[Path, str], watch: Watch) -> None:
    assert watch.outside() == []
    for word in ("jobs/curate.py", "gcs_server", "raylet", "ray::", "miniworld.website"):
        assert watch.has(word), f"{word} was not seen to listen"
    assert_no_dashboard(watch)


def test_running_again_makes_nothing_again(run: tuple[Path, str], job: Job) -> None:
    root, _ = run
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    markers = {path: path.read_bytes() for path in root.rglob("_done/*.json")}
    manifest = (root / "features/manifest.json").read_bytes()
    code, said = job.run(str(root))
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")} == before
    assert {path: path.read_bytes() for path in root.rglob("_done/*.json")} == markers
    assert (root / "features/manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [("caption__prompt", "a photo of", "prompt"), ("filter__min_aesthetic", 6.5, "min_aesthetic")],
)
def test_a_changed_setting_is_refused_by_its_name(
    run: tuple[Path, str], job: Job, setting: str, value: Any, name: str
) -> None:
    code, said = job.run(str(run[0]), **{setting: value})
    assert code == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: ") and name in line and str(value) in line
    assert "Traceback" not in said


def test_kill_9_anywhere_then_the_same_bytes(
    run: tuple[Path, str], job: Job, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    storage, process = Storage(str(root)), job.start(str(root))
    while process.poll() is None and not Ledger(storage, "captions").done():
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    time.sleep(3.0)  # orphaned workers notice that their driver is gone
    assert not (root / "features/manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in root.glob("captions/_done/*.json")}
    code, said = job.run(str(root))
    assert code == 0, said
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert shards(storage) == shards(Storage(str(run[0])))


@pytest.mark.long
def test_a_retry_that_is_killed_goes_on_and_no_row_comes_twice(job: Job, tmp_path: Path) -> None:
    root, storage = tmp_path / "retried", Storage(str(tmp_path / "retried"))
    code, said = job.run(str(root), download__retries=0)  # who is busy once, fails
    assert code == 0, said
    before = shards(storage)
    process = job.start(str(root), retry_failed="true")
    while process.poll() is None and not storage.exists("units/_done/retry-1.json"):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    time.sleep(3.0)  # orphaned workers notice that their driver is gone
    code, said = job.run(str(root))
    assert code == 0, said
    after = shards(storage)
    assert before.items() < after.items()
    assert all("-r1-" in path for path in after.keys() - before.keys())
    keys = []
    for path in after:
        with open_shard(storage, path) as file:
            for index in range(file.num_row_groups):
                keys.extend(read_row_group(file, index)["key"])
    assert len(keys) == len(set(keys)) == sum(Manifest.load(storage).rows(s) for s in SPLITS)
    stages = json.loads((root / "curation.json").read_text())["stages"]
    assert stages["units"]["rows_in"] == 300
    assert stages["units"]["kept"] + stages["units"]["retried"] == stages["images"]["rows_in"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here (it takes root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing_that_is_done(
    run: tuple[Path, str], job: Job, small_disk: Path
) -> None:
    code, said = job.run(str(small_disk))
    assert code == 2, said
    assert "the disk is full; free space and run again" in said.strip().splitlines()[-1], said
    assert "Traceback" not in said
    done = {p: p.stat().st_mtime_ns for p in small_disk.rglob("_done/*.json")}
    assert len(done) > 1
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, said = job.run(str(small_disk))
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert shards(Storage(str(small_disk))) == shards(Storage(str(run[0])))


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(job: Job, tmp_path: Path) -> None:
    storage, process = Storage(str(tmp_path)), job.start(str(tmp_path))
    while process.poll() is None and not Ledger(storage, "images").done():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "same command goes on" in said.strip().splitlines()[-1]
    assert not storage.exists(lease.PATH)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("word", "seconds", "number", "code"),
    [
        ("metadata:", 0.0, signal.SIGINT, 130),
        ("filter:", 1.0, signal.SIGTERM, 143),
    ],
)
def test_a_stop_at_any_moment_is_one_line(
    job: Job, tmp_path: Path, word: str, seconds: float, number: int, code: int
) -> None:
    """While it filters, while the cluster comes up."""
    process = job.start(str(tmp_path))
    assert process.stdout is not None
    assert any(line.startswith(word) for line in process.stdout)
    time.sleep(seconds)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert said.endswith("stopped; the same command goes on from here\n"), said
    assert "Traceback" not in said
    deadline = time.monotonic() + 120
    while (left := children_of(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def children_of(root: str) -> list[str]:
    """Processes that were started for the run at `root`, and still are there."""
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if root in line]


def test_an_s3_root_holds_the_same_shards_and_nobody_tells_the_credentials(
    run: tuple[Path, str], job: Job, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "AKIANOTAREALKEYATALL", "AWS_SECRET_ACCESS_KEY": "hush/hu+sh"}
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    # a short path; what Ray leaves behind may still write into it as it goes
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as session:
        logs = {"RAY_TMPDIR": session}
        monkeypatch.setattr(job, "environment", {**job.environment, **aws, **secrets, **logs})
        code, said = job.run(f"{bucket}/run")
        assert code == 0, said
        left = dict[Path, bytes]()
        for folder, _, names in os.walk(session):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        left[path] = path.read_bytes()
    storage = Storage(f"{bucket}/run")
    assert shards(storage) == shards(Storage(str(run[0])))
    assert any("worker" in path.name for path in left), "the workers' logs were not looked at"
    left |= {Path(path): storage.read_bytes(path) for path in storage.list()}
    left[Path("stdout")] = said.encode()
    for secret in secrets.values():
        assert [str(path) for path, data in left.items() if secret.encode() in data] == []


def test_a_bucket_that_cannot_be_written_is_one_line(
    job: Job, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "environment", {**job.environment, **s3_server})
    for root, words in (
        ("s3://no-such-bucket/run", "no such bucket"),
        ("s3://key:hush@bucket/run", "s3://***@bucket/run: credentials do not belong"),
    ):
        code, said = job.run(root)
        assert code == 2, said
        assert words in said.strip().splitlines()[-1] and "hush" not in said, said
        assert "Traceback" not in said


def test_a_second_run_on_the_root_is_refused(run: tuple[Path, str], job: Job) -> None:
    with lease.held(Storage(str(run[0]))):
        code, said = job.run(str(run[0]))
    assert code == 2
    assert "is in use by a run on" in said.strip().splitlines()[-1], said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"redo": "pictures"}, ["pictures", "images"]),
        ({"models__captioner": "no/such/model/here"}, ["no/such/model/here"]),
        ({"website__enabled": "false"}, ["filter.inputs"]),
        ({"caption__promt": "x"}, ["caption.prompt"]),
        ({"preset": "laion"}, ["laion-sd15"]),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_2(
    job: Job, tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    code, said = job.run(str(tmp_path), **settings)
    assert code == 2, said
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_look_at_a_root_that_is_a_file_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    code, said = look(command, tmp_path / "file")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


def test_a_report_that_finds_no_room_is_one_line(small_disk: Path) -> None:
    write_run(small_disk, 3)
    subprocess.run(["fallocate", "-l", "580k", str(small_disk / "ballast")], check=False)
    with contextlib.suppress(OSError), (small_disk / "more").open("wb") as file:
        file.write(bytes(600_000))
    code, said = look("report", small_disk)
    assert code == 2 and said.count("\n") == 1, said
    assert "report.html: the disk is full; free space and run again" in said
    code, said = look("status", small_disk)
    assert code == 0 and "3/3" in said, "a full disk hinders no look"


def test_a_report_that_cannot_be_replaced_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    (tmp_path / "report.html").mkdir()
    code, said = look("report", tmp_path)
    assert code == 2 and said.startswith("error: cannot write ") and said.count("\n") == 1, said


def look(command: str, root: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "jobs/curate.py", command, "--root", str(root)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_root_that_cannot_be_written_is_one_line_and_exit_2(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = job.run(str(tmp_path / "file"))
    assert code == 2 and said.strip().splitlines()[-1].startswith("error: cannot write"), said
