"""The samples of a tar: where the image of each lies, and its caption. Nothing is unpacked.

A tar is read as a stream of headers; a file of it is a span of bytes. What a tar says of itself is
hostile until checked: names leave no folder, since none is written; no more is read at once than a
header or a caption may have; a link or a device is no file.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.curation.folder.pairs import IMAGES, LONGEST_TEXT, one_line

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.S)
_LONGEST_NAME = 1024
_TEXTS = ("caption", "text")
_LONGEST = {"json": 1 << 20}
_MOST_AT_ONCE = 1 << 20  # of a header: names in PAX headers are the longest
_BLOCK = 4 << 20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bz2, xz, zstd
_FAULTS = (
    tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError, TypeError,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """An image in a tar: `bytes` bytes from `offset` on, and what is said of it."""

    member: str
    offset: int
    bytes: int
    caption: str
    """In one line; "" = none."""
    aesthetic: float | None
    predictor: str | None


@dataclass
class Found:
    """What a tar holds, and how many samples were left out, by reason (a rule) or cause (a fault).

    `damage` says what is wrong with the tar where it ends too early: what lies behind is not known.
    """

    samples: list[Sample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    damage: str = ""


@dataclass
class _Member:
    name: str
    offset: int
    size: int
    file: bool


@dataclass
class _Group:
    """Files of one name, one after the other."""

    key: str
    files: dict[str, _Member] = field(default_factory=dict)
    twice: bool = False


def read(
    source: Any, size: int, images: Sequence[str] = (), captions: Sequence[str] = ("txt", "json")
) -> Found:
    """The samples of a tar.

    A sample is left out for one of: bad_name (absolute, "..", no text, too long), duplicate_key,
    no_image, several_images, not_a_file (a link, a device), bad_caption (no text, no JSON, too
    long); or it fails as truncated_tar, where the tar ends in it.

    Args:
        source: the tar, with seek and read.
        size: its bytes.
        images: extensions of a sample's image, in order of preference; () = any image's, of which
            there must be one.
        captions: extensions of its caption, in order of preference.
    """
    file, found, seen = _Blocks(source, size), Found(), set[str]()
    group: _Group | None = None
    walk = _members(file)
    while True:
        try:
            member = next(walk, None)
        except _FAULTS as error:
            found.damage = " ".join(str(error).split())[:200] or type(error).__name__
            cut = _NAME.fullmatch(error.name) if isinstance(error, _Cut) else None
            if group is not None and cut is not None and cut[1] != group.key:
                _judge(group, seen, file, images, captions, found)  # it was whole
                group = None
            if group is not None or cut is not None:  # what else it would have had is not known
                found.failed["truncated_tar"] += 1
            return found
        parts = None if member is None else _NAME.fullmatch(member.name)
        if member is not None and parts is None:
            continue  # a folder, or a file that belongs to no sample
        key = parts[1] if parts else ""
        if group is not None and (parts is None or key != group.key):
            _judge(group, seen, file, images, captions, found)
            group = None
        if member is None or parts is None:
            return found
        group = group or _Group(key)
        ending = parts[2].lower()
        group.twice |= ending in group.files
        group.files.setdefault(ending, member)


class _Cut(tarfile.ReadError):
    """The tar ends in the member `name`."""

    def __init__(self, name: str) -> None:
        super().__init__("it ends in the middle of a file")
        self.name = name


def _members(file: _Blocks) -> Iterator[_Member]:
    """Every member that is no folder. Raises tarfile's errors, and some of Python's, for damage."""
    if file.read(6).startswith(_COMPRESSED):
        raise tarfile.ReadError("it is compressed, and images are already: unpack it")
    file.seek(0)
    tar = tarfile.TarFile(fileobj=file, mode="r", errors="surrogateescape")  # type: ignore[arg-type]
    last = -1
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it remembers all of them
        if info.offset_data <= last or info.size < 0:
            raise tarfile.ReadError("a member lies before the one before it")
        last = info.offset_data
        if info.isdir():
            continue
        whole = info.isreg() and not info.issparse()
        name = info.name.removeprefix("./")
        if whole and info.offset_data + info.size > file.size:
            raise _Cut(name)
        yield _Member(name, info.offset_data, info.size if whole else 0, whole)
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes what it does not know for the end
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if file.size < tar.offset:
        raise tarfile.ReadError("it ends early")


def _judge(
    group: _Group,
    seen: set[str],
    file: _Blocks,
    images: Sequence[str],
    captions: Sequence[str],
    found: Found,
) -> None:
    image, reason = _image(group, images)
    if not _sound(group.key):
        reason = "bad_name"
    elif group.key in seen or group.twice:
        reason = "duplicate_key"
    seen.add(group.key)
    if image is None or reason:
        found.dropped[reason] += 1
        return
    try:
        caption, said = _told(group, file, captions)
    except (ValueError, RecursionError):
        found.dropped["bad_caption"] += 1
        return
    predictor = said.get("predictor")
    found.samples.append(
        Sample(
            image.name,
            image.offset,
            image.size,
            caption,
            _number(said.get("aesthetic")),
            predictor if isinstance(predictor, str) and len(predictor) < _LONGEST_NAME else None,
        )
    )


def _image(group: _Group, images: Sequence[str]) -> tuple[_Member | None, str]:
    """The sample's image, or the reason why there is none."""
    if images:
        there = [group.files[ending] for ending in images if ending in group.files][:1]
    else:
        there = [m for e, m in group.files.items() if f".{e.rpartition('.')[2]}" in IMAGES]
    if not there:
        return None, "no_image"
    if len(there) > 1:
        return None, "several_images"
    return (there[0], "") if there[0].file else (None, "not_a_file")


def _told(group: _Group, file: _Blocks, captions: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The caption, and what the sample's JSON says. ValueError for what is neither."""
    said: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for ending in dict.fromkeys([*captions, "json"]):
        member = group.files.get(ending)
        if member is None or not member.file:
            continue
        if member.size > _LONGEST.get(ending, LONGEST_TEXT):
            raise ValueError("too long")
        file.seek(member.offset)
        text = file.read(member.size).decode("utf-8-sig")
        if ending == "json":
            read = json.loads(text)
            said = read if isinstance(read, dict) else {}
            text = next((said[name] for name in _TEXTS if isinstance(said.get(name), str)), "")
        texts[ending] = one_line(text)
    caption = next((texts[ending] for ending in captions if texts.get(ending)), "")
    for text in (caption, str(said.get("predictor"))):
        text.encode()  # JSON may hold half of a surrogate pair
    return caption, said


def _sound(key: str) -> bool:
    try:
        short = len(key.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False
    return short and key.isprintable() and key[0] != "/" and ".." not in key.split("/")


def _number(said: Any) -> float | None:
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        return None
    try:
        number = float(said)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


class _Blocks(io.RawIOBase):
    """A tar for tarfile: fetched in large blocks, as headers lie side by side with small files, and
    read a little at a time: a header that asks for more is none.
    """

    def __init__(self, source: Any, size: int) -> None:
        self._source, self.size = source, size
        self._at = self._start = 0
        self._block = b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < 0:
            raise tarfile.ReadError("a header leads out of the tar")
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def read(self, wanted: int | None = -1) -> bytes:
        if wanted is None or not 0 <= wanted <= _MOST_AT_ONCE:
            raise tarfile.ReadError("a header of more than a mebibyte")
        end = min(self._at + wanted, self.size)
        if self._at >= end:
            return b""
        if not self._start <= self._at <= end <= self._start + len(self._block):
            self._source.seek(self._at)
            self._start = self._at
            self._block = bytes(self._source.read(min(_BLOCK, self.size - self._at)))
        data = self._block[self._at - self._start : end - self._start]
        self._at += len(data)
        return data
