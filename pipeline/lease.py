"""One run at a time on a root: the lease that a run holds, and how a dead run's is taken over.

The lease is a small file, `_run.json`, that its holder renews. What it promises: a second run is
refused while the first one lives; of two that start together on a store with conditional writes
(local folders, AWS, Ceph) exactly one goes on; on a store without, and where clocks are apart by
more than a minute, two may run for one renewal, and then one stops. Even those harm nothing: files
appear whole, markers last, and of two that make a unit the first to commit it counts.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pipeline.errors import UserError, before_the_end
from pipeline.progress import say
from pipeline.storage import Storage

PATH = "_run.json"
RENEW_S = 15.0
"""Seconds between two renewals."""
STALE_S = 90.0
"""A lease that was not renewed for so long, in seconds, is a dead run's."""

_SETTLE_S = 1.0
_SAME_S = 3.0  # the clock that a machine's start is told by is set now and then


@dataclass
class Lease:
    """Who runs: `machine` is where process ids mean the same, `born` the process's own start
    (seconds since the machine's), as they come again; times are UTC seconds."""

    token: str
    host: str
    machine: str
    pid: int
    born: float
    job: str
    started: str
    renewed: float

    @classmethod
    def mine(cls) -> Lease:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid, job = os.getpid(), os.environ.get("RAY_JOB_SUBMISSION_ID", "")
        token, host = uuid.uuid4().hex, socket.gethostname()
        return cls(token, host, _machine(), pid, _born(pid), job, now, time.time())

    def alive(self) -> bool:
        """Whether its run may be working still. On its own machine the process itself is asked."""
        if self.machine == _machine():
            with contextlib.suppress(psutil.Error):
                return abs(_born(self.pid) - self.born) < _SAME_S
            return False
        return time.time() - self.renewed < STALE_S


def _machine() -> str:
    """Host names come again (containers on the host's network, machines called "localhost"): this
    boot of this kernel, and its process ids as they are seen here.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _born(pid: int) -> float:
    """When a process started, since the machine did: its clock may be set meanwhile."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


@contextlib.contextmanager
def held(storage: Storage, renew_s: float = RENEW_S) -> Iterator[Lease]:
    """Hold the root's lease for the time of the block.

    Raises UserError where another run holds it, and at the end of the block where another run
    took it over meanwhile (this one was taken for dead): the block is interrupted then.
    """
    lease = _take(storage)
    keeper = _Keeper(storage, lease, renew_s)
    keeper.start()

    def give_back() -> None:
        keeper.stop()
        # a store that is out of reach keeps the lease: this process is gone soon, and known to be
        with contextlib.suppress(UserError):
            if _holds(storage, lease):
                storage.delete(PATH)

    with before_the_end(give_back):
        try:
            yield lease
        except KeyboardInterrupt:
            if keeper.lost:
                raise UserError(_taken(storage, keeper.lost)) from None
            raise


def _take(storage: Storage) -> Lease:
    mine = Lease.mine()
    for _ in range(3):
        other = _read(storage)
        if other is not None and other.token == mine.token:
            return mine  # it was created, and only the answer was lost
        if other is not None:
            if other.alive():
                raise UserError(_refusal(storage, other))
            say(f"taking over from the run of {other.started} on {other.host}, which died")
            storage.delete(PATH)
        if storage.create(PATH, _bytes(mine)):
            if other is not None or not storage.local:
                time.sleep(_SETTLE_S)  # neither taking over nor every store's creating is exclusive
            if _holds(storage, mine):
                return mine
    raise UserError(f"{storage.url()}: other runs start on this root at the same time; let one run")


def _holds(storage: Storage, lease: Lease) -> bool:
    there = _read(storage)
    return there is not None and there.token == lease.token


def _refusal(storage: Storage, other: Lease) -> str:
    job = f", job {other.job}" if other.job else ""
    return (
        f"{storage.url()} is in use by a run on {other.host} (process {other.pid}{job}, since "
        f"{other.started}); wait for it, stop it, or use another --root; a run that died is taken "
        f"over {STALE_S:.0f} s after its last sign of life"
    )


def _taken(storage: Storage, other: Lease) -> str:
    return (
        f"{storage.url()} was taken over by another run (on {other.host}, process {other.pid}), as "
        "this one gave no sign of life for too long; what is finished is kept, let that one go on"
    )


def _read(storage: Storage) -> Lease | None:
    if not storage.exists(PATH):
        return None
    try:
        return Lease(**storage.read_json(PATH))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # gone between the two questions
            return None
        raise
    except TypeError:
        raise UserError(f"{storage.url(PATH)} is not the lease of a run; delete it") from None


def _bytes(lease: Lease) -> bytes:
    return (json.dumps(asdict(lease), indent=1) + "\n").encode()


class _Keeper(threading.Thread):
    """Renews the lease; interrupts the main thread when it is another's."""

    def __init__(self, storage: Storage, lease: Lease, renew_s: float) -> None:
        super().__init__(name="lease", daemon=True)
        self.storage, self.lease, self.renew_s = storage, lease, renew_s
        self.lost: Lease | None = None
        self._end = threading.Event()

    def stop(self) -> None:
        self._end.set()
        self.join(timeout=5.0)

    def run(self) -> None:
        while not self._end.wait(self.renew_s):
            # a store that does not answer now is the run's trouble, not the lease's
            with contextlib.suppress(UserError):
                other = _read(self.storage)
                if other is not None and other.token != self.lease.token:
                    self.lost = other
                    _thread.interrupt_main()
                    return
                if not self._end.is_set():
                    self.lease.renewed = time.time()
                    self.storage.write_bytes(PATH, _bytes(self.lease))
