"""Which network addresses a fetch may talk to: public ones only, unless a host is exempt.

The address that was judged is the address that is connected to, so a name that resolves
differently the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pipeline.curation.fetching.answers import Answers
from pipeline.curation.fetching.failures import NO_NAME_YET_S, ForbiddenAddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# A cloud's agent on the host, at a public address (Azure); the others' are link-local.
_PLATFORM = {ipaddress.ip_address("168.63.129.16")}
_NAMES = 10_000  # kept by a worker
_LEFT_BEHIND = 4  # look-ups under way for each fetch under way, at most

Lookup = Callable[[str, int], list[str]]


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
    """Names -> vetted addresses; safe to use from threads.

    Addresses are kept for `ttl_s` seconds, failures for `failed_ttl_s`, so that a dead name costs
    one look-up in that time however many rows name it; that the name servers could not say is
    forgotten after a second. `exempt` are "host:port" pairs that may
    have any address. `lookup` is for tests.
    """

    def __init__(
        self,
        exempt: list[str],
        threads: int = 8,
        ttl_s: float = 60.0,
        failed_ttl_s: float = 60.0,
        lookup: Lookup = look_up,
    ) -> None:
        self.exempt = {entry.strip().lower() for entry in exempt}
        self.ttl_s, self.failed_ttl_s, self.lookup = ttl_s, failed_ttl_s, lookup
        # The system's resolver cannot be interrupted: it waits in a thread of its own. More of
        # them than fetches, since those that hang are left behind until the system gives up.
        self._pool = ThreadPoolExecutor(_LEFT_BEHIND * threads, thread_name_prefix="dns")
        self._answers: Answers[str, list[str] | OSError] = Answers(_NAMES, run=self._pool.submit)

    def __call__(self, host: str, port: int, timeout_s: float) -> list[str]:
        """Addresses that may be connected to, in order.

        Raises ForbiddenAddress, TimeoutError, or OSError where the name does not resolve.
        """
        addresses = self._answers(host, lambda: self._ask(host, port), timeout_s)
        if isinstance(addresses, OSError):
            raise type(addresses)(*addresses.args)  # a new one: tracebacks are not for sharing
        if f"{host}:{port}" in self.exempt or f"[{host}]:{port}" in self.exempt:
            return addresses
        allowed = [address for address in addresses if is_public(address)]
        if not allowed:
            raise ForbiddenAddress(f"{host} is {', '.join(addresses)}")
        return allowed

    def _ask(self, host: str, port: int) -> tuple[list[str] | OSError, float]:
        try:
            return self.lookup(host, port), self.ttl_s
        except OSError as error:
            passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            return error, NO_NAME_YET_S if passing else self.failed_ttl_s
