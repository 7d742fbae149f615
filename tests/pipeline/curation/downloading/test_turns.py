"""Rows in their order, but no host takes all the threads while others wait."""

from __future__ import annotations

import pytest

from pipeline.curation.downloading.turns import Turns


def urls(hosts: str) -> list[str | None]:
    return [f"http://{host}.example:80/{index}" for index, host in enumerate(hosts)]


def test_a_crowded_host_lets_others_pass_until_it_is_free() -> None:
    turns = Turns(urls("aaaabcab"), crowd=2)
    assert [turns.take() for _ in range(4)] == [0, 1, 4, 5]
    turns.done(1)
    assert [turns.take() for _ in range(2)] == [2, 7]
    # none is left but those of the crowded one: they wait for their turn in the fetch
    assert [turns.take() for _ in range(2)] == [3, 6]
    with pytest.raises(LookupError):
        turns.take()


def test_a_single_host_has_all_threads() -> None:
    turns = Turns(urls("a" * 9), crowd=2)
    assert [turns.take() for _ in range(9)] == list(range(9))


def test_without_a_crowd_the_order_stays() -> None:
    turns = Turns([*urls("abcabc"), None, "http://[::1/"], crowd=3)
    for index in range(8):
        assert turns.take() == index
        turns.done(index)


def test_every_row_is_taken_once() -> None:
    turns = Turns(urls("abacabadabacabae" * 50), crowd=2)
    taken: list[int] = []
    for step in range(800):
        taken.append(turns.take())
        if step % 3:
            turns.done(taken[-1])
    assert sorted(taken) == list(range(800))
