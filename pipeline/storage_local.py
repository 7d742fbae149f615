"""Files of a local folder: written under another name, and whole before they get their own."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from pipeline.errors import UserError
from pipeline.storage_faults import one_line

_MEMORY_PAGE = 4096
_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp$")


class LocalFile:
    """A file being written, which comes into being at `commit` and not before."""

    def __init__(self, path: str) -> None:
        self._target = Path(path)
        name = f".{self._target.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        self._temporary = self._target.with_name(name)
        with one_line("write", path):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self._target)
            self._file = self._temporary.open("wb")

    def write(self, data: Any) -> None:
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def commit(self) -> None:
        """The file appears, in place of the one that was there."""
        self._finish()
        with one_line("write", str(self._target)):
            os.replace(self._temporary, self._target)
            _sync_folder(self._target.parent)

    def commit_if_new(self) -> bool:
        """The file appears unless there is one already; whether there was none."""
        self._finish()
        try:
            with one_line("write", str(self._target)), contextlib.suppress(FileExistsError):
                os.link(self._temporary, self._target)
                _sync_folder(self._target.parent)
                return True
            return False
        finally:
            self.discard()

    def discard(self) -> None:
        # what a full disk refused is still in the buffer, and fails a second time here
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        with one_line("write", str(self._target)):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


class MappedFile:
    """Byte ranges of a published file as its pages in the system's cache: nothing is copied.

    A range stays valid as long as it is held, the file open or not.
    """

    def __init__(self, path: str) -> None:
        with one_line("open", path):
            self.size = Path(path).stat().st_size
            self._map: Any = pyarrow.memory_map(path, "r") if self.size else None
        self._lock = threading.Lock()

    def read(self, spans: list[tuple[int, int]]) -> list[np.ndarray]:
        """The bytes [start, end) of each span, uint8, in memory when it returns."""
        found = []
        for start, end in spans:
            with self._lock:
                self._map.seek(start)
                data = np.frombuffer(self._map.read_buffer(end - start), np.uint8)
            data[::_MEMORY_PAGE].max(initial=0)  # touched: whoever uses it waits for no disk
            found.append(data)
        return found


def check_readable(path: str) -> None:
    """Raise UserError for a pipe, which one would wait for without end, and for a device, which may
    have none; links are followed.
    """
    with contextlib.suppress(OSError):  # whoever opens it says what is wrong
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is a pipe or a device, not a file; take it away")


def unfinished(name: str) -> bool:
    """Whether a file of this name is one still being written, or what a killed writer left."""
    return _TEMPORARY.match(name) is not None


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _sweep(target: Path) -> None:
    """Remove what a killed process of this host left of an earlier attempt at `target`."""
    escaped = re.sub(r"([*?\[])", r"[\1]", target.name)
    for entry in target.parent.glob(f".{escaped}.{_host()}.*.tmp"):
        match = _TEMPORARY.match(entry.name)
        if match and not _alive(int(match["pid"])):
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
