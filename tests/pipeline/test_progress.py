"""Progress: plain lines in a log, bars on a terminal; libraries that keep quiet."""

import logging
import os
import time
import warnings

import pytest

from pipeline.progress import Progress, clock, quiet_libraries, say, without_stderr_lines


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(every_s=0, terminal=False) as progress:
        progress.task("images", 3, done=1)
        progress.advance("images", 1, rows=256, loss=0.123456)
        progress.advance("images", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images: 1 of 3 are there already"
    assert lines[1].startswith("images: 2/3 in 0:0")
    assert ", ETA " in lines[1] and "rows 256 loss 0.1235" in lines[1]
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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that progress sees; tests turn the clock."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_long_run_does_not_flood_its_log(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["units", "images", "captions", "features"]
    with Progress(terminal=False) as progress:
        for stage in stages:
            progress.task(stage, 5000)
        for _ in range(5000):  # ten hours
            now[0] += 7.2
            for stage in stages:
                progress.advance(stage)
            progress.tick()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 4 * 700, "about one a minute and stage"
    assert len(lines) > 4 * 500, "and not fewer"
    assert all(f"{stage}: 5000/5000 in 10:00:00, 0.139/s" in lines for stage in stages)


def test_the_eta_is_of_late_and_not_of_the_start(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(every_s=0, terminal=False) as progress:
        progress.task("images", 1000, done=500)
        now[0] += 600  # models load
        for _ in range(200):
            now[0] += 1
            progress.advance("images")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "images: 700/1000 in 13:20, ETA 5:00, 1/s (0.25/s in all)" in last


def test_a_wait_is_spoken_of_now_and_then(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(terminal=False) as progress:
        progress.task("images", 10)
        progress.task("captions", 10)
        now[0] += 6
        progress.advance("images")
        for _ in range(100):
            now[0] += 1
            progress.tick()
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 6
    assert "nothing new for 0:2" in lines[1] and not any("captions" in line for line in lines)


def test_news_between_two_lines_are_told_by_the_tick(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(terminal=False) as progress:
        progress.task("images", 10)
        now[0] += 1
        progress.advance("images")
        assert capsys.readouterr().out == ""
        now[0] += 5
        progress.tick()
    assert "images: 1/10 in 0:06" in capsys.readouterr().out


def test_bars_show_rate_eta_and_figures(now: list[float]) -> None:
    with Progress(terminal=True) as progress:
        progress.task("images", 10)
        now[0] += 2
        progress.advance("images", failed="http_404 3")
        assert progress._bars is not None
        assert progress._bars.tasks[0].fields["figures"] == "0.5/s, ETA 0:18  failed http_404 3"


def test_durations_as_people_write_them() -> None:
    assert [clock(s) for s in (7, 3723, 90_000)] == ["0:07", "1:02:03", "1d 1:00"]
