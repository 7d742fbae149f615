"""Ports for servers that are told where to listen."""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST = 20_000
"""Ray gives those below to its workers."""
HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """`count` neighbouring ports of 127.0.0.1 on which nobody listens.

    Where there is room below it, none is of the range out of which the kernel serves whoever asks
    for any port: between the look and the server's start a client of a test beside would take it.
    """
    end = int(HANDED_OUT.read_text().split()[0]) if HANDED_OUT.is_file() else 32_768
    while True:
        start = random.SystemRandom().randrange(FIRST, max(end, FIRST + 1_000) - count)
        ports = list(range(start, start + count))
        if all(is_free(port) for port in ports):
            return ports


def free_port() -> int:
    return free_ports(1)[0]


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
