"""What a folder holds: its images, and the caption that stands beside each.

A caption is in `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, as the Hugging Face hub has
them (`file_name`, from where the file of metadata lies, and `text`), or else in a .txt file of the
image's name. A table of the same columns that lies elsewhere goes before both.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.storage import Storage

# As vetting.py lets them be decoded, by what their names end in.
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"}
_TABLES = (".jsonl", ".csv", ".parquet")
_METADATA = tuple(f"metadata{ending}" for ending in _TABLES)
_NAME, _TEXTS = "file_name", ("text", "caption")
LONGEST_TEXT = 1 << 16  # bytes of a caption, or of its file
_READERS = 16


@dataclass(frozen=True)
class Pair:
    """An image of the folder, and its caption."""

    path: str
    """Under the folder."""
    size: int
    """Bytes."""
    caption: str
    """In one line; "" = none."""


def pairs(folder: Storage, captions: str | None = None) -> list[Pair]:
    """Every image under the folder with its caption, by path; what begins with a dot is left out.

    captions: a table that lies elsewhere, whose `file_name` is from the folder on.

    Raises:
        UserError: there is no image; metadata that cannot be read, or that names images which are
            not there; a caption that is no text.
    """
    files = {
        path: size
        for path, size in folder.sizes().items()
        if not any(part.startswith(".") for part in path.split("/"))
    }
    for path in files:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"folder.path {folder.url()}: the file name {path!r} is no UTF-8; rename it"
            ) from None
    images = {path: size for path, size in files.items() if _ends(path) in IMAGES}
    if not images:
        kinds = ", ".join(sorted(kind[1:] for kind in IMAGES))
        raise UserError(f"folder.path {folder.url()}: there is no image ({kinds}); name another")
    found = _beside(folder, images, files)
    for path in files:
        base, name = posixpath.split(path)
        if name in _METADATA:
            found |= _listed(folder, path, folder, base, images)
    if captions is not None:
        table, name = Storage.for_path(captions)
        if _ends(name) not in _TABLES:
            raise UserError(f"folder.captions {captions}: name a .jsonl, .csv or .parquet file")
        found |= _listed(table, name, folder, "", images)
    return [Pair(path, size, found.get(path, "")) for path, size in sorted(images.items())]


def _beside(folder: Storage, images: dict[str, int], files: dict[str, int]) -> dict[str, str]:
    """Captions in files of their own."""
    named = {path: posixpath.splitext(path)[0] + ".txt" for path in images}
    there = {path: text for path, text in named.items() if text in files}
    for text in there.values():
        if files[text] > LONGEST_TEXT:
            raise UserError(
                f"{folder.url(text)} has {files[text]:,} bytes, which is no caption; shorten it"
            )
    with ThreadPoolExecutor(_READERS) as pool:
        texts = pool.map(lambda text: _text(folder, text), there.values())
        return {path: one_line(text) for path, text in zip(there, texts, strict=True)}


def _listed(
    table: Storage, path: str, folder: Storage, base: str, images: dict[str, int]
) -> dict[str, str]:
    """Captions of a table, which speaks of the images of `folder` from `base` on."""
    found: dict[str, str] = {}
    for where, row in _rows(table, path):
        at = f"{table.url(path)}, {'row' if path.endswith('.parquet') else 'line'} {where}"
        image, caption = _row(at, row)
        image = posixpath.normpath(posixpath.join(base, image))
        if image not in images:
            raise UserError(f"{at}: there is no image {image} in {folder.url()}; mend the line")
        found[image] = _sound(at, one_line(caption))
    return found


def _sound(at: str, caption: str) -> str:
    """The caption, if it may be one: JSON holds half a surrogate pair, and texts of any length."""
    try:
        size = len(caption.encode())
    except UnicodeEncodeError:
        raise UserError(f"{at}: the text is not Unicode ({caption[:40]!r}); mend it") from None
    if size > LONGEST_TEXT:
        raise UserError(f"{at}: a text of {size:,} bytes, which is no caption; shorten it")
    return caption


def _rows(table: Storage, path: str) -> Iterator[tuple[int, object]]:
    if _ends(path) == ".parquet":
        return _parquet_rows(table, path)
    text = _text(table, path)
    if _ends(path) == ".jsonl":
        return _json_rows(text)
    return _csv_rows(text, table.url(path))


def _row(at: str, row: object) -> tuple[str, str]:
    """(file_name, text) of a line."""
    if not isinstance(row, dict):
        raise UserError(f"{at} is not a JSON object with {_NAME} and {_TEXTS[0]}; mend it")
    told = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
    image = row.get(_NAME)
    if not isinstance(image, str) or told is None:
        missing = _TEXTS[0] if isinstance(image, str) else _NAME
        raise UserError(f"{at} has no {missing}; each line needs {_NAME} and {_TEXTS[0]}")
    return image, told


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, object]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{where}, after line {rows.line_num}: the CSV cannot be read ({error}); mend it"
        ) from None


def _parquet_rows(table: Storage, path: str) -> Iterator[tuple[int, object]]:
    try:
        with table.open_input(path) as source, pq.ParquetFile(source) as file:
            wanted = [name for name in (_NAME, *_TEXTS) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{table.url(path)} is not Parquet ({' '.join(str(error).split())[:100]}); write it "
            "anew"
        ) from None


def _text(folder: Storage, path: str) -> str:
    try:
        return folder.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{folder.url(path)} is not UTF-8 text; save it as that") from None


def one_line(text: str) -> str:
    return " ".join(text.split())


def _ends(path: str) -> str:
    return posixpath.splitext(path)[1].lower()
