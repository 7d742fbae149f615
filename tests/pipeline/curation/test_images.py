import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.curation.images import ahead, decode_image, read_images
from pipeline.storage import Storage


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(ahead(lambda: iter(range(20)))) == list(range(20))
    assert list(ahead(lambda: iter(()))) == []
    assert threads() == []


def test_it_runs_ahead_but_not_far() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    items = ahead(source, depth=2)
    assert next(items) == 0
    # one taken, two waiting, one in the producer's hands
    assert len(made) <= 4
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 5 and threads() == []


def test_a_fault_in_the_thread_is_raised_where_the_items_are_used() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("torn")

    items = ahead(source)
    assert next(items) == 1
    with pytest.raises(OSError, match="torn"):
        next(items)
    assert threads() == []


def encoded(mode: str, format: str) -> bytes:
    data = io.BytesIO()
    pixels = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).convert(mode).save(data, format)
    return data.getvalue()


def test_every_image_becomes_rgb_and_the_rest_is_counted(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    good = [
        encoded("L", "png"),
        encoded("RGBA", "png"),
        encoded("P", "png"),
        encoded("RGB", "webp"),
    ]
    blobs = [*good[:2], b"<html>", good[0][:40], b"", None, *good[2:]]
    keys = [str(i) for i in range(len(blobs))]
    with storage.publish("images/a.parquet") as sink:
        pq.write_table(pa.table({"key": keys, "image": blobs, "other": keys}), sink)
    batches = list(read_images(storage, "images/a.parquet", ["key"], batch_size=3))
    assert [(len(batch.images), batch.undecodable) for batch in batches] == [(2, 1), (0, 3), (2, 0)]
    assert [row for batch in batches for row in batch.rows] == [{"key": key} for key in "0167"]
    for batch in batches:
        assert all(image.mode == "RGB" and image.size == (16, 16) for image in batch.images)


def test_only_the_keys_asked_for_are_decoded_in_full_batches(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    images = [encoded("RGB", "png")] * 10
    images[4] = b"never looked at"
    with storage.publish("images/a.parquet") as sink:
        pq.write_table(pa.table({"key": [f"k{i}" for i in range(10)], "image": images}), sink)
    seen: list[bytes | None] = []

    def decode(data: bytes | None) -> int:
        seen.append(data)
        return len(seen)

    wanted = {f"k{i}" for i in (0, 1, 3, 5, 8, 9)}
    batches = read_images(
        storage, "images/a.parquet", ["key", "predictor"], 4, keys=wanted, decode=decode, threads=3
    )
    rows = [batch.rows for batch in batches]
    assert [len(batch) for batch in rows] == [4, 2]
    assert [row["key"] for batch in rows for row in batch] == sorted(wanted)
    assert all(row["predictor"] is None for batch in rows for row in batch)
    assert len(seen) == 6 and b"never looked at" not in seen


def test_what_the_download_stage_does_not_store_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever may write the bucket may put anything there; of EPS Pillow would run Ghostscript."""
    assert decode_image(encoded("RGB", "png")) is not None
    for form in ("eps", "tiff", "bmp", "gif", "ppm"):
        assert decode_image(encoded("RGB", form)) is None
    monkeypatch.setattr("pipeline.curation.images.MAX_PIXELS", 16 * 16 - 1)
    assert decode_image(encoded("RGB", "png")) is None
