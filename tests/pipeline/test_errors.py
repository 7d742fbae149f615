"""The one line behind an exception, however deep a library has wrapped it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.errors import UserError, run, user_message

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`run` takes the signals of its process; here that is pytest's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    errors._stop.armed = False
    for number, handler in before.items():
        signal.signal(number, handler)


class Wrapped(Exception):
    """As Ray's RayTaskError and TrainingFailedError hold what a worker raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a traceback\nof many lines")
        self.cause = cause


def test_a_user_error_is_found_in_the_chain() -> None:
    assert user_message(UserError("mend\nthis")) == "mend this"
    assert user_message(Wrapped(UserError("mend this"))) == "mend this"
    outer = Wrapped(ValueError())
    outer.worker_failures = {0: Wrapped(UserError("mend that"))}  # type: ignore[attr-defined]
    assert user_message(outer) == "mend that"
    assert user_message(ValueError("a bug")) is None


def test_run_ends_the_process_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise UserError("the port is taken; choose another")

    with pytest.raises(SystemExit) as ended:
        run(job)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the port is taken; choose another\n"


def test_run_lets_a_bug_through() -> None:
    def job() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(job)
    run(lambda: None)


def job(body: str) -> subprocess.Popen[str]:
    """A process that runs `body` as a job's main, and is ready for signals."""
    code = (
        "import time, sys\nfrom pipeline.errors import run\n"
        f"def main():\n    print('ready', flush=True)\n    {body}\nrun(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


LINE = "stopped; the same command goes on from here\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_is_one_line_that_says_how_to_go_on(number: int, code: int) -> None:
    process = job("time.sleep(60)")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, LINE)


def test_a_second_ctrl_c_does_not_wait_for_what_unwinds() -> None:
    process = job("""
    try:
        print('inside', flush=True)
        time.sleep(60)
    finally:
        print('unwinding', flush=True)
        time.sleep(60)
""")
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "unwinding\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, LINE)


def stopped_inside(with_acts: str = "") -> tuple[int, str, str]:
    """SIGTERM within what swallows it, as libraries do: status, stdout, stderr."""
    process = job(f"""
    import contextlib, pipeline.errors
    pipeline.errors._UNWINDING_S = pipeline.errors._ACTING_S = 0.5
    with contextlib.ExitStack() as stack:
        for act in [{with_acts}]:
            stack.enter_context(pipeline.errors.before_the_end(act))
        while True:
            try:
                print('inside', flush=True)
                time.sleep(60)
            except BaseException: pass
""")
    try:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, said


def test_a_stop_that_a_library_swallows_ends_the_process_all_the_same() -> None:
    code, _, said = stopped_inside()
    assert (code, said) == (143, LINE)


@pytest.mark.parametrize("acting", ["time.sleep(60)", "1 / 0"])
def test_what_comes_before_the_end_does_not_keep_it_off(acting: str) -> None:
    code, out, said = stopped_inside(f"lambda: print('once', flush=True), lambda: {acting}")
    assert (code, said) == (143, LINE)
    assert ("once" in out) == ("sleep" not in acting)


def test_after_ray_has_taken_sigterm_it_is_the_jobs_again() -> None:
    process = job("""
    import signal, pipeline.errors
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipeline.errors.take_signals()
    print('again', flush=True)
    time.sleep(60)
""")
    assert process.stdout is not None and process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == LINE and process.returncode == 143


def test_outside_of_a_job_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    errors.take_signals()
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_exits_keep_their_code() -> None:
    process = job("sys.exit(7)")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 7


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    """The name of a foreign file or column may hold anything."""
    line = user_message(UserError("cannot read \x1b]0;owned\x07\x1b[2J a\u202eb\nand more"))
    assert line == r"cannot read \x1b]0;owned\x07\x1b[2J a\u202eb and more"
    assert user_message(UserError("ein Fuß: 猫 é ± …")) == "ein Fuß: 猫 é ± …"
