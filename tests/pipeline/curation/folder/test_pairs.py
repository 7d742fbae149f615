"""What a folder holds: which images, whose captions, and the line of what cannot be read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.curation.folder.pairs import pairs
from pipeline.errors import UserError
from pipeline.storage import Storage


def put(folder: Path, files: dict[str, str | bytes]) -> Storage:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return Storage(folder)


def told(folder: Storage) -> dict[str, str]:
    return {pair.path: pair.caption for pair in pairs(folder)}


def test_captions_beside_the_images(tmp_path: Path) -> None:
    files = {
        "a.jpg": "x", "a.txt": "\ufeffa  red\nfish \n", "b.PNG": "xx", "b.txt": "",
        "dogs/rex [1].webp": "xxx", "dogs/rex [1].txt": "ein Hund, süß", "dogs/lone.txt": "",
        "notes.pdf": "x", ".cache/c.jpg": "x", "._a.jpg": "x",
    }  # fmt: skip
    found = pairs(put(tmp_path, files))
    assert [(pair.path, pair.size, pair.caption) for pair in found] == [
        ("a.jpg", 1, "a red fish"),
        ("b.PNG", 2, ""),
        ("dogs/rex [1].webp", 3, "ein Hund, süß"),
    ]


def test_metadata_as_the_hub_has_it(tmp_path: Path) -> None:
    """A file of metadata speaks of what lies beside and below it, and before .txt files."""
    rows = [{"file_name": "a.jpg", "text": "a fish"}, {"file_name": "in/b.jpg", "caption": "a cup"}]
    files = {
        "train/a.jpg": "x", "train/in/b.jpg": "x", "c.jpg": "x", "train/a.txt": "not this",
        "train/metadata.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "metadata.csv": 'text,file_name,more\n"a tree, green\nand tall",./c.jpg,1\n',
    }  # fmt: skip
    assert told(put(tmp_path, files)) == {
        "c.jpg": "a tree, green and tall", "train/a.jpg": "a fish", "train/in/b.jpg": "a cup",
    }  # fmt: skip


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_beside_or_elsewhere(tmp_path: Path, kind: str, bucket: str) -> None:
    """The one that is named goes before the one in the folder, and that before a .txt."""

    def table(rows: list[dict[str, str]]) -> bytes:
        if kind == "parquet":
            return parquet(rows)
        if kind == "jsonl":
            return "\n".join(map(json.dumps, rows)).encode()
        lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
        return "\n".join(lines).encode()

    beside = [{"file_name": "a.jpg", "text": "a fish"}, {"file_name": "b.jpg", "text": "a cup"}]
    folder = put(
        tmp_path / "photos",
        {
            "in/a.jpg": "x", "in/b.jpg": "x", "in/c.jpg": "x", "in/a.txt": "no",
            "in/c.txt": "a key",
            f"in/metadata.{kind}": table(beside),
        },
    )  # fmt: skip
    assert told(folder) == {"in/a.jpg": "a fish", "in/b.jpg": "a cup", "in/c.jpg": "a key"}
    named = Storage(bucket)
    named.write_bytes(f"told.{kind}", table([{"file_name": "in/b.jpg", "text": "a tree"}]))
    found = pairs(folder, named.url(f"told.{kind}"))
    assert [pair.caption for pair in found] == ["a fish", "a tree", "a key"]
    named.write_bytes(f"told.{kind}", table([{"file_name": "../b.jpg", "text": "a tree"}]))
    with pytest.raises(UserError, match=rf"told\.{kind}, .* there is no image \.\./b\.jpg in"):
        pairs(folder, named.url(f"told.{kind}"))
    with pytest.raises(UserError, match=r"name a \.jsonl, \.csv or \.parquet file"):
        pairs(folder, named.url("told.xlsx"))


def test_on_an_object_store(tmp_path: Path, bucket: str) -> None:
    away = Storage(f"{bucket}/photos")
    put(tmp_path, {"a.jpg": "x", "a.txt": "a fish", "in/b.png": "x"})
    away.upload_tree(tmp_path, "")
    assert told(away) == {"a.jpg": "a fish", "in/b.png": ""}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a.txt": "x"}, "there is no image (avif, bmp, gif, jpeg, jpg, png, webp); name another"),
        ({"a.txt": b"\xff\xfe\x00"}, "a.txt is not UTF-8 text; save it as that"),
        ({"a.txt": "long " * 20_000}, "a.txt has 100,000 bytes, which is no caption"),
        ({"metadata.jsonl": "{}\n"}, "metadata.jsonl, line 1 has no file_name; each line needs"),
        ({"metadata.jsonl": '{"file_name": "a.jpg"}'}, "metadata.jsonl, line 1 has no text;"),
        ({"metadata.jsonl": "\nhello"}, "metadata.jsonl, line 2 is not a JSON object with"),
        ({"metadata.csv": "file_name;text\na.jpg;x"}, "metadata.csv, line 2 has no file_name"),
        (
            {"metadata.csv": f"file_name,text\na.jpg,{'x' * 200_000}"},
            "metadata.csv, after line 1: the CSV cannot be read (field larger than field limit",
        ),
        (
            {"metadata.jsonl": '{"file_name": "a.jpg", "text": "\\ud800"}'},
            "line 1: the text is not Unicode ('\\ud800'); mend it",
        ),
        (
            {"metadata.jsonl": f'{{"file_name": "a.jpg", "text": "{"x" * 70_000}"}}'},
            "line 1: a text of 70,000 bytes, which is no caption; shorten it",
        ),
        ({"metadata.parquet": "PAR1"}, "metadata.parquet is not Parquet"),
        (
            {"metadata.parquet": parquet([{"name": "x"}])},
            "metadata.parquet, row 1 has no file_name",
        ),
        (
            {"metadata.csv": "file_name,text\n../a.jpg,x"},
            "line 2: there is no image ../a.jpg in",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, files: dict[str, str | bytes], line: str
) -> None:
    image: dict[str, str | bytes] = {} if "no image (" in line else {"a.jpg": "x"}
    with pytest.raises(UserError) as caught:
        pairs(put(tmp_path, {**image, **files}))
    assert line in str(caught.value) and "\n" not in str(caught.value)
