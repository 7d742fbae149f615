"""A unit's images, decoded in a thread while the model computes on the batch before."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow.parquet as pq
from PIL import Image

from pipeline.config.shared import MAX_PIXELS
from pipeline.storage import Storage

T = TypeVar("T")
FORMATS = ("JPEG", "PNG", "WEBP")
"""What the download stage stores. Who may write the bucket may store others there, of which Pillow
hands some to other programs (EPS to Ghostscript)."""


@dataclass
class ImageBatch:
    """Rows of an images unit: decoded images beside their scalar columns, in order.

    `undecodable` counts the rows of this batch that are left out because they do not decode.
    """

    images: list[Any]
    rows: list[dict[str, Any]]
    undecodable: int


def kept_keys(storage: Storage, path: str) -> frozenset[str]:
    """Keys of the rows that a stage kept."""
    with storage.open_input(path) as file:
        return frozenset(pq.read_table(file, columns=["key"]).column("key").to_pylist())


def decode_image(data: bytes | None) -> Image.Image | None:
    """An RGB image, or None where the bytes are none that the download stage stores."""
    if not data:
        return None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return image.convert("RGB") if image.width * image.height <= MAX_PIXELS else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_images(
    storage: Storage,
    path: str,
    columns: list[str],
    batch_size: int,
    *,
    keys: Container[str] | None = None,
    decode: Callable[[bytes | None], Any] = decode_image,
    threads: int = 1,
) -> Iterator[ImageBatch]:
    """Decode an images file in batches of `batch_size` rows.

    Args:
        columns: scalar columns that come with the images; None where the file has no such column.
        keys: only the rows with these keys are decoded; None = all.
        decode: what is made of an image's bytes; None = it does not decode.
        threads: images decoded side by side.
    """
    wanted = list(dict.fromkeys(["key", *columns, "image"]))
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        storage.open_input(path) as source,
        pq.ParquetFile(source, pre_buffer=True) as file,
    ):
        there = [name for name in wanted if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = []
        for table in file.iter_batches(batch_size, columns=there):
            rows += [row for row in table.to_pylist() if keys is None or row["key"] in keys]
            while len(rows) >= batch_size:
                yield _decoded(rows[:batch_size], columns, decode, pool)
                rows = rows[batch_size:]
        if rows:
            yield _decoded(rows, columns, decode, pool)


def _decoded(
    rows: list[dict[str, Any]],
    columns: list[str],
    decode: Callable[[bytes | None], Any],
    pool: ThreadPoolExecutor,
) -> ImageBatch:
    batch: ImageBatch = ImageBatch([], [], 0)
    for row, image in zip(rows, pool.map(decode, [row["image"] for row in rows]), strict=True):
        if image is None:
            batch.undecodable += 1
        else:
            batch.images.append(image)
            batch.rows.append({name: row.get(name) for name in columns})
    return batch


def ahead(source: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, at most `depth` items ahead; its exceptions are raised here.

    The thread ends when the iterator does, or when the consumer stops early.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, item: Any) -> None:
        while not stopped.is_set():
            try:
                return items.put((kind, item), timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source():
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer, which raises it
            put("error", error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = items.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stopped.set()
        thread.join()
