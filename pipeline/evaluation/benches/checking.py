"""Everything that is wrong with a bench's folder: what it says, and every picture decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import StoreHiccup, UserError
from pipeline.evaluation.benches.bench import BoolMask
from pipeline.evaluation.benches.entries import ReferenceEntry
from pipeline.evaluation.benches.folder import Folder, many, read_mask, read_picture
from pipeline.evaluation.benches.folders import find_layout


@dataclass(frozen=True)
class Findings:
    """What was found; a bench without problems can be used."""

    summary: str
    notes: Sequence[str]
    problems: Sequence[str]
    seeds: int
    """Pictures per prompt that the bench's paper draws."""


def check(bench: str, layout: str = "auto") -> Findings:
    """Raises UserError where there is no folder of that layout, or the store is out of reach."""
    kind, folder = find_layout(bench, layout)
    entries = kind.read(folder)
    for entry in entries:
        _decode(folder, entry)
    known = {id(s) for entry in entries for s in entry.subjects if any(s.masks)}
    subjects = [subject for entry in entries for subject in entry.subjects]
    if len(known) < len(subjects):
        folder.notes.append(
            f"{len(subjects) - len(known)} of {many(len(subjects), 'subject')} have no mask, which "
            "ssr-mask and DINO-M need"
        )
    summary = f"{kind.layout} bench {folder.storage.url()}: {_numbers(entries)}"
    return Findings(summary, folder.notes, folder.problems, kind.usual_seeds)


def _numbers(entries: Sequence[ReferenceEntry]) -> str:
    subjects = [subject for entry in entries for subject in entry.subjects]
    counts = {
        "reference": len(entries),
        "picture": sum(len(entry.images) for entry in entries),
        "subject": len(subjects),
        "mask": sum(mask is not None for subject in subjects for mask in subject.masks),
        "prompt": sum(len(entry.requests) for entry in entries),
    }
    return ", ".join(many(count, noun) for noun, count in counts.items())


def _decode(folder: Folder, entry: ReferenceEntry) -> None:
    """Collect pictures and masks that cannot be read, or do not fit one another."""
    for place, path in enumerate(entry.images):
        size = None
        with _collecting(folder.problems):
            size = read_picture(folder.storage, path).size if path else None
        for mask in (s.masks[place] for s in entry.subjects if place < len(s.masks)):
            with _collecting(folder.problems):
                if mask is not None and not _central(read_mask(folder.storage, mask, size)).any():
                    folder.notes.append(
                        f"{mask}: the subject lies outside the picture's central square, which is "
                        "all that encoders see: ssr-mask will refuse it"
                    )


def _central(mask: BoolMask) -> BoolMask:
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return mask[top : top + side, left : left + side]


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except StoreHiccup:
        raise  # nothing of the bench's
    except UserError as error:
        problems.append(str(error))
