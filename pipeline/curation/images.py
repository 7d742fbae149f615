"""A unit's images, decoded in a thread while the model computes on the batch before."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow.parquet as pq
from PIL import Image

from pipeline.storage import Storage

T = TypeVar("T")


@dataclass
class ImageBatch:
    """Rows of an images unit: decoded RGB images beside their scalar columns, in order.

    `undecodable` counts the rows of this batch that are left out because they do not decode.
    """

    images: list[Image.Image]
    rows: list[dict[str, Any]]
    undecodable: int


def read_images(
    storage: Storage, path: str, columns: list[str], batch_size: int
) -> Iterator[ImageBatch]:
    """Decode an images file in batches of `batch_size` rows, with the scalar `columns` given."""
    with storage.open_input(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        for table in file.iter_batches(batch_size, columns=[*columns, "image"]):
            batch = ImageBatch([], [], 0)
            for row in table.to_pylist():
                image = _decode(row.pop("image"))
                if image is None:
                    batch.undecodable += 1
                else:
                    batch.images.append(image)
                    batch.rows.append(row)
            yield batch


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


def _decode(data: bytes | None) -> Image.Image | None:
    if not data:
        return None
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
