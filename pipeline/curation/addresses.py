"""Which network addresses a fetch may talk to: public ones only, unless a host is exempt.

The address that was judged is the address that is connected to, so a name that resolves
differently the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# A cloud's agent on the host, at a public address (Azure); the others' are link-local.
_PLATFORM = {ipaddress.ip_address("168.63.129.16")}

Lookup = Callable[[str, int], list[str]]


class ForbiddenAddress(Exception):
    """The host has only addresses that a fetch must not talk to."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's, also inside an IPv6 wrapping."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip not in _PLATFORM


def look_up(host: str, port: int) -> list[str]:
    """Addresses of a host, in the system's order. Raises OSError (socket.gaierror)."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """Names -> vetted addresses, cached for `ttl_s` seconds; safe to use from threads.

    `exempt` are "host:port" pairs that may have any address. `lookup` is for tests.
    """

    def __init__(
        self, exempt: list[str], threads: int = 8, ttl_s: float = 60.0, lookup: Lookup = look_up
    ) -> None:
        self.exempt = {entry.strip().lower() for entry in exempt}
        self.ttl_s, self.lookup = ttl_s, lookup
        self._cache: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._lock = threading.Lock()
        # The system's resolver cannot be interrupted: it waits in a thread of its own.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    def __call__(self, host: str, port: int, timeout_s: float) -> list[str]:
        """Addresses that may be connected to, in order.

        Raises ForbiddenAddress, TimeoutError, or OSError where the name does not resolve.
        """
        addresses = self._resolve(host, port, timeout_s)
        if f"{host}:{port}" in self.exempt or f"[{host}]:{port}" in self.exempt:
            return addresses
        allowed = [address for address in addresses if is_public(address)]
        if not allowed:
            raise ForbiddenAddress(f"{host} is {', '.join(addresses)}")
        return allowed

    def _resolve(self, host: str, port: int, timeout_s: float) -> list[str]:
        now = time.monotonic()
        with self._lock:
            kept = self._cache.get((host, port))
            if kept is not None and kept[0] > now:
                return kept[1]
        try:
            addresses = self._pool.submit(self.lookup, host, port).result(
                timeout=max(timeout_s, 0.01)
            )
        except FutureTimeout:
            raise TimeoutError(f"{host} did not resolve in time") from None
        with self._lock:
            if len(self._cache) > 10_000:
                self._cache.clear()
            self._cache[(host, port)] = (now + self.ttl_s, addresses)
        return addresses
