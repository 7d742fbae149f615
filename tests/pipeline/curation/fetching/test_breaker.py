"""Dead hosts are given up, the living are not, and neither waits for the other."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.config import DownloadConfig
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.breaker import Breaker
from pipeline.curation.fetching.connections import Connection, connect
from pipeline.curation.fetching.deadline import Deadline
from pipeline.curation.fetching.fetch import Fetcher, FetchError
from pipeline.curation.fetching.targets import Target
from tests.hostile import Site, fetcher, raw, says, silence
from tests.ports import free_port


@pytest.fixture()
def site() -> Iterator[Site]:
    site = Site({"/a": says(200, b"x"), "/gone": says(404), "/silent": silence})
    yield site
    site.close()


class Ahead:
    """The breaker's clock: `seconds` ahead of the others'."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.seconds


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    clock = Ahead()
    monkeypatch.setattr("pipeline.curation.fetching.breaker.time", clock)
    return clock


def end(fetch: Fetcher, url: str) -> tuple[str, bool]:
    try:
        fetch(url)
    except FetchError as error:
        return error.cause, error.transient
    return "ok", False


def test_a_dead_host_is_asked_a_few_times_whatever_its_rows(site: Site) -> None:
    for path in range(50):
        site.answers[f"/{path}"] = raw()  # hangs up
    fetch = fetcher(site, retries=1)
    ends = [end(fetch, site.url(f"/{path}")) for path in range(50)]
    assert ends == [("connection", True)] * 50
    assert site.seen == ["/0", "/0", "/1", "/1", "/2"]


def test_a_host_that_hangs_costs_a_few_time_outs_whatever_its_rows(site: Site) -> None:
    fetch = fetcher(site, timeout_s=1.0, connect_timeout_s=1.0, per_host=2)
    for path in range(50):
        site.answers[f"/{path}"] = silence
    with ThreadPoolExecutor(16) as threads:
        urls = [site.url(f"/{path}") for path in range(50)]
        ends = list(threads.map(lambda url: end(fetch, url), urls))
    assert ends == [("timeout", True)] * 50
    assert len(site.seen) <= 4


def test_a_host_that_hangs_is_given_up_by_its_robots_txt(site: Site) -> None:
    fetch = fetcher(site, timeout_s=0.8, connect_timeout_s=0.8, robots_txt=True, retries=0)
    site.answers["/robots.txt"] = silence
    ends = [end(fetch, site.url(f"/{path}")) for path in range(20)]
    assert ends == [("timeout", True)] * 20
    assert site.seen == ["/robots.txt"] * 3


def test_a_url_that_hangs_is_not_held_against_a_host_that_answers(site: Site) -> None:
    """Eight of them at a time, while others of the same host come."""
    fetch = fetcher(site, timeout_s=3.0, connect_timeout_s=3.0, per_host=16)
    for path in range(8):
        site.answers[f"/{path}"] = silence
    with ThreadPoolExecutor(9) as threads:
        hanging = [threads.submit(end, fetch, site.url(f"/{path}")) for path in range(8)]
        until = time.monotonic() + 60
        while len(site.seen) < 8:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert end(fetch, site.url("/gone")) == ("http_404", False)
        assert [one.result() for one in hanging] == [("timeout", True)] * 8
    assert end(fetch, site.url("/a")) == ("ok", False)


def test_rows_of_a_dead_host_take_no_turns(site: Site) -> None:
    for path in range(50):
        site.answers[f"/{path}"] = raw()
    fetch = fetcher(site, per_host_rate=1.0)
    began = time.monotonic()
    assert {end(fetch, site.url(f"/{path}")) for path in range(50)} == {("connection", True)}
    assert time.monotonic() - began < 25


def test_one_url_tried_often_does_not_kill_its_host(site: Site) -> None:
    site.answers["/reset"] = raw()
    fetch = fetcher(site, retries=5)
    assert end(fetch, site.url("/reset")) == ("connection", True)
    assert site.seen == ["/reset"] * 6
    assert end(fetch, site.url("/a")) == ("ok", False)


def test_the_unit_s_deadline_is_no_fault_of_the_host(site: Site) -> None:
    fetch = fetcher(site)
    for path in range(5):
        site.answers[f"/{path}"] = silence
        with pytest.raises(FetchError, match="deadline"):
            fetch(site.url(f"/{path}"), until=time.monotonic() + 0.1)
    assert end(fetch, site.url("/a")) == ("ok", False)


def test_a_host_that_is_back_is_found_out_by_one_request(clock: Ahead) -> None:
    port = free_port()
    name = f"127.0.0.1:{port}"
    fetch = Fetcher(DownloadConfig(retries=0, allow_private_hosts=[name]))
    fetch.breaker = Breaker(rest_s=100.0)
    for path in range(3):
        assert end(fetch, f"http://{name}/{path}") == ("connection", True)
    site = Site({"/a": says(200, b"x")}, port)
    assert end(fetch, f"http://{name}/a") == ("connection", True)  # given up
    assert site.accepted == 0
    clock.seconds = 101.0
    assert [end(fetch, f"http://{name}/a") for _ in range(3)] == [("ok", False)] * 3
    site.close()


def test_the_rest_grows_and_one_at_a_time_is_let_through(clock: Ahead) -> None:
    breaker = Breaker(rest_s=100.0)
    for url in "abc":
        breaker.check("o")
        breaker.failed("o", url, "timeout", clock.monotonic())
    for rest in (100.0, 200.0, 400.0):
        with pytest.raises(FetchError) as caught:
            breaker.check("o")
        error = caught.value
        assert (error.cause, error.transient, error.soon) == ("timeout", True, False)
        assert error.wait_s is not None and rest / 2 < error.wait_s <= rest
        clock.seconds += error.wait_s
        breaker.check("o")
        began = clock.monotonic()
        with pytest.raises(FetchError):
            breaker.check("o")  # the others wait for what the first finds
        breaker.failed("o", "a", "timeout", began)
    breaker.answered("o")
    breaker.check("o")


def test_a_fifth_of_the_hosts_dead_does_not_hold_the_rest(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rows of 20 hosts, 4 of them with a port that swallows what is sent: the unit takes
    a few connection time-outs, not one for every dead row.
    """
    asked: list[str] = []

    def noted(addresses: list[str], target: Target, clock: Deadline) -> Connection:
        asked.append(target.host)
        return connect(addresses, target, clock)

    monkeypatch.setattr("pipeline.curation.fetching.fetch.connect", noted)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # a full backlog drops further SYNs, as a dead host does
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        dead = [f"dead{number}.example:{port}" for number in range(4)]
        live = [f"live{number}.example:{site.port}" for number in range(16)]
        resolver = Resolver(dead + live, lookup=lambda host, port: ["127.0.0.1"])
        cfg = DownloadConfig(
            threads=16, per_host=3, timeout_s=30.0, connect_timeout_s=1.5, retries=2
        )
        fetch = Fetcher(cfg, resolver)
        urls = [f"http://{host}/a?{row}" for row in range(10) for host in dead + live]
        site.answers.update({f"/a?{row}": says(200, b"x") for row in range(10)})
        with ThreadPoolExecutor(16) as threads:
            ends = list(threads.map(lambda url: end(fetch, url), urls))
        for filler in fillers:
            filler.close()
    wanted = [("timeout", True) if "dead" in url else ("ok", False) for url in urls]
    assert ends == wanted
    # of 40 dead rows: two of each host, and the three that are under way as it is given up
    assert sum("dead" in host for host in asked) <= 4 * (2 + 3)
    assert site.accepted <= 100  # of 160
