"""The pace of late: over a window, not over a run's whole life."""

import time

import pytest

from pipeline.pace import Pace, Stall, lately


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_slow_start_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    pace = Pace(seconds=60)
    now[0] += 600  # models load
    for _ in range(120):
        now[0] += 1
        pace.add(10)
    assert pace.rate() == pytest.approx(10, rel=0.05)
    assert pace.total == 1200


def test_a_stall_slows_it_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    pace = Pace(seconds=60)
    for _ in range(120):
        now[0] += 1
        pace.add(10)
    now[0] += 540
    assert pace.rate() == pytest.approx(1, rel=0.1)


def test_rare_additions_are_still_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    pace = Pace(seconds=10, least=5)
    for _ in range(20):
        now[0] += 300
        pace.add(3)
    assert pace.rate() == pytest.approx(0.01)


def test_thousands_of_additions_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    pace = Pace(seconds=100)
    for _ in range(10_000):
        now[0] += 0.001
        pace.add(1)
    assert len(pace._seen) < 50
    assert pace.rate() == pytest.approx(1000, rel=0.01)


def test_the_last_commits_make_the_pace() -> None:
    slow = [(float(100 * n), 50) for n in range(10)]
    fast = [(1000.0 + 10 * n, 50) for n in range(64)]
    units, rows = lately([*slow, *fast], now=fast[-1][0]) or (0, 0)
    assert units == pytest.approx(0.1) and rows == pytest.approx(5)


def test_a_night_between_two_runs_is_no_slow_unit() -> None:
    before = [(10.0 * n, 50) for n in range(20)]
    after = [(50_000 + 10.0 * n, 50) for n in range(5)]
    assert (lately([*before, *after], now=50_040) or (0, 0))[0] == pytest.approx(0.1)


def test_nothing_is_said_without_commits_or_long_after_them() -> None:
    commits = [(10.0 * n, 50) for n in range(20)]
    assert lately([], 0) is None and lately(commits[:1], 5) is None
    assert lately([(5.0, 1), (5.0, 1)], 5) is None  # one second tells no pace
    assert lately(commits, now=190 + 500) is not None
    assert lately(commits, now=190 + 5000) is None


def test_a_stall_is_counted_only_beside_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    stall = Stall()
    assert stall.seconds(at=0) == 0
    now[0] += 100
    assert stall.seconds(at=0) == 100
    assert stall.seconds(at=1) == 0, "it moved"
    now[0] += 50
    assert stall.seconds(at=1, idle=True) == 0, "there was nothing to do"
    now[0] += 5
    assert stall.seconds(at=1) == 5, "since there is something again"
