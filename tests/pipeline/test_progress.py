"""Progress: plain lines in a log, bars on a terminal; libraries that keep quiet."""

import logging
import os
import warnings

import pytest

from pipeline.progress import Progress, quiet_libraries, say, without_stderr_lines


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(every_s=0, terminal=False) as progress:
        progress.task("images", 3, done=1)
        progress.advance("images", 1, rows=256, loss=0.123456)
        progress.advance("images", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images: 1 of 3 are there already"
    assert lines[1].startswith("images: 2/3 in 0:00, ETA ")
    assert "rows 256 loss 0.1235" in lines[1]
    assert lines[2].startswith("images: 3/3 in ")
    assert "ETA" not in lines[2]


def test_lines_are_rare_but_the_last_one_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(every_s=3600, terminal=False) as progress:
        progress.task("steps", 1000)
        for _ in range(1000):
            progress.advance("steps")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_bars_count_too() -> None:
    with Progress(terminal=True) as progress:
        progress.task("steps", 10, done=4)
        progress.advance("steps", 3, loss=0.5)
        assert progress._bars is not None
        assert progress._bars.tasks[0].completed == 7


def test_say_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("wrote [runs/mini]")
    assert capsys.readouterr().out == "wrote [runs/mini]\n"


def test_libraries_keep_quiet_and_errors_come_through() -> None:
    with warnings.catch_warnings():
        quiet_libraries()
        assert logging.getLogger("transformers").level == logging.ERROR
        assert os.environ["TOKENIZERS_PARALLELISM"]


def test_unwanted_lines_of_stderr_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with without_stderr_lines(b"noise"):
        os.write(2, b"some noise here\nsignal\n")
    os.write(2, b"after, noise passes\n")
    assert capfd.readouterr().err == "signal\nafter, noise passes\n"
