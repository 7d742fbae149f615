"""Which tars an input names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.curation.webdataset.tars import expanded, find
from pipeline.errors import UserError
from pipeline.storage import Storage

NAMES = ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar", "notes.txt", ".hidden/x.tar"]


@pytest.fixture(scope="module", params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    base = str(tmp_path_factory.mktemp("tars"))
    if request.param == "s3":
        base = f"{request.getfixturevalue('bucket')}/tars"
    for size, name in enumerate(NAMES, 1):
        Storage(base).write_bytes(name, b"x" * size)
    return base


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ([""], ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar"]),
        (["/a"], ["000.tar", "001.tar", "010.tar"]),
        (["/a/00*.tar"], ["000.tar", "001.tar"]),
        (["/*/000.tar"], ["a/000.tar", "b/000.tar"]),
        (["/*.tar", "/a/001.tar"], None),
        (["/a/{000..001}.tar"], ["000.tar", "001.tar"]),
        (["/{a,b}/000.tar", "/a"], ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar"]),
        (["/a/{000..002}.tar"], None),
        (["/none"], None),
    ],
)
def test_inputs(place: str, inputs: list[str], names: list[str] | None) -> None:
    given = [f"{place}{name}" for name in inputs]
    if names is None:
        with pytest.raises(UserError, match=r"no such tar|no tar there") as caught:
            find(given)
        assert "\n" not in str(caught.value)
        return
    found = find(given)
    assert [tar.name for tar in found] == names
    for tar in found:
        folder, name = tar.place()
        assert folder.size(name) == tar.size > 0


def test_braces() -> None:
    assert list(expanded("x-{8..11}.tar")) == [f"x-{n}.tar" for n in range(8, 12)]
    assert list(expanded("{08..10}{a,b}")) == ["08a", "08b", "09a", "09b", "10a", "10b"]
    assert list(expanded("s3://b/x.tar")) == ["s3://b/x.tar"]
    with pytest.raises(UserError, match="more than 1,000,000 tars"):
        find(["x-{0..99999999}.tar"])
    with pytest.raises(UserError, match="a range in braces that ends before it begins; turn it"):
        find(["x-{5..3}.tar"])
    with pytest.raises(UserError, match="too many braces; name a folder"):
        find(["{a,b}" * 2000])


def test_no_part_of_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz", ".c.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"b\.tar\.gz is compressed, .* name the others by a glob"):
        find([str(tmp_path)])
    assert [tar.name for tar in find([f"{tmp_path}/*.tar"])] == ["a.tar"]
