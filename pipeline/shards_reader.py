"""Row groups of a shard where they lie: tensors are not copied before a batch is put together.

`ShardWriter` stores a tensor column as plain pages: a header, then the rows' bytes end to end. So a
row is a slice of the file, and reading is to know where it begins. Its bytes are the system's own
pages of a local file, or came from an object store in ranges, side by side, of the wanted columns
alone. pyarrow reads the rest: strings, and shards that another program wrote again in its own way.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.shards import CLIP_PIXELS, Manifest, Tensor, flipped_column, tensors_of, unpack
from pipeline.storage import Storage
from pipeline.storage_remote import Positioned

# Of bytes between two wanted columns: less is read too, rather than asked around.
_GAP_BYTES = 64 * 2**10
_FOOTER_BYTES = 64 * 2**10  # what pyarrow reads first, from the end
_DATA_PAGE, _PLAIN = 0, 0  # of the format's enumerations PageType and Encoding


class DamagedShard(Exception):
    """What the store gave is no shard, or not a whole one. Its text says what is wrong with it."""


class Column:
    """A tensor column of one row group: row i is `data[offsets[i]:][:tensor.nbytes]`.

    `mirrored`: the rows are pixels (height, width, channels), and their mirror image is meant.
    """

    __slots__ = ("data", "mirrored", "offsets", "tensor")

    def __init__(
        self, tensor: Tensor, data: np.ndarray, offsets: Sequence[int], mirrored: bool = False
    ) -> None:
        self.tensor, self.data, self.offsets, self.mirrored = tensor, data, offsets, mirrored

    def __len__(self) -> int:
        return len(self.offsets)


class Stacks:
    """Puts rows together, in memory that nobody uses any more where there is some: what the system
    hands out anew costs more than the copy.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}

    def stack(self, rows: Sequence[tuple[Column, int]]) -> np.ndarray:
        """Rows of columns of one shape as an array (rows, *shape): each is copied, once."""
        tensor = rows[0][0].tensor
        out = self._memory((len(rows), *tensor.shape), tensor.numpy_dtype)
        flat, size = out.reshape(len(rows), -1).view(np.uint8), tensor.nbytes
        for i, (column, row) in enumerate(rows):
            start = column.offsets[row]
            flat[i] = column.data[start : start + size]
            if column.mirrored:
                out[i] = out[i, :, ::-1].copy()
        return out

    def _memory(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        given = self._given.setdefault((shape, dtype.str), [])
        for array in given:
            # views, and tensors over it, hold the array: it is ours alone when none of them lives
            if sys.getrefcount(array) == _OURS:
                return array
        given.append(np.empty(shape, dtype))
        return given[-1]


# References to an array that is free: the list's, the loop's, and the question's own.
_OURS = 3


def stack(rows: Sequence[tuple[Column, int]]) -> np.ndarray:
    """Rows of columns of one shape as an array (rows, *shape): each is copied, once."""
    return Stacks().stack(rows)


class ShardReader:
    """One shard that a manifest lists. May be shared between threads.

    Raises:
        UserError: the store refuses, or the shard's tensors are not those of the manifest.
        DamagedShard: it is none.
    """

    def __init__(self, storage: Storage, manifest: Manifest, path: str) -> None:
        self._file = storage.open_ranges(path)
        end = self._file.size
        footer = _Spans(self._file, [(max(0, end - _FOOTER_BYTES), end)] if end else [])
        with _damage():
            self.metadata = pq.ParquetFile(footer).metadata
            self.schema = self.metadata.schema.to_arrow_schema()
        manifest.check_tensors(storage, path, self.schema)
        self._tensors = {tensor.name: tensor for tensor in tensors_of(self.schema)}
        self._leaves: dict[str, list[int]] = {}
        for i in range(self.metadata.num_columns):
            name = self.metadata.schema.column(i).path.partition(".")[0]
            self._leaves.setdefault(name, []).append(i)

    @property
    def row_groups(self) -> list[int]:
        """Rows of each row group."""
        return [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]

    def read(
        self, index: int, columns: Iterable[str], *, flip: bool = False, verify: bool = False
    ) -> dict[str, Column | list[Any]]:
        """Columns of one row group: tensors as `Column`, others as lists.

        Args:
            index: the row group.
            columns: their names.
            flip: of the mirrored images, under the names of the plain ones.
            verify: compare each page with its checksum, where it has one.

        Raises:
            UserError: the store refuses, or is out of reach for longer than is tried again.
            DamagedShard: the bytes are not a row group.
        """
        stored = {name: self._stored(name, flip) for name in columns}
        group = self.metadata.row_group(index)
        chunks = {
            leaf: _span(group.column(leaf)) for n in stored.values() for leaf in self._leaves[n]
        }
        for start, end in chunks.values():
            if not 0 <= start <= end <= self._file.size:
                raise DamagedShard(f"a column ends at byte {end} of {self._file.size}")
        spans = _Spans(self._file, _merged(chunks.values()))
        found: dict[str, Column | list[Any]] = {}
        with _damage():
            for name, known_as in stored.items():
                tensor = self._tensors.get(known_as)
                column = group.column(self._leaves[known_as][0])
                if tensor is None or column.compression != "UNCOMPRESSED":
                    continue
                data = spans.slice(*chunks[self._leaves[known_as][0]])
                offsets = _plain_rows(data, group.num_rows, tensor.nbytes, verify)
                if offsets is not None:
                    found[name] = Column(tensor, data, offsets, flip and name == CLIP_PIXELS)
            if rest := {name: known_as for name, known_as in stored.items() if name not in found}:
                found |= self._read_rest(spans, index, rest, flip, verify)
        return found

    def _read_rest(
        self, spans: _Spans, index: int, stored: dict[str, str], flip: bool, verify: bool
    ) -> dict[str, Column | list[Any]]:
        with pq.ParquetFile(
            spans, metadata=self.metadata, pre_buffer=False, page_checksum_verification=verify
        ) as file:
            table = file.read_row_group(index, columns=list(stored.values()), use_threads=False)
        found: dict[str, Column | list[Any]] = {}
        for name, known_as in stored.items():
            values = unpack(table.schema.field(known_as), table.column(known_as))
            tensor = self._tensors.get(known_as)
            if tensor is None:
                found[name] = values
            else:
                offsets = range(0, values.nbytes, tensor.nbytes)
                data = values.reshape(-1).view(np.uint8)
                found[name] = Column(tensor, data, offsets, flip and name == CLIP_PIXELS)
        return found

    def _stored(self, name: str, flip: bool) -> str:
        other = flipped_column(name)
        return other if flip and other in self._leaves else name


class _Ranges(Protocol):
    size: int

    def read(self, spans: list[tuple[int, int]]) -> list[np.ndarray]: ...


class _Spans(Positioned):
    """Parts of a file in memory, as a file for pyarrow; what else it asks for is fetched then."""

    def __init__(self, file: _Ranges, spans: list[tuple[int, int]]) -> None:
        self._file, self._at = file, 0
        self._starts, self._parts = [start for start, _ in spans], file.read(spans)

    def slice(self, start: int, end: int) -> np.ndarray:
        part = bisect.bisect_right(self._starts, start) - 1
        if part >= 0 and end <= self._starts[part] + len(self._parts[part]):
            return self._parts[part][start - self._starts[part] : end - self._starts[part]]
        return self._file.read([(start, end)])[0]

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        start, wanted = self._at, left if size is None or size < 0 else min(size, left)
        self._at += wanted
        return self.slice(start, start + wanted).tobytes() if wanted else b""


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What goes wrong with bytes that have come is their fault, not the store's."""
    try:
        yield
    except (UserError, DamagedShard, MemoryError):
        raise
    except (
        OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
        pa.ArrowException,
    ) as error:  # fmt: skip
        raise DamagedShard(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _span(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where a column chunk lies in the file, [start, end)."""
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    return start, start + column.total_compressed_size


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= _GAP_BYTES:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _plain_rows(data: np.ndarray, rows: int, size: int, verify: bool) -> list[int] | None:
    """Where each of the rows of `size` bytes begins in a column chunk; None where its pages are of
    another kind.
    """
    offsets: list[int] = []
    view, at = data.data, 0
    while len(offsets) < rows:
        header, at = _thrift(view, at)
        count, stored, page = header.get(5, {}).get(1, 0), header.get(3, 0), header.get(5, {})
        if header.get(1) != _DATA_PAGE or page.get(2) != _PLAIN or stored != count * size:
            return None
        if not 0 < count <= rows - len(offsets) or at + stored > len(view):
            raise DamagedShard("a page is longer than its column")
        if verify and 4 in header and zlib.crc32(view[at : at + stored]) != header[4] & 0xFFFFFFFF:
            raise DamagedShard("a page is not what its checksum says")
        offsets.extend(range(at, at + stored, size))
        at += stored
    return offsets


def _thrift(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol, {field: value}, and where it ends."""
    found: dict[int, Any] = {}
    field = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            field, at = _number(data, at)
        kind &= 0x0F
        if kind in (_TRUE, _FALSE):
            found[field] = kind == _TRUE
        elif kind in _NUMBERS:
            found[field], at = _number(data, at)
        elif kind == _BYTES:
            length, at = _varint(data, at)
            at += length
        elif kind == _STRUCT:
            found[field], at = _thrift(data, at)
        else:
            raise DamagedShard("a page has no header")
    return found, at + 1


_TRUE, _FALSE, _BYTES, _STRUCT = 1, 2, 8, 12
_NUMBERS = (4, 5, 6)  # i16, i32, i64
_LONGEST_VARINT = 63  # bits


def _number(data: memoryview, at: int) -> tuple[int, int]:
    zigzag, at = _varint(data, at)
    return (zigzag >> 1) ^ -(zigzag & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _LONGEST_VARINT:
            raise DamagedShard("a page has no header")
