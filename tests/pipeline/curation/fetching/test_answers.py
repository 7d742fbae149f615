"""Answers that are kept: bounded, asked for once at a time, failures not kept."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from pipeline.curation.fetching.answers import Answers


def test_those_not_used_for_the_longest_time_go_first() -> None:
    answers: Answers[int, int] = Answers(3)
    asked: list[int] = []

    def get(key: int) -> int:
        return answers(key, lambda: (asked.append(key) or key, 60.0), 1.0)

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert get(key) == key
    assert asked == [1, 2, 3, 4, 2]


def test_weights_are_summed_and_those_replaced_or_dropped_taken_off() -> None:
    answers: Answers[str, str] = Answers(100, weigh=len)
    for number in range(50):
        answers(str(number % 20), lambda size=number: ("x" * (size % 37), 0.0), 1.0)
        assert answers._weight == sum(len(value) for _, value in answers._kept.values()) <= 100
    answers("huge", lambda: ("x" * 1000, 60.0), 1.0)
    assert answers._weight == 0 and not answers._kept


def test_a_failure_is_told_to_all_who_wait_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Semaphore(0)

    class Noted(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            waiting.release()
            return super().result(timeout)

    monkeypatch.setattr("pipeline.curation.fetching.answers.Future", Noted)
    answers: Answers[str, int] = Answers(3)
    asked: list[int] = []

    def fail() -> tuple[int, float]:
        asked.append(1)
        for _ in range(3):  # the others
            waiting.acquire(timeout=30)
        raise OSError("down")

    def get(_: int) -> str:
        with pytest.raises(OSError, match="down"):
            answers("a", fail, 60.0)
        return "told"

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(get, range(4))) == ["told"] * 4
    assert asked == [1]
    assert answers("a", lambda: (7, 60.0), 1.0) == 7
