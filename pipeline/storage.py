"""The one seam to local paths and object stores: everything else is given a `Storage`.

A path is local (`runs/mini`), or whatever fsspec knows by its scheme (`s3://`, `gs://`).
Two promises hold on all of them: a file appears whole or not at all, and a failure is one line.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from pipeline.errors import UserError
from pipeline.storage_faults import one_line, public

# Newer AWS clients send trailing checksums that older S3-compatible stores refuse (HTTP 411).
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

_COPY_BYTES, _COPIED_AT_ONCE = 16 << 20, 8
_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp$")


class Sink:
    """A binary file being published: counts and hashes what goes through it.

    `bytes` is the number of bytes written so far, `sha256` the hex digest of them. Closing is the
    publisher's business: `close()` here only flushes, so that writers which close their file may.
    """

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url, self._hash = file, url, hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        with one_line("write", self._url):
            self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        with one_line("write", self._url):
            self._file.flush()

    def close(self) -> None:
        pass

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class Storage:
    """Files under one root, a local folder or a prefix of an object store. Picklable, cheap.

    Every path argument is relative to the root, with forward slashes. Failures of the store end in
    a UserError of one line, which never holds credentials.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _normal(str(root))
        if marks := sorted(set(self.root) & set("*?[")):
            raise UserError(
                f"{public(self.root)} holds {marks[0]!r}, which file systems take for a pattern; "
                "choose another folder"
            )

    def __repr__(self) -> str:
        return f"Storage({public(self.root)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    @classmethod
    def for_path(cls, url: str | Path) -> tuple[Storage, str]:
        """The storage of a file's folder, and the file's name in it."""
        folder, _, name = _normal(str(url)).rpartition("/")
        return cls(folder or "/"), name

    @property
    def local(self) -> bool:
        return "://" not in self.root

    def url(self, path: str = "") -> str:
        """Where `path` lies, as a person would write it: a local path or a URL."""
        return f"{self.root.rstrip('/')}/{_relative(path)}" if path else self.root

    def sub(self, path: str) -> Storage:
        return Storage(self.url(path))

    # --- reading ---

    def exists(self, path: str = "") -> bool:
        with one_line("look for", self.url(path)):
            return bool(self._fs.exists(self._key(path)))

    def is_file(self, path: str = "") -> bool:
        with one_line("look for", self.url(path)):
            return bool(self._fs.isfile(self._key(path)))

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Paths of all files under the folder `prefix`, sorted, recursive; [] if there is none.

        Files still being published are not listed.
        """
        base = self._key("")
        with one_line("list", self.url(prefix)):
            found = self._fs.find(self._key(prefix))
        names = (os.path.relpath(name, base) if self.local else name[len(base) :] for name in found)
        relative = (name.lstrip("/") for name in names)
        return sorted(name for name in relative if not _TEMPORARY.match(name.rpartition("/")[2]))

    def read_bytes(self, path: str) -> bytes:
        with one_line("read", self.url(path)):
            data: bytes = self._fs.cat_file(self._key(path))
        return data

    def read_many(self, paths: builtins.list[str]) -> dict[str, bytes]:
        """Contents of many small files, fetched side by side."""
        keys = {self._key(path): path for path in paths}
        if not keys:
            return {}
        with one_line("read", self.url(paths[0])):
            found = self._fs.cat(list(keys))
        # fsspec gives bare bytes for a single path on some file systems
        data = found if isinstance(found, dict) else {next(iter(keys)): found}
        return {keys[_normal(key)] if self.local else keys[key]: data[key] for key in data}

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise UserError(
                f"{self.url(path)} is not JSON ({error}); delete it and run again"
            ) from None

    def open_input(self, path: str, mapped: bool = False) -> pyarrow.NativeFile:
        """Random access for pyarrow; on object stores each read is one ranged request.

        `mapped` maps a local file into memory: for files that are published, and so never change.
        """
        with one_line("open", self.url(path)):
            if self.local and mapped:
                return pyarrow.memory_map(self._key(path), "r")
            if self.local:
                return pyarrow.OSFile(self._key(path), "rb")
            return PyFileSystem(FSSpecHandler(self._fs)).open_input_file(self._key(path))

    @contextlib.contextmanager
    def local_copy(
        self, path: str, spans: builtins.list[tuple[int, int]] | None = None
    ) -> Iterator[Path]:
        """A file as a local one for the time of the block: itself where it is local, else a copy.

        `spans` are the byte ranges [start, end) that are needed, none = all; the rest of the copy
        is a hole, which takes no room on the disk.
        """
        if self.local:
            yield Path(self._key(path))
            return
        size = self.size(path)
        with tempfile.NamedTemporaryFile(prefix="copy-") as file, one_line("read", self.url(path)):
            file.truncate(size)
            pieces = [
                (start, min(start + _COPY_BYTES, stop))
                for begin, stop in spans or [(0, size)]
                for start in range(begin, stop, _COPY_BYTES)
            ]
            for at in range(0, len(pieces), _COPIED_AT_ONCE):
                some = pieces[at : at + _COPIED_AT_ONCE]
                starts, ends = [start for start, _ in some], [end for _, end in some]
                keys = [self._key(path)] * len(some)
                got = self._fs.cat_ranges(keys, starts, ends, on_error="raise")
                for start, data in zip(starts, got, strict=True):
                    file.seek(start)
                    file.write(data)
            file.flush()
            yield Path(file.name)

    def size(self, path: str) -> int:
        """Size of a file, bytes."""
        with one_line("read", self.url(path)):
            return int(self._fs.info(self._key(path))["size"])

    # --- writing ---

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[Sink]:
        """A binary file that appears at `path`, whole, when the block ends without an exception.

        Nothing appears when the block raises, or writes no byte; what was there before stays.
        """
        if self.local:
            with self._publish_local(path) as sink:
                yield sink
        else:
            with self._publish_remote(path) as sink:
                yield sink

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file atomically; empty data gives an empty file."""
        if not data and not self.local:
            with one_line("write", self.url(path)):
                self._fs.pipe_file(self._key(path), b"")
            return
        with self.publish(path) as sink:
            sink.write(data)
            sink.bytes = max(sink.bytes, 1)  # an empty file was asked for: publish it

    def write_json(self, path: str, obj: Any) -> None:
        self.write_bytes(path, (json.dumps(obj, indent=1, default=str) + "\n").encode())

    def delete(self, path: str) -> None:
        """Delete a file or a tree; nothing happens where there is none."""
        with one_line("delete", self.url(path)), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._key(path), recursive=True)

    def download_tree(self, prefix: str, local_dir: str | Path) -> None:
        """Copy every file under `prefix` into the local folder `local_dir`."""
        for path in self.list(prefix):
            target = Path(local_dir) / os.path.relpath(path, _relative(prefix) or ".")
            target.parent.mkdir(parents=True, exist_ok=True)
            with one_line("read", self.url(path)):
                self._fs.get_file(self._key(path), str(target))

    def upload_tree(self, local_dir: str | Path, prefix: str) -> None:
        """Copy every file under the local folder to `prefix`, each one atomically."""
        base = Path(local_dir)
        for source in sorted(item for item in base.rglob("*") if item.is_file()):
            name = f"{_relative(prefix)}/{source.relative_to(base).as_posix()}".lstrip("/")
            with self.publish(name) as sink, source.open("rb") as file:
                shutil.copyfileobj(file, sink, 1 << 20)
                sink.bytes = max(sink.bytes, 1)

    def check_writable(self) -> None:
        """Write and delete a small file, so that a job fails now and not after an hour."""
        probe = f".writable-{uuid.uuid4().hex[:8]}"
        self.write_bytes(probe, b"ok")
        self.delete(probe)

    # --- inside ---

    @property
    def _fs(self) -> Any:
        return _filesystem(self.root)

    def _key(self, path: str) -> str:
        key = self.url(path)
        return key if self.local else key.partition("://")[2]

    @contextlib.contextmanager
    def _publish_local(self, path: str) -> Iterator[Sink]:
        target = Path(self._key(path))
        with one_line("write", str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            host = re.sub(r"[^\w-]", "-", socket.gethostname())
            name = f".{target.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
            temporary = target.with_name(name)
            file = temporary.open("wb")
        try:
            sink = Sink(file, str(target))
            yield sink
            with one_line("write", str(target)):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            if sink.bytes:
                with one_line("write", str(target)):
                    os.replace(temporary, target)
                    _sync_folder(target.parent)
        finally:
            # what a full disk refused is still in the buffer, and fails a second time here
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _publish_remote(self, path: str) -> Iterator[Sink]:
        url = self.url(path)
        with one_line("write", url):
            # autocommit=False: the object comes into being at commit(), whatever was sent before
            file = self._fs.open(self._key(path), "wb", autocommit=False)
        sink = Sink(file, url)
        try:
            yield sink
            if sink.bytes:
                with one_line("write", url):
                    file.close()
                    file.commit()
            else:
                _abandon(file)
        except BaseException:
            _abandon(file)
            raise


def glob(url: str) -> list[str]:
    """Parquet inputs named by a file, a folder (its *.parquet, recursive) or a glob; sorted URLs.

    Raises UserError where nothing matches.
    """
    url = _normal(url)
    fs = _filesystem(url)
    key = url.partition("://")[2] or url
    with one_line("list", url):
        if any(mark in key for mark in "*?["):
            found = fs.glob(key)
        elif fs.isdir(key):
            found = [name for name in fs.find(key) if name.endswith(".parquet")]
        else:
            found = [key] if fs.exists(key) else []
    if not found:
        raise UserError(f"no Parquet file matches {public(url)}; name a file, a folder or a glob")
    scheme = url.partition("://")[0] + "://" if "://" in url else ""
    return sorted(scheme + name for name in found)


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0] if "://" in url else "file"
    # A listing kept from before a commit would hide the commit: no caches.
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        options = {"use_listings_cache": False, "default_cache_type": "none"}
        if os.environ.get("AWS_ENDPOINT_URL"):
            options["endpoint_url"] = os.environ["AWS_ENDPOINT_URL"]
    elif scheme in ("gs", "gcs"):
        options = {"use_listings_cache": False}
    try:
        return LocalFileSystem() if scheme == "file" else fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{public(url)}: {error}; use a folder, s3:// or gs://") from None


def _normal(url: str) -> str:
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" in url:
        scheme, _, rest = url.partition("://")
        if not rest.strip("/"):
            raise UserError(f"{url} names no bucket; write {scheme}://bucket/prefix")
        return f"{scheme}://{re.sub('/+', '/', rest).rstrip('/')}"
    if not url:
        raise UserError(
            "the root is empty; name a folder, s3://bucket/prefix or gs://bucket/prefix"
        )
    # absolute, so that a worker with another working directory means the same folder
    return os.path.abspath(os.path.expanduser(url))


def _relative(path: str) -> str:
    path = path.strip("/")
    if ".." in path.split("/"):
        raise ValueError(f"path {path!r} leaves the storage's root")
    return path


def _sweep(target: Path) -> None:
    """Remove what a killed process of this host left of an earlier attempt at `target`."""
    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    for entry in target.parent.glob(f".{_escaped(target.name)}.{host}.*.tmp"):
        match = _TEMPORARY.match(entry.name)
        if match and not _alive(int(match["pid"])):
            entry.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


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


def _abandon(file: Any) -> None:
    """Drop an upload: no part of it stays in the store, and nothing is flushed at collection."""
    with contextlib.suppress(Exception):
        file.discard()
    file.closed = True
