"""The one seam to local paths and object stores: everything else is given a `Storage`.

A path is local (`runs/mini`), or whatever fsspec knows by its scheme (`s3://`, `gs://`).
Two promises hold on all of them: a file appears whole or not at all, and a failure is one line.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
import pyarrow
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import UserError
from pipeline.storage_faults import attempt, one_line, public, there_already
from pipeline.storage_local import LocalFile, MappedFile, check_readable, unfinished
from pipeline.storage_remote import (
    RangedFile,
    RangedReader,
    Upload,
    copied,
    names_elsewhere,
    names_on_s3,
    on_few_rights,
)

# Newer AWS clients send trailing checksums that older S3-compatible stores refuse (HTTP 411).
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

# A request is tried thrice with jitter by the client itself, so that a listing of a thousand pages
# does not begin anew for one of them; storage_faults.attempt tries the whole operation again.
_REQUESTS = {
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "connect_timeout": 10,
    "read_timeout": 20,
}

T = TypeVar("T")


class _Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...

    def flush(self) -> Any: ...


class Sink:
    """A binary file being published: counts and hashes what goes through it.

    `bytes` is the number of bytes written so far, `sha256` the hex digest of them. Closing is the
    publisher's business: `close()` here only flushes, so that writers which close their file may.
    """

    def __init__(self, file: _Writable, url: str) -> None:
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
        return bool(self._try("look for", path, lambda fs, key: fs.exists(key)))

    def is_file(self, path: str = "") -> bool:
        return bool(self._try("look for", path, lambda fs, key: fs.isfile(key)))

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Paths of all files under the folder `prefix`, sorted, recursive; [] if there is none.

        Files still being published are not listed.
        """
        return self._relative_names(self._try("list", prefix, _files_under))

    def names(self, folder: str, begin: Sequence[str] | None = None) -> Iterator[str]:
        """Names of the files that lie in `folder` itself, in no order; of those that begin with an
        entry of `begin`, where it is given. For folders of a million files: on S3 a page of a
        thousand names is a request, of which nothing else is kept.
        """
        if self.local:
            wanted = ("",) if begin is None else tuple(begin)
            none = FileNotFoundError, NotADirectoryError
            with one_line("list", self.url(folder)), contextlib.suppress(*none):
                for entry in os.scandir(self._key(folder)):
                    name = entry.name
                    if name.startswith(wanted) and entry.is_file() and not unfinished(name):
                        yield name
            return
        pages = names_on_s3 if hasattr(self._fs, "call_s3") else names_elsewhere
        for start in [""] if begin is None else begin:
            yield from pages(self._fs, self._key(folder), start, self.url(folder))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Paths of all files under the folder `prefix`, as `list` has them, and their bytes."""
        found = self._try("list", prefix, _files_under)
        names = self._relative_names(found)
        at = {self._key(name): name for name in names}
        return {at[name]: int(info["size"]) for name, info in found.items() if name in at}

    def read_bytes(self, path: str) -> bytes:
        self._check_readable(path)
        data: bytes = self._try("read", path, lambda fs, key: fs.cat_file(key))
        return data

    def read_many(self, paths: builtins.list[str]) -> dict[str, bytes]:
        """Contents of many small files, fetched side by side."""
        data: dict[str, bytes] = {}

        def rest(fs: Any, _: str) -> None:
            keys = {self._key(path): path for path in paths if path not in data}
            found = fs.cat(list(keys), on_error="return") if keys else {}
            # fsspec gives bare bytes for a single path on some file systems
            found = found if isinstance(found, dict) else {next(iter(keys)): found}
            named = {keys[_normal(k) if self.local else k]: found[k] for k in found}
            data.update((path, got) for path, got in named.items() if isinstance(got, bytes))
            for got in named.values():  # what came is kept, whatever the fault of the others
                if isinstance(got, Exception):
                    raise got

        for path in paths:
            self._check_readable(path)
        if paths:
            self._try("read", paths[0], rest)
        return {path: data[path] for path in paths}

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
        if not self.local:
            reader = RangedReader(self._fs, self._key(path), self.url(path))
            return pyarrow.PythonFile(reader, mode="r")
        self._check_readable(path)
        with one_line("open", self.url(path)):
            opened = pyarrow.memory_map if mapped else pyarrow.OSFile
            return opened(self._key(path), "r")

    def open_ranges(self, path: str) -> MappedFile | RangedFile:
        """Byte ranges of a published file, which never changes: many at a time, from any thread."""
        self._check_readable(path)
        if self.local:
            return MappedFile(self._key(path))
        return RangedFile(self._fs, self._key(path), self.url(path))

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
        with copied(RangedFile(self._fs, self._key(path), self.url(path)), spans) as copy:
            yield copy

    def size(self, path: str) -> int:
        """Size of a file, bytes."""
        return int(self._try("read", path, lambda fs, key: fs.info(key)["size"]))

    # --- writing ---

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[Sink]:
        """A binary file that appears at `path`, whole, when the block ends without an exception.

        Nothing appears when the block raises, or writes no byte; what was there before stays.
        """
        url, key = self.url(path), self._key(path)
        writer = LocalFile(key) if self.local else Upload(self._fs, key, url)
        sink = Sink(writer, url)
        try:
            yield sink
            if sink.bytes:
                writer.commit()
            else:
                writer.discard()
        except BaseException:
            writer.discard()
            raise

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file atomically; empty data gives an empty file."""
        with self.publish(path) as sink:
            sink.write(data)
            sink.bytes = max(sink.bytes, 1)  # an empty file was asked for: publish it

    def write_json(self, path: str, obj: Any) -> None:
        self.write_bytes(path, (json.dumps(obj, indent=1, default=str) + "\n").encode())

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole small file where there is none; whether there was none.

        Of two that create at once, one is told so. Not on stores without conditional writes (AWS,
        Ceph and moto have them): there the later one wins, and both are told True.
        """
        if not self.local:
            try:
                self._try("write", path, lambda fs, key: fs.pipe_file(key, data, mode="create"))
            except UserError as error:
                if there_already(error):
                    return False
                raise
            return True
        file = LocalFile(self._key(path))
        try:
            file.write(data)
            return file.commit_if_new()
        finally:
            file.discard()

    def delete(self, path: str) -> None:
        """Delete a file or a tree; nothing happens where there is none."""

        def remove(fs: Any, key: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                if self.local:
                    return fs.rm(key, recursive=True)
                # the objects alone: a tree's own name is none, and may be one we have no right to
                if names := list(_files_under(fs, key)):
                    fs.rm(names)
                # S3's bulk deletion answers 200 whatever became of the single objects
                if names and fs.exists(key):
                    raise PermissionError(f"{key} is still there")

        self._try("delete", path, remove)

    def download_tree(self, prefix: str, local_dir: str | Path) -> None:
        """Copy every file under `prefix` into the local folder `local_dir`, and nothing beside it:
        an object's name may hold "..", which a folder would follow. Raises UserError then.
        """
        for path in self.list(prefix):
            if ".." in path.split("/"):
                raise UserError(f"{self.url()}/{path!r} is no name of ours; delete that object")
            target = Path(local_dir) / os.path.relpath(path, _relative(prefix) or ".")
            target.parent.mkdir(parents=True, exist_ok=True)
            half = f"{target}.part"
            get = functools.partial(self._fs.get_file, self._key(path), half)
            attempt("read", self.url(path), get)
            os.replace(half, target)

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

    def _check_readable(self, path: str) -> None:
        if self.local:
            check_readable(self._key(path))

    def _try(self, action: str, path: str, call: Callable[[Any, str], T]) -> T:
        """`call(file system, key of path)`, tried again while a remote store is only busy."""
        return attempt(action, self.url(path), lambda: call(self._fs, self._key(path)))

    def _relative_names(self, found: Iterable[str]) -> builtins.list[str]:
        """Names of the file system as paths under the root, sorted; unfinished files left out."""
        base = self._key("")
        names = (os.path.relpath(name, base) if self.local else name[len(base) :] for name in found)
        relative = (name.lstrip("/") for name in names)
        return sorted(name for name in relative if not unfinished(name.rpartition("/")[2]))

    def _key(self, path: str) -> str:
        key = self.url(path)
        return key if self.local else key.partition("://")[2]


def _files_under(fs: Any, key: str) -> dict[str, Any]:
    """Name -> what is known of it. s3fs names a folder that appears while it looks as if it were a
    file in itself; a link is of the type "other".
    """
    found: dict[str, Any] = fs.find(key, detail=True)
    return {name: info for name, info in found.items() if info["type"] != "directory"}


def glob(url: str) -> list[str]:
    """Parquet inputs named by a file, a folder (its *.parquet, recursive) or a glob; sorted URLs.

    Raises UserError where nothing matches.
    """
    url = _normal(url)
    fs = _filesystem(url)
    key = url.partition("://")[2] or url

    def find() -> list[str]:
        if any(mark in key for mark in "*?["):
            return list(fs.glob(key))
        if fs.isdir(key):
            return [name for name in fs.find(key) if name.endswith(".parquet")]
        return [key] if fs.exists(key) else []

    found = attempt("list", url, find)
    if not found:
        raise UserError(f"no Parquet file matches {public(url)}; name a file, a folder or a glob")
    scheme = url.partition("://")[0] + "://" if "://" in url else ""
    return sorted(scheme + name for name in found)


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0] if "://" in url else "file"
    # A listing kept from before a commit would hide the commit: no caches.
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        options = {
            "use_listings_cache": False,
            "default_cache_type": "none",
            "config_kwargs": _REQUESTS,
        }
        if os.environ.get("AWS_ENDPOINT_URL"):
            options["endpoint_url"] = os.environ["AWS_ENDPOINT_URL"]
    elif scheme in ("gs", "gcs"):
        options = {"use_listings_cache": False}
    try:
        fs = LocalFileSystem() if scheme == "file" else fsspec.filesystem(scheme, **options)
        fs.retries = 1  # s3fs would repeat each request five times more, unseen by our clock
        if scheme in ("s3", "s3a") and "_call_s3" not in vars(fs):  # instances are shared
            fs._call_s3 = on_few_rights(fs._call_s3)
        return fs
    except (ImportError, ValueError) as error:
        raise UserError(f"{public(url)}: {error}; use a folder, s3:// or gs://") from None


def _normal(url: str) -> str:
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" in url:
        scheme, _, rest = url.partition("://")
        if public(url) != url:
            raise UserError(
                f"{public(url)}: credentials do not belong into an address, where logs and reports "
                "show it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the node's role"
            )
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
        raise UserError(f"path {path!r} leaves the root; whatever names it is not of this run")
    return path
