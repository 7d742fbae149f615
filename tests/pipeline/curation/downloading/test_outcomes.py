"""Every outcome is stored and counted; what does not belong to its marker is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.curation.downloading import outcomes
from pipeline.curation.downloading.outcomes import Outcome, host_of
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Marker, Tally

ENDED = [
    Outcome("ok", size=10, seconds=0.2, tries=1, side=600),
    Outcome("http_404", seconds=0.01, tries=1),
    Outcome("timeout", transient=True, seconds=3.0, tries=2),
    Outcome("opted_out", rule=True, size=0, seconds=0.3, tries=1),
    Outcome("deadline", transient=True),
]
URLS = ["http://A.b/1", "http://a.b:81/2", "http://a.b/3", "http://u:p@c.d/4", None]


def marker(digest: str) -> Marker:
    tally = Tally(5, 1, extra={"outcomes": digest})
    return Marker("train-00000", "images", "f", {}, tally, 0, "", 0.0, "")


def test_they_come_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    digest = outcomes.save(storage, "train-00000", list("vwxyz"), URLS, ENDED)
    table = outcomes.load(storage, marker(digest))
    assert table.schema.equals(outcomes.SCHEMA)
    assert table["key"].to_pylist() == list("vwxyz")
    assert table["url"].to_pylist() == URLS
    assert table["host"].to_pylist() == ["a.b", "a.b:81", "a.b", "c.d", ""]
    assert table["cause"].to_pylist() == ["ok", "http_404", "timeout", "opted_out", "deadline"]
    assert table["rule"].to_pylist() == [False, False, False, True, False]
    assert table["transient"].to_pylist() == [False, False, True, False, True]
    assert table["tries"].to_pylist() == [1, 1, 2, 1, 0]
    assert table["bytes"].to_pylist() == [10, 0, 0, 0, 0]


def test_those_of_another_attempt_are_not_believed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    digest = outcomes.save(storage, "train-00000", list("vwxyz"), URLS, ENDED)
    outcomes.save(storage, "train-00000", list("vwxyz"), URLS, ENDED[::-1])
    with pytest.raises(UserError, match="not what its unit's marker speaks of"):
        outcomes.load(storage, marker(digest))


def test_counts() -> None:
    tally = outcomes.tally(ENDED, URLS)
    tally.check()
    assert (tally.rows_in, tally.kept) == (5, 1)
    assert tally.dropped == {"opted_out": 1}
    assert tally.failed == {"deadline": 1, "http_404": 1, "timeout": 1}
    assert tally.extra["transient"] == {"deadline": 1, "timeout": 1}
    assert tally.extra["bytes"] == 10
    assert list(tally.extra["hosts"].items()) == [
        *(("a.b", [2, 1, 1]), ("", [1, 0, 1]), ("a.b:81", [1, 0, 1]), ("c.d", [1, 0, 0]))
    ]
    assert tally.extra["host_count"] == 4
    sizes, seconds = tally.extra["sizes"], tally.extra["seconds"]
    assert dict(zip(sizes["edges"][:-1], sizes["rows"], strict=True))[512] == 1
    assert sum(sizes["rows"]) == 1
    spread = dict(zip(seconds["edges"][:-1], seconds["rows"], strict=True))
    assert (spread[0.0], spread[0.1], spread[0.25], spread[2.0]) == (1, 1, 1, 1)
    assert sum(seconds["rows"]) == 4  # no request was made for the fifth


def test_twenty_hosts_and_the_number_of_all() -> None:
    urls: list[str | None] = [f"http://h{number}.x/" for number in range(50) for _ in range(2)]
    hosts = outcomes.tally([Outcome("ok")] * 100 + [Outcome("dns")], [*urls, "http://h7.x/b"])
    found = hosts.extra["hosts"]
    assert hosts.extra["host_count"] == 50 and len(found) == 20
    assert next(iter(found.items())) == ("h7.x", [3, 2, 1])


@pytest.mark.parametrize("url", ["http://[broken/x", "", None, "no url"])
def test_broken_urls_have_no_host(url: str | None) -> None:
    assert host_of(url) == ""
