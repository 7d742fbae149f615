"""One run at a time on a root: a live one is respected, a dead one's lease is taken over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.lease import PATH, STALE_S, Lease, held
from pipeline.storage import Storage

REPOSITORY = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pipeline.lease import held
from pipeline.errors import run
from pipeline.storage import Storage
def main():
    with held(Storage(sys.argv[1]), renew_s=0.2):
        print("held", flush=True)
        while True:
            time.sleep(0.05)
run(main)
"""


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@pytest.fixture
def holder(root: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write(storage: Storage, **changed: object) -> None:
    storage.write_json(PATH, {**vars(Lease.mine()), **changed})


def test_it_is_there_for_the_block_and_renewed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with held(storage, renew_s=0.1) as lease:
        first = storage.read_json(PATH)
        assert (first["pid"], first["token"]) == (os.getpid(), lease.token)
        until = time.monotonic() + 30
        while storage.read_json(PATH)["renewed"] == first["renewed"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert storage.read_json(PATH)["renewed"] > first["renewed"]
    assert storage.list() == []


def test_it_is_given_back_after_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), held(Storage(tmp_path)):
        raise ValueError("a bug")
    assert Storage(tmp_path).list() == []


def stopped(code: str, root: str, when: str, signals: int = 1) -> int:
    """SIGTERM, each as soon as the process of that `code` says `when`; its status."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", code, root], cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for _ in range(signals):
                assert process.stdout.readline() == f"{when}\n"
                process.send_signal(signal.SIGTERM)
            return process.wait(100)
        finally:
            process.kill()


@pytest.mark.parametrize(("signals", "unwinding_s"), [(1, 0.5), (2, 600)])
def test_it_is_given_back_by_a_stop_that_nothing_unwinds(
    root: str, signals: int, unwinding_s: float
) -> None:
    code = f"""
import sys, time
import pipeline.errors
from pipeline.lease import held
from pipeline.storage import Storage
pipeline.errors._UNWINDING_S, pipeline.errors._ACTING_S = {unwinding_s}, 60
def main():
    with held(Storage(sys.argv[1])):
        while True:
            try:
                print("held", flush=True)
                time.sleep(600)
            except BaseException:
                pass
pipeline.errors.run(main)
"""
    assert stopped(code, root, "held", signals) == 143
    assert Storage(root).list() == []


def test_a_stop_that_comes_as_it_is_given_back_does_not_keep_it(root: str) -> None:
    code = """
import sys, time
import pipeline.errors
from pipeline import lease
from pipeline.storage import Storage
holds = lease._holds
def slowly(*args):
    print("giving", flush=True)
    time.sleep(2)
    return holds(*args)
def main():
    with lease.held(Storage(sys.argv[1])):
        lease._holds = slowly
pipeline.errors.run(main)
"""
    assert stopped(code, root, "giving") == 143
    assert Storage(root).list() == []


def test_a_second_run_is_refused_in_one_line(root: str, holder: subprocess.Popen[str]) -> None:
    said = rf"in use by a run on .* \(process {holder.pid}"
    with pytest.raises(UserError, match=said) as caught, held(Storage(root)):
        pass
    assert "\n" not in str(caught.value) and root in str(caught.value)
    assert Storage(root).read_json(PATH)["pid"] == holder.pid


def test_a_killed_run_is_taken_over_at_once(
    root: str, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(Storage(root)):
        assert Storage(root).read_json(PATH)["pid"] == os.getpid()
    assert "taking over from the run of" in capsys.readouterr().out


def test_a_process_id_that_came_again_is_not_the_run(tmp_path: Path) -> None:
    write(Storage(tmp_path), born=-1e6)  # our own id, of a process born long ago
    with held(Storage(tmp_path)) as lease:
        assert Storage(tmp_path).read_json(PATH)["token"] == lease.token


@pytest.mark.parametrize(("age", "refused"), [(STALE_S - 30, True), (STALE_S + 30, False)])
def test_another_host_is_judged_by_its_renewals(tmp_path: Path, age: float, refused: bool) -> None:
    write(
        Storage(tmp_path),
        host="elsewhere",
        machine="m",
        renewed=time.time() - age,
        job="raysubmit_1",
    )
    if refused:
        said = r"on elsewhere .*job raysubmit_1"
        with pytest.raises(UserError, match=said), held(Storage(tmp_path)):
            pass
    else:
        with held(Storage(tmp_path)):
            pass


def test_a_host_of_the_same_name_is_another_machine(tmp_path: Path) -> None:
    """As containers on their host's network are: there is no such process here."""
    write(Storage(tmp_path), machine="another boot", pid=2**22 + 1)
    with pytest.raises(UserError, match="is in use by a run"), held(Storage(tmp_path)):
        pass


def test_a_run_that_was_taken_for_dead_stops(root: str, holder: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while holder.poll() is None and time.monotonic() < until:
        # again, as a renewal that was under way comes after it
        write(Storage(root), host="elsewhere", machine="m")
        time.sleep(0.5)
    _, said = holder.communicate(timeout=60)
    assert holder.returncode == 2
    assert "was taken over by another run (on elsewhere" in said and "Traceback" not in said
    assert Storage(root).read_json(PATH)["host"] == "elsewhere"  # and it is left to that one


def test_of_many_that_start_together_one_goes_on(root: str) -> None:
    code = HOLDER.replace("while True:", "for _ in range(40):")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, root],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env=environment,
            text=True,
        )
        for _ in range(4)
    ]
    said = [run.communicate(timeout=200) for run in runs]
    assert sorted(run.returncode for run in runs)[0] == 0
    held_at_all = [out for out, _ in said if "held" in out]
    ended_well = [run for run in runs if run.returncode == 0]
    assert len(held_at_all) == len(ended_well)  # who got it kept it
    assert all("error: " in err for run, (_, err) in zip(runs, said, strict=True) if run.returncode)


def test_a_foreign_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / PATH).write_text(json.dumps({"no": "lease"}))
    said = "is not the lease of a run; delete it"
    with pytest.raises(UserError, match=said), held(Storage(tmp_path)):
        pass


def test_an_answer_that_was_lost_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Storage.create
    said = iter([False])  # the lease was written, and the client met it when it tried again

    def lost(self: Storage, path: str, data: bytes) -> bool:
        made = create(self, path, data)
        return next(said, made)

    monkeypatch.setattr(Storage, "create", lost)
    with held(Storage(tmp_path)) as lease:
        assert Storage(tmp_path).read_json(PATH)["token"] == lease.token
