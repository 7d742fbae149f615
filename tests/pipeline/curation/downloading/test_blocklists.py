"""Block lists: every kind, every spelling, both formats; little memory; broken ones are refused."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.curation.downloading import blocklists
from pipeline.curation.downloading.blocklists import BlockLists, identity
from pipeline.errors import UserError
from pipeline.storage import Storage


def md5(text: str) -> Any:
    return hashlib.md5(text.encode(), usedforsecurity=False)


def sha256(text: str) -> Any:
    return hashlib.sha256(text.encode())


def check(lists: BlockLists) -> None:
    """Lists with "a" by md5, "b" by sha256, and one url."""
    assert lists.digest("md5", md5("a").digest()) and not lists.digest("md5", md5("b").digest())
    assert lists.digest("sha256", sha256("b").digest())
    assert not lists.digest("sha256", sha256("a").digest())
    assert lists.url("HTTP://Host.example/X#part") and not lists.url("http://host.example/x")
    assert len(lists) == 3


def test_loading_takes_twice_what_is_kept_at_most() -> None:
    parts, rows = 40, 100_000
    listed = [
        np.random.default_rng(n // 2).integers(0, 1 << 63, rows).astype(np.uint64)
        for n in range(parts)
    ]  # each twice
    expected = np.unique(np.concatenate(listed))

    def entries() -> Iterator[tuple[str, np.ndarray]]:
        while listed:
            yield "md5", listed.pop().copy()

    tracemalloc.start()
    try:
        lists = BlockLists(entries())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(lists.marks["md5"], expected)
    assert held < 8.5 * len(expected) and peak < 17 * parts * rows


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "blocked.txt"
    url = "http://host.example/X"
    file.write_text(f"# ours\n{md5('a').hexdigest().upper()}\n\n {sha256('b').hexdigest()} \n{url}")
    check(BlockLists.load([str(file)]))


@pytest.mark.parametrize("binary", [False, True])
def test_parquet(tmp_path: Path, binary: bool) -> None:
    def shown(digest: Any) -> Any:
        return digest.digest() if binary else digest.hexdigest()

    table = pa.table(
        {
            "md5": [shown(md5("a")), None, shown(md5("a"))],
            "sha256": [None, shown(sha256("b")), None],
            "url": ["http://host.example/X", None, None],
            "why": ["x", "y", "z"],
        }
    )
    pq.write_table(table, tmp_path / "blocked")  # its name does not matter
    check(BlockLists.load([str(tmp_path / "blocked")]))


def test_several_lists_on_s3(tmp_path: Path, bucket: str) -> None:
    storage = Storage(bucket)
    storage.write_bytes("a.txt", md5("a").hexdigest().encode())
    (tmp_path / "b.txt").write_text(sha256("b").hexdigest() + "\nhttp://HOST.example/X\n")
    check(BlockLists.load([f"{bucket}/a.txt", str(tmp_path / "b.txt")]))


def test_lists_that_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocklists, "_BLOCK", 50)  # lines are cut anywhere
    names = [str(number) for number in range(300)]
    lines = [f(name).hexdigest() for name in names for f in (md5, sha256)]
    (tmp_path / "blocked.txt").write_text("\n".join(lines))
    lists = BlockLists.load([str(tmp_path / "blocked.txt")])
    assert len(lists) == 600
    assert all(lists.digest("md5", md5(name).digest()) for name in names)
    assert all(lists.digest("sha256", sha256(name).digest()) for name in names)


def test_ten_million_entries_take_eight_bytes_each() -> None:
    marks = np.random.default_rng(0).integers(0, 1 << 63, 10_000_000).astype(np.uint64)
    lists = BlockLists([("md5", marks)])
    assert lists.marks["md5"].nbytes <= 8 * len(marks)
    for mark in (marks[0], marks[-1], lists.marks["md5"][-1]):
        assert lists.digest("md5", int(mark).to_bytes(8, "big") + bytes(8))
    assert not lists.digest("md5", (int(lists.marks["md5"][-1]) + 1).to_bytes(8, "big") + bytes(8))


def test_none() -> None:
    lists = BlockLists.load([])
    assert len(lists) == 0 and not lists.url("http://a.b") and not lists.has("md5")


@pytest.mark.parametrize(
    ("text", "message"),
    [("deadbeef\n", "'deadbeef' is no md5, sha256 or url"), ("g" * 32, "md5 that is not hexa")],
)
def test_a_broken_line_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "blocked.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        BlockLists.load([str(tmp_path / "blocked.txt")])


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"hash": ["a"]}), tmp_path / "blocked")
    with pytest.raises(UserError, match="no column md5, sha256 or url"):
        BlockLists.load([str(tmp_path / "blocked")])
    pq.write_table(pa.table({"md5": ["abc"]}), tmp_path / "blocked")
    with pytest.raises(UserError, match="md5 that is not"):
        BlockLists.load([str(tmp_path / "blocked")])
    (tmp_path / "blocked").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="no readable Parquet"):
        BlockLists.load([str(tmp_path / "blocked")])
    with pytest.raises(UserError, match="nothing-here"):
        BlockLists.load([str(tmp_path / "nothing-here")])


def test_a_list_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for name, text in (("a", "http://x\n"), ("b", "http://x\n"), ("c", "http://y\n")):
        (tmp_path / name).write_text(text)
    held = [identity(str(tmp_path / name)) for name in "abc"]
    assert held[0] == held[1] == {"bytes": 9, "sha256": sha256("http://x\n").hexdigest()}
    assert held[2] != held[0]
