"""Which addresses a fetch may talk to."""

from __future__ import annotations

import time

import pytest

from pipeline.curation.addresses import ForbiddenAddress, Resolver, is_public


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
        "2002:7f00:1::",
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


def test_names_are_looked_up_once_within_the_ttl() -> None:
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.215.14"]

    resolver = Resolver([], lookup=lookup)
    for _ in range(3):
        resolver("a.example", 80, 1.0)
    assert asked == ["a.example"]


def test_a_resolver_that_hangs_costs_only_the_time_given() -> None:
    def lookup(host: str, port: int) -> list[str]:
        time.sleep(0.5)
        return ["93.184.215.14"]

    with pytest.raises(TimeoutError):
        Resolver([], lookup=lookup)("slow.example", 80, 0.05)
