"""What a bench's files say, pictures still as paths: all of a bench that is kept in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pipeline.storage import Storage

_READERS = 8


@dataclass(frozen=True)
class SubjectEntry:
    """A subject of a reference."""

    name: str
    phrase: str
    masks: tuple[str | None, ...]
    """One path per image of the reference; None = not known."""


@dataclass(frozen=True)
class RequestEntry:
    """A sentence to draw, whatever the noise."""

    subjects: tuple[int, ...]
    """Indices into the reference's subjects, in the sentence's order."""
    prompt: str


@dataclass(frozen=True)
class ReferenceEntry:
    """A reference and all that is asked of it."""

    key: str
    images: tuple[str | None, ...]
    """None = it cannot be used, which is a problem of the folder."""
    subjects: tuple[SubjectEntry, ...]
    requests: tuple[RequestEntry, ...]

    def files(self) -> Iterator[str]:
        for paths in (self.images, *(subject.masks for subject in self.subjects)):
            yield from (path for path in paths if path is not None)


def content_hash(storage: Storage, entries: Sequence[ReferenceEntry]) -> str:
    """sha256 of all that the entries say and of the bytes of every file that they name.

    The same on a path and on s3://, and whatever the white space of the files they were read from.
    """
    files = sorted({path for entry in entries for path in entry.files()})
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(lambda path: _sha256(storage.read_bytes(path)), files)
        found = dict(zip(files, digests, strict=True))
    said = json.dumps([[asdict(entry) for entry in entries], found], sort_keys=True)
    return _sha256(said.encode())


def noise_seed(seed: int, key: str) -> int:
    """Seed of a request's noise, below 2**32: of its own name, so that it is the same whatever
    else is asked, and no two requests share a noise that happens to be lucky.
    """
    return int(_sha256(f"{seed} {key}".encode())[:8], 16)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
