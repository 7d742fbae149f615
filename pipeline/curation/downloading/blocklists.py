"""What must never be stored: lists of content hashes (md5, sha256) and of urls.

A list may hold tens of millions of entries and every worker holds all lists, so an entry is kept
as 64 bits in a sorted array; while lists are read it takes 16 bytes at most. Nothing that is listed
ever passes; what is not listed is taken for it once in 2**64 / entries.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curation.urls import key_of
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.storage_faults import public

_BLOCK = 1 << 24  # bytes of a text file at a time
_ROWS = 1 << 17  # rows of a Parquet file at a time
_HEX = {"md5": 32, "sha256": 64}  # digits
_KINDS = (*_HEX, "url")


@functools.cache
def identity(url: str) -> dict[str, Any]:
    """What a list holds, whatever it is called: its size in bytes and its sha256."""
    storage, name = Storage.for_path(url)
    digest, size = hashlib.sha256(), 0
    with storage.open_input(name) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


class BlockLists:
    """The entries of all lists: 8 bytes each, in one sorted array per kind."""

    def __init__(self, entries: Iterable[tuple[str, np.ndarray]] = ()) -> None:
        """`entries` are pairs of a kind (md5, sha256, url) and uint64 marks of that kind."""
        parts: dict[str, list[np.ndarray]] = {kind: [] for kind in _KINDS}
        for kind, marks in entries:
            parts[kind].append(marks)
        self.marks = {kind: _sorted(found) for kind, found in parts.items()}

    @classmethod
    def load(cls, urls: Iterable[str]) -> BlockLists:
        """Read lists: Parquet with columns md5, sha256 or url, or text with one entry a line.

        Raises UserError for a file without such columns, and for a line that is no entry.
        """
        return cls(entry for url in urls for entry in _read(url))

    def __len__(self) -> int:
        return sum(len(marks) for marks in self.marks.values())

    def has(self, kind: str) -> bool:
        """Whether any entry is of this kind."""
        return bool(len(self.marks[kind]))

    def url(self, url: str) -> bool:
        """Whether the url is listed, in any spelling that the filter takes for the same."""
        return self.has("url") and self._listed("url", key_of(url))

    def digest(self, kind: str, digest: bytes) -> bool:
        """Whether content with this digest (kind md5 or sha256) is listed."""
        return self.has(kind) and self._listed(kind, int.from_bytes(digest[:8], "big"))

    def _listed(self, kind: str, mark: int) -> bool:
        marks, wanted = self.marks[kind], np.uint64(mark)
        index = int(np.searchsorted(marks, wanted))
        return index < len(marks) and bool(marks[index] == wanted)


def _sorted(parts: list[np.ndarray]) -> np.ndarray:
    """All marks once, ascending; empties `parts`. At most 16 bytes a mark are held, less where the
    system gives memory as it is written to. (numpy's unique goes by a hash table: thirty times the
    time.)
    """
    marks = np.empty(sum(map(len, parts)), np.uint64)
    end = len(marks)
    while parts:
        part = parts.pop()
        marks[end - len(part) : end] = part
        end -= len(part)
    marks.sort()
    kept = 0
    for start in range(0, len(marks), _ROWS):
        block = marks[start : start + _ROWS]
        fresh = np.append(kept == 0 or block[0] != marks[kept - 1], block[1:] != block[:-1])
        block = block[fresh]
        marks[kept : kept + len(block)] = block
        kept += len(block)
    marks.resize(kept, refcheck=False)
    return marks


def _read(url: str) -> Iterator[tuple[str, np.ndarray]]:
    storage, name = Storage.for_path(url)
    with storage.open_input(name) as file:
        parquet = file.read(4) == b"PAR1"
        file.seek(0)
        yield from (_parquet if parquet else _text)(file, public(url))


def _parquet(file: pa.NativeFile, where: str) -> Iterator[tuple[str, np.ndarray]]:
    try:
        listed = pq.ParquetFile(file)
        kinds = [kind for kind in _KINDS if kind in listed.schema_arrow.names]
        if not kinds:
            raise UserError(f"{where} has no column md5, sha256 or url; a block list needs one")
        for batch in listed.iter_batches(_ROWS, columns=kinds):
            for kind in kinds:
                entries = batch.column(kind).drop_null()
                if kind == "url":
                    yield kind, _url_marks(entries.to_pylist())
                elif pa.types.is_string(entries.type) or pa.types.is_large_string(entries.type):
                    lines = [entry.strip().encode() for entry in entries.to_pylist()]
                    yield kind, _hex_marks(kind, lines, where)
                else:
                    yield kind, _marks(kind, b"".join(entries.to_pylist()), len(entries), where)
    except pa.ArrowException as error:
        line = " ".join(str(error).split())[:120]
        raise UserError(f"{where} is no readable Parquet file ({line})") from None


def _text(file: pa.NativeFile, where: str) -> Iterator[tuple[str, np.ndarray]]:
    rest = b""
    while block := file.read(_BLOCK):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        yield from _lines(lines, where)
    yield from _lines([rest], where)


def _lines(lines: list[bytes], where: str) -> Iterator[tuple[str, np.ndarray]]:
    entries = [entry for line in lines if (entry := line.strip()) and entry[:1] != b"#"]
    urls = [entry for entry in entries if b"://" in entry]
    if urls:
        yield "url", _url_marks(entry.decode("utf-8", "replace") for entry in urls)
        entries = [entry for entry in entries if b"://" not in entry]
    for kind, digits in _HEX.items():
        found = [entry for entry in entries if len(entry) == digits]
        if found:
            yield kind, _hex_marks(kind, found, where)
    for entry in entries:
        if len(entry) not in _HEX.values():
            raise UserError(
                f"{where}: {entry[:60].decode(errors='replace')!r} is no md5, sha256 or url; "
                "a block list has one of them a line"
            )


def _hex_marks(kind: str, lines: list[bytes], where: str) -> np.ndarray:
    try:
        digests = bytes.fromhex(b"".join(lines).decode("ascii"))
    except ValueError:
        raise UserError(f"{where} holds a {kind} that is not hexadecimal; mend it") from None
    return _marks(kind, digests, len(lines), where)


def _marks(kind: str, digests: bytes, number: int, where: str) -> np.ndarray:
    """The first 8 bytes of each digest, as numbers."""
    size = _HEX[kind] // 2
    if len(digests) != number * size:
        raise UserError(f"{where} holds a {kind} that is not {size} bytes long; mend it")
    heads = np.frombuffer(digests, np.uint8).reshape(number, size)[:, :8]
    return np.ascontiguousarray(heads).view(">u8").reshape(number).astype(np.uint64)


def _url_marks(urls: Iterable[str]) -> np.ndarray:
    return np.fromiter((key_of(url) for url in urls), np.uint64)
