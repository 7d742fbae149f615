"""Which tars an input names: files, folders, globs, and ranges in braces, here or in a bucket."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import UserError
from pipeline.storage import Storage

_TAR = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MARKS = "*?["
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # tars that an input in braces may name
_MOST_BRACES = 100
_READERS = 16


@dataclass(frozen=True)
class Tar:
    """A tar, and what it is called wherever it lies."""

    url: str
    name: str
    """From the folder on that all tars of the run lie in."""
    size: int
    """Bytes."""

    def place(self) -> tuple[Storage, str]:
        """The folder that it lies in, and its name there."""
        return Storage.for_path(self.url)


def find(inputs: Sequence[str]) -> list[Tar]:
    """The tars that the inputs name, each once, by name.

    Raises:
        UserError: an input names none, or one that is not there.
    """
    sizes: dict[str, int] = {}
    for given in inputs:
        found = _named(given)
        if not found:
            raise UserError(
                f"webdataset.inputs {given}: no tar there; name tars, a folder or a glob of them"
            )
        sizes |= found
    folders = [url.split("/")[:-1] for url in sizes]
    shared = 0
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    tars = [Tar(url, "/".join(url.split("/")[shared:]), size) for url, size in sizes.items()]
    return sorted(tars, key=lambda tar: tar.name)


def _named(given: str) -> dict[str, int]:
    """URL -> bytes."""
    if given.count("{") > _MOST_BRACES:
        raise UserError(f"webdataset.inputs {given[:80]}...: too many braces; name a folder")
    paths = list(itertools.islice(expanded(given), _MOST + 1))
    if len(paths) > _MOST:
        raise UserError(f"webdataset.inputs {given}: more than {_MOST:,} tars; name a folder")
    if not paths:
        raise UserError(
            f"webdataset.inputs {given}: a range in braces that ends before it begins; turn it"
        )
    if len(paths) > 1:
        with ThreadPoolExecutor(_READERS) as pool:
            return {url: size for some in pool.map(_at, paths) for url, size in some.items()}
    return _at(paths[0])


def _at(path: str) -> dict[str, int]:
    """The tar, or the tars of the folder or glob, at one path."""
    parts = path.split("/")
    marked = next((i for i, part in enumerate(parts) if set(part) & set(_MARKS)), None)
    if marked is not None:
        folder = Storage("/".join(parts[:marked]) or "/")
        pattern = parts[marked:]
        return {
            folder.url(name): size
            for name, size in folder.sizes().items()
            if len(name.split("/")) == len(pattern) and PurePosixPath(name).match("/".join(pattern))
        }
    folder, name = Storage.for_path(path)
    if folder.is_file(name):
        return {folder.url(name): folder.size(name)}
    if name.endswith(_TAR):
        raise UserError(f"webdataset.inputs {folder.url(name)}: no such tar; see to the input")
    below = Storage(path)
    there = {
        name: size
        for name, size in below.sizes().items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    if packed := sorted(name for name in there if name.endswith(_PACKED)):
        raise UserError(
            f"webdataset.inputs {below.url()}: {packed[0]} is compressed, of which no part can be "
            "read alone; unpack such tars, or name the others by a glob"
        )
    return {below.url(name): size for name, size in there.items() if name.endswith(_TAR)}


def expanded(pattern: str) -> Iterator[str]:
    """What a pattern with {000..099} and {a,b} stands for; one without braces stands for itself."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for choice in _choices(found[1]):
        for rest in expanded(after):
            yield f"{before}{choice}{rest}"


def _choices(inner: str) -> Iterator[str]:
    if (ends := _RANGE.fullmatch(inner)) is None:
        yield from inner.split(",")
        return
    first, last = int(ends[1]), int(ends[2])
    width = len(ends[1]) if ends[1].startswith("0") else 0
    for number in range(first, last + 1):
        yield f"{number:0{width}d}"
