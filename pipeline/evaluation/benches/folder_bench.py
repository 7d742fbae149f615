"""What benches read from folders have in common, whatever their layout."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pipeline.errors import UserError
from pipeline.evaluation.benches.bench import (
    BenchSubject,
    BoolMask,
    Outline,
    Reference,
    Request,
    Selection,
    SubjectName,
)
from pipeline.evaluation.benches.entries import (
    ReferenceEntry,
    RequestEntry,
    content_hash,
    noise_seed,
)
from pipeline.evaluation.benches.folder import Folder, many, read_mask, read_picture
from pipeline.storage import Storage


class FolderBench:
    """A bench in a folder (a Bench); its pictures are read when they are asked for.

    A request's key is <reference>-<number of its prompt>-<number of its noise>, both from 0. Keys
    and noise do not depend on how many references and seeds are taken. The place of a request does
    depend on the seeds, and units of work are spans of places: so the seeds are among the settings.

    Args:
        folder: where it lies, its `home`.
        references: how many are taken, the first ones; None = all.
        seeds: pictures per prompt.
        seed: what all noise is drawn from.

    Raises:
        UserError: anything is missing or wrong, or there are fewer references than are asked for.
    """

    layout: ClassVar[str]
    """Its name in settings."""
    description: ClassVar[str]
    """The file that makes a folder a bench of this layout."""
    usual_seeds: ClassVar[int] = 1
    """Pictures per prompt, where the bench's paper says it."""
    published = False

    def __init__(
        self, folder: Folder, references: int | None = None, seeds: int = 1, seed: int = 0
    ) -> None:
        entries = self.read(folder)
        folder.refuse()
        if references is not None and not 1 <= references <= len(entries):
            raise UserError(
                f"references: {references} of the {len(entries)} of {folder.storage.url()}; "
                "ask for as many at most, or for none to take all"
            )
        self._storage, self._seed = folder.storage, seed
        self._entries, self._seeds = entries, seeds
        self._taken = taken = entries[:references]
        counts = [len(entry.requests) * seeds for entry in taken]
        self._firsts = [0, *itertools.accumulate(counts)]
        self._last: tuple[int, Reference] | None = None
        self.settings: dict[str, Any] = {
            "layout": self.layout,
            "seeds": seeds,
            "seed": seed,
            "sha256": content_hash(folder.storage, entries),
        }
        self.name = f"{self.layout}-{_plain(self.folder_name(folder.storage))}"
        self.size = f"{self.counts(taken)}, {many(seeds, 'seed')}"
        self.title = f"{self.folder_name(folder.storage)}: {self.size}"

    @classmethod
    def home(cls, storage: Storage) -> Storage | None:
        """The folder with the description, of a folder that a user names; None = it has none."""
        return storage if storage.is_file(cls.description) else None

    @classmethod
    def read(cls, folder: Folder) -> list[ReferenceEntry]:
        """All that the folder's description says; what is wrong goes to the folder's problems."""
        raise NotImplementedError

    @staticmethod
    def folder_name(storage: Storage) -> str:
        """What people call the bench in that home."""
        return storage.root.rpartition("/")[2]

    @staticmethod
    def counts(entries: Sequence[ReferenceEntry]) -> str:
        prompts = sum(len(entry.requests) for entry in entries)
        return f"{many(len(entries), 'reference')}, {many(prompts, 'prompt')}"

    def __len__(self) -> int:
        return self._firsts[-1]

    def references(self) -> Sequence[tuple[int, int]]:
        return list(itertools.pairwise(self._firsts))

    def outlines(self) -> list[Outline]:
        found = []
        for index in range(len(self)):
            place, asked, key, _ = self._asked(index)
            entries = [self._entries[place].subjects[target] for target in asked.subjects]
            subjects = tuple(SubjectName(entry.name, entry.phrase) for entry in entries)
            masked = all(entry.masks[0] is not None for entry in entries)
            seed = noise_seed(self._seed, key)
            found.append(Outline(key, asked.prompt, seed, subjects, masked))
        return found

    def masks(self) -> Iterator[tuple[str, BoolMask]]:
        for entry in self._taken:
            for target in sorted({target for asked in entry.requests for target in asked.subjects}):
                subject = entry.subjects[target]
                if (path := subject.masks[0]) is not None:
                    yield f"{entry.key}, {subject.name}", read_mask(self._storage, path, None)

    def requests(self, start: int, stop: int) -> list[Request]:
        found = []
        for index in range(start, min(stop, len(self))):
            place, asked, key, about = self._asked(index)
            reference = self._reference(place)
            selections = tuple(Selection(reference, target) for target in asked.subjects)
            seed = noise_seed(self._seed, key)
            found.append(Request(key, selections, asked.prompt, seed, about))
        return found

    def _asked(self, index: int) -> tuple[int, RequestEntry, str, dict[str, Any]]:
        """Of a request: the place of its reference, what is asked of that, its key, `about`."""
        place = bisect.bisect_right(self._firsts, index) - 1
        entry = self._entries[place]
        prompt, noise = divmod(index - self._firsts[place], self._seeds)
        asked = entry.requests[prompt]
        about = {
            "asked": "".join(chr(ord("A") + target) for target in asked.subjects),
            "prompt_number": prompt,
            "seed_number": noise,
        }
        return place, asked, f"{entry.key}-{prompt:02d}-{noise}", about

    def _reference(self, place: int) -> Reference:
        """Of the last one the pictures are kept: its requests follow one another."""
        if self._last is None or self._last[0] != place:
            self._last = place, _read(self._storage, self._entries[place])
        return self._last[1]

    def __getstate__(self) -> dict[str, Any]:
        """What workers are sent: no pictures."""
        return {**self.__dict__, "_last": None}


def _read(storage: Storage, entry: ReferenceEntry) -> Reference:
    images = tuple(read_picture(storage, path) for path in entry.images if path)
    subjects = tuple(
        BenchSubject(
            subject.name,
            subject.phrase,
            tuple(
                None if path is None else read_mask(storage, path, image.size)
                for path, image in zip(subject.masks, images, strict=True)
            ),
        )
        for subject in entry.subjects
    )
    return Reference(entry.key, images, subjects)


def _plain(name: str) -> str:
    """A folder's name as part of another's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60] or "bench"
