"""Which addresses a fetch may talk to."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pipeline.curation.fetching.addresses import ForbiddenAddress, Resolver, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "168.63.129.16",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "::ffff:a9fe:a9fe",
        "::127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:db8::1",
        "not an address",
    ],
)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_only_the_public_addresses_of_a_host_are_given() -> None:
    resolver = Resolver([], lookup=lambda host, port: ["10.0.0.1", "93.184.215.14"])
    assert resolver("mixed.example", 80, 1.0) == ["93.184.215.14"]


def test_a_host_with_inner_addresses_only_is_forbidden_unless_exempt() -> None:
    resolver = Resolver(["inner.example:8080"], lookup=lambda host, port: ["10.0.0.1"])
    assert resolver("inner.example", 8080, 1.0) == ["10.0.0.1"]
    with pytest.raises(ForbiddenAddress):
        resolver("inner.example", 80, 1.0)


@pytest.fixture()
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for the memory of answers."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pipeline.curation.fetching.answers.time", clock)
    return now


def test_names_are_looked_up_once_within_the_ttl(now: list[float]) -> None:
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.215.14"]

    resolver = Resolver([], ttl_s=5.0, lookup=lookup)
    for port in (80, 443, 8080):
        resolver("a.example", port, 30.0)
        now[0] += 2.0
    assert asked == ["a.example"]
    resolver("a.example", 80, 30.0)
    assert asked == ["a.example"] * 2


def test_a_failure_is_remembered_too_and_told_anew(now: list[float]) -> None:
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    resolver = Resolver([], failed_ttl_s=5.0, lookup=lookup)
    failures = []
    for _ in range(3):
        with pytest.raises(socket.gaierror) as caught:
            resolver("gone.example", 80, 30.0)
        failures.append(caught.value)
        now[0] += 2.0
    assert asked == ["gone.example"]
    assert {error.errno for error in failures} == {socket.EAI_NONAME}
    assert len({id(error) for error in failures}) == 3
    with pytest.raises(socket.gaierror):
        resolver("gone.example", 80, 30.0)
    assert asked == ["gone.example"] * 2


def test_threads_that_want_one_name_share_one_look_up() -> None:
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        time.sleep(0.3)
        return ["93.184.215.14"]

    resolver = Resolver([], lookup=lookup)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: resolver("a.example", 80, 30.0), range(16)))
    assert found == [["93.184.215.14"]] * 16
    assert asked == ["a.example"]


def test_a_resolver_that_hangs_costs_only_the_time_given() -> None:
    """What it says in the end is kept; nobody starts a second look-up meanwhile."""
    asked, leave = [], threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        leave.wait(30)
        return ["93.184.215.14"]

    resolver = Resolver([], lookup=lookup)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            resolver("slow.example", 80, 0.05)
    leave.set()
    assert resolver("slow.example", 80, 30.0) == ["93.184.215.14"]
    assert asked == ["slow.example"]


def test_names_that_hang_do_not_hold_the_others() -> None:
    leave = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        if host.startswith("hang"):
            leave.wait(60)
        return ["93.184.215.14"]

    resolver = Resolver([], threads=4, lookup=lookup)
    for number in range(8):
        with pytest.raises(TimeoutError):
            resolver(f"hang{number}.example", 80, 0.01)
    try:
        assert resolver("well.example", 80, 20.0) == ["93.184.215.14"]
    finally:
        leave.set()
