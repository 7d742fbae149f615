"""Where a job's processes listen."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

import psutil


class Listener(NamedTuple):
    """A socket that waits for anybody, and the process that it belongs to."""

    process: str
    address: str
    port: int

    @property
    def loopback(self) -> bool:
        address = ip_address(self.address)
        if isinstance(address, IPv6Address):  # ::ffff:127.0.0.1 is 127.0.0.1
            return address.is_loopback or bool(
                address.ipv4_mapped and address.ipv4_mapped.is_loopback
            )
        return address.is_loopback


class Watch:
    """Notes where all that is started with its `environment` listens, until the block ends."""

    def __init__(self, environment: dict[str, str]) -> None:
        mark = uuid.uuid4().hex
        self.environment = {**environment, "SSR_TEST": mark}
        self.environment.pop("RAY_ADDRESS", None)
        self.seen: set[Listener] = set()
        self._mark, self._end = f"SSR_TEST={mark}".encode(), threading.Event()
        self._ours: dict[int, str] = {}

    def __enter__(self) -> Watch:
        self._executor = ThreadPoolExecutor(1)
        self._watching = self._executor.submit(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._executor.shutdown()
        self._watching.result()

    def outside(self) -> list[Listener]:
        return [one for one in self.seen if not one.loopback]

    def has(self, word: str) -> bool:
        return any(word in one.process for one in self.seen)

    def _watch(self) -> None:
        while not self._end.wait(0.3):
            for one in psutil.net_connections("inet"):
                waits = one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
                if waits and one.laddr and not one.raddr and one.pid:
                    name = self._name(one.pid)
                    if name:
                        self.seen.add(Listener(name, one.laddr.ip, one.laddr.port))

    def _name(self, pid: int) -> str:
        """The process's name; "" for a stranger. Ours are known by their environment, or by their
        parent's: Ray's workers write their titles over theirs.
        """
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            marked = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
            if pid not in self._ours and (marked or self._name(process.ppid())):
                self._ours[pid] = " ".join(process.cmdline()).strip()
        return self._ours.get(pid, "")


def assert_no_dashboard(watch: Watch) -> None:
    """Ray's process of that name is there (it keeps the cluster's books), its web server is not:
    what of it listens is its own metrics.
    """
    assert 8265 not in [one.port for one in watch.seen if "dashboard/dashboard.py" in one.process]
