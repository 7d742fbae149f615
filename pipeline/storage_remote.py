"""Files of an object store: read by ranges, written whole; each request is tried again."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StoreHiccup, UserError
from pipeline.storage_faults import attempt, one_line, public

PART_BYTES = 16 * 2**20
"""Below this an object is one PUT; above, it goes up in parts of this size (at most 10,000)."""

_PARTS_AT_ONCE = 4
_RANGE_BYTES = 8 * 2**20
"""Of one request. A connection brings some 50 to 100 MB a second, so many carry a row group."""
_COPY_BYTES, _COPIED_AT_ONCE = 16 << 20, 8


def on_few_rights(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """s3fs's own way to call S3, for a role that is given no more rights than it needs.

    To whoever may list only some prefixes of a bucket, S3 answers 403 for an object that is not
    there: a listing of the very name, which it may do, tells it from one that is forbidden. And
    some stores (Ceph 16 is one) grant a deletion of many to whoever may delete in the whole bucket
    only: those are deleted one by one.
    """

    async def asked(method: str, *options: Any, **given: Any) -> Any:
        try:
            answer = await call(method, *options, **given)
        except PermissionError as refusal:
            if method in ("head_object", "get_object"):
                await look(refusal, given["Bucket"], given["Key"])
            elif method == "delete_objects":
                await delete(given["Bucket"], given["Delete"]["Objects"])
                return {}
            raise
        if method == "delete_objects":  # answered with 200, whatever became of the single ones
            await delete(given["Bucket"], answer.get("Errors", []))
        return answer

    async def look(refusal: PermissionError, bucket: str, key: str) -> None:
        try:
            found = await call("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        except PermissionError:
            return
        if all(entry["Key"] != key for entry in found.get("Contents", [])):
            raise FileNotFoundError(f"{bucket}/{key}") from refusal

    async def delete(bucket: str, objects: list[dict[str, Any]]) -> None:
        for each in objects:
            await call("delete_object", Bucket=bucket, Key=each["Key"])

    return asked


def names_on_s3(fs: Any, folder: str, begin: str, url: str) -> Iterator[str]:
    """Names in a folder of an S3 store that begin so, page by page."""
    bucket, _, key = folder.partition("/")
    where = {"Bucket": bucket, "Prefix": f"{key}/{begin}", "Delimiter": "/"}
    more: dict[str, str] | None = {}
    while more is not None:
        ask = functools.partial(fs.call_s3, "list_objects_v2", **where, **more)
        page = attempt("list", url, ask)
        for entry in page.get("Contents", []):
            yield entry["Key"].rpartition("/")[2]
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else None


def names_elsewhere(fs: Any, folder: str, begin: str, url: str) -> Iterator[str]:
    """The same of another store."""
    names = attempt("list", url, lambda: fs.find(folder, maxdepth=1, prefix=begin))
    return (name.rpartition("/")[2] for name in names)


class RangedFile:
    """Byte ranges of an object, fetched side by side; what came is not asked for again."""

    def __init__(self, fs: Any, key: str, url: str) -> None:
        self._fs, self._key, self._url = fs, key, url
        self.size = int(attempt("open", url, lambda: fs.info(key)["size"]))

    def read(self, spans: list[tuple[int, int]]) -> list[np.ndarray]:
        """The bytes [start, end) of each span, uint8."""
        pieces = [_pieces(start, end, _RANGE_BYTES) for start, end in spans]
        came = iter(self.fetch([piece for some in pieces for piece in some]))
        found = []
        for some in pieces:
            parts = [np.frombuffer(next(came), np.uint8) for _ in some]
            found.append(parts[0] if len(parts) == 1 else np.concatenate(parts or [_NOTHING]))
        return found

    def fetch(self, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span, a request each."""
        came: dict[int, bytes] = {}

        def rest() -> None:
            missing = [i for i in range(len(spans)) if i not in came]
            starts, ends = ([spans[i][side] for i in missing] for side in (0, 1))
            keys = [self._key] * len(missing)
            found = self._fs.cat_ranges(keys, starts, ends, on_error="return")
            fault: Exception | None = None
            for i, data in zip(missing, found, strict=True):
                start, end = spans[i]
                if isinstance(data, Exception):
                    fault = data
                elif len(data) != end - start:
                    fault = ConnectionError(f"{len(data)} of {end - start} bytes came")
                else:
                    came[i] = data
            if fault is not None:
                raise fault

        attempt("read", self._url, rest)
        return [came[i] for i in range(len(spans))]


def _pieces(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(start, end, size)]


_NOTHING = np.empty(0, np.uint8)


class Positioned(io.RawIOBase):
    """A file for pyarrow whose position is a number: `_at`, in a `_file` of known size."""

    _at: int
    _file: Any

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class RangedReader(Positioned):
    """A remote file as pyarrow reads it: every read is one ranged request."""

    def __init__(self, fs: Any, key: str, url: str) -> None:
        self._url, self._at = url, 0
        self._file = attempt("open", url, lambda: fs.open(key, "rb", cache_type="none"))

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._file.size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)

        def fetch() -> bytes:
            self._file.seek(self._at)
            data: bytes = self._file.read(wanted) if wanted else b""
            if len(data) != wanted:
                raise ConnectionError(f"{len(data)} of {wanted} bytes came")
            return data

        data = attempt("read", self._url, fetch)
        self._at += len(data)
        return data


class Upload:
    """An object being written, which comes into being at `commit` and not before.

    A small one is a single PUT. Parts of a larger one go up while the writer goes on.
    """

    def __init__(self, fs: Any, key: str, url: str) -> None:
        self._fs, self._key, self._url = fs, key, url
        self._buffer = bytearray()
        self._parts: _Parts | _Stream | None = None

    def write(self, data: Any) -> None:
        self._buffer += data
        while len(self._buffer) > PART_BYTES:
            if self._parts is None:
                kind = _Parts if hasattr(self._fs, "call_s3") else _Stream
                self._parts = kind(self._fs, self._key, self._url)
            self._parts.send(bytes(self._buffer[:PART_BYTES]))
            del self._buffer[:PART_BYTES]

    def flush(self) -> None:
        pass

    def commit(self) -> None:
        data = bytes(self._buffer)
        if self._parts is None:
            attempt("write", self._url, lambda: self._fs.pipe_file(self._key, data))
        else:
            self._parts.send(data)
            self._parts.commit()

    def discard(self) -> None:
        """Drop what was sent: no part of it stays in the store, as far as the store answers."""
        if self._parts is not None:
            self._parts.discard()


class _Dropped(StoreHiccup):
    """The store does not know the upload any more."""


class _Parts:
    """A multipart upload of S3."""

    def __init__(self, fs: Any, key: str, url: str) -> None:
        bucket, _, name = key.partition("/")
        self._fs, self._key, self._url = fs, key, url
        self._where = {"Bucket": bucket, "Key": name}
        self._id = self._call("create_multipart_upload")["UploadId"]
        self._sent: list[Future[dict[str, Any]]] = []
        self._bytes = 0
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload")

    def send(self, data: bytes) -> None:
        if len(self._sent) >= _PARTS_AT_ONCE:  # no more in flight, and a fault shows soon
            self._sent[-_PARTS_AT_ONCE].result()
        self._bytes += len(data)
        self._sent.append(self._pool.submit(self._send, len(self._sent) + 1, data))

    def commit(self) -> None:
        parts = [part.result() for part in self._sent]
        self._pool.shutdown()
        try:
            self._call(
                "complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts}
            )
        except _Dropped:
            # completed already, where only the answer to an earlier try was lost
            if attempt("write", self._url, self._size) != self._bytes:
                raise
        self._sweep()

    def discard(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(Exception):
            self._fs.abort_mpu(self._where["Bucket"], self._where["Key"], self._id)
        self._sweep()

    def _send(self, number: int, data: bytes) -> dict[str, Any]:
        sent = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def _call(self, method: str, **more: Any) -> Any:
        try:
            return attempt(
                "write", self._url, lambda: self._fs.call_s3(method, **self._where, **more)
            )
        except UserError as error:
            if "UploadId" in more and isinstance(error.__cause__, FileNotFoundError):
                raise _Dropped(
                    f"cannot write {public(self._url)}: another writer of this object dropped the "
                    "upload; see that only one run works on the root, and run again"
                ) from error.__cause__
            raise

    def _size(self) -> int:
        return int(self._fs.info(self._key)["size"]) if self._fs.exists(self._key) else -1

    def _sweep(self) -> None:
        """Abort every upload to this object that killed writers began, or lost answers hid.

        Once, without patience: the next writer of the object sweeps again.
        """
        with contextlib.suppress(Exception):
            bucket, name = self._where["Bucket"], self._where["Key"]
            listed = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=name)
            for upload in listed.get("Uploads", []):
                if upload["Key"] == name:
                    self._fs.abort_mpu(bucket, name, upload["UploadId"])


class _Stream:
    """A large object by fsspec's own file, on stores that are not S3."""

    def __init__(self, fs: Any, key: str, url: str) -> None:
        self._url = url
        self._file = attempt("write", url, lambda: fs.open(key, "wb", autocommit=False))

    def send(self, data: bytes) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._file.discard()
        self._file.closed = True  # nothing is flushed at collection


@contextlib.contextmanager
def copied(source: RangedFile, spans: list[tuple[int, int]] | None) -> Iterator[Path]:
    """A local file as large as `source`, filled with the spans [start, end), none = all."""
    pieces = [
        piece
        for start, stop in spans or [(0, source.size)]
        for piece in _pieces(start, stop, _COPY_BYTES)
    ]
    with _nameless() as (file, where):
        file.truncate(source.size)
        for at in range(0, len(pieces), _COPIED_AT_ONCE):
            some = pieces[at : at + _COPIED_AT_ONCE]
            got = source.fetch(some)
            with one_line("write", f"{tempfile.gettempdir()} (set TMPDIR to another)"):
                for (start, _), data in zip(some, got, strict=True):
                    os.pwrite(file.fileno(), data, start)
        yield where


@contextlib.contextmanager
def _nameless() -> Iterator[tuple[Any, Path]]:
    """A temporary file and where to open it again; where it can, one that no killed process leaves
    behind.
    """
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        with tempfile.TemporaryFile() as file:
            yield file, descriptors / str(file.fileno())
    else:
        with tempfile.NamedTemporaryFile(prefix="copy-") as file:
            yield file, Path(file.name)
