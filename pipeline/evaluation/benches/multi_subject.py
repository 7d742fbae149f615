"""The multi-subject layout, ours: any folder of pictures and masks with a bench.json.

docs/benches.md describes it, with an example.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.evaluation.benches.entries import ReferenceEntry, RequestEntry, SubjectEntry
from pipeline.evaluation.benches.folder import (
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SUBJECTS,
    Folder,
    many,
    short,
)
from pipeline.evaluation.benches.folder_bench import FolderBench

VERSION = 1
MAX_ASKED = 3
"""Subjects that one picture is asked to show."""


class MultiSubjectBench(FolderBench):
    """References of one or more subjects, masks where they are known; each sentence asks for one
    to three of them.
    """

    layout = "multi-subject"
    description = "bench.json"

    @classmethod
    def read(cls, folder: Folder) -> list[ReferenceEntry]:
        found = folder.read_json(cls.description)
        if folder.problems:
            return []
        fields = folder.fields(found, cls.description, ["version", "references"])
        folder.version(fields, cls.description, VERSION)
        taken: set[str] = set()
        listed = folder.items(fields, "references", cls.description)
        entries = (_reference(folder, value, n, taken) for n, value in enumerate(listed))
        return [entry for entry in entries if entry is not None]


def _reference(folder: Folder, value: Any, number: int, taken: set[str]) -> ReferenceEntry | None:
    where = f"{MultiSubjectBench.description}, reference {number}"
    fields = folder.fields(value, where, ["key", "images", "subjects", "requests"])
    key = folder.key(fields["key"], where, taken) if "key" in fields else None
    where = f"reference {key}" if key else where
    images = [
        folder.file(path, f"{where}, image {place}")
        for place, path in enumerate(folder.items(fields, "images", where, MAX_IMAGES))
    ]
    listed = folder.items(fields, "subjects", where, MAX_SUBJECTS)
    subjects = [
        _with_masks(folder, entry, said, len(images), where)
        for entry, said in folder.subjects(listed, where, masks=True)
    ]
    requests = [
        request
        for place, asked in enumerate(folder.items(fields, "requests", where))
        for request in _requests(folder, asked, subjects, f"{where}, request {place}")
    ]
    if key is None:
        return None
    return ReferenceEntry(key, tuple(images), tuple(subjects), tuple(requests))


def _with_masks(
    folder: Folder, entry: SubjectEntry, said: dict[str, Any], images: int, where: str
) -> SubjectEntry:
    """The subject with a mask, or None, for each image of its reference."""
    where = f"{where}, {entry.name}"
    masks = folder.items(said, "masks", where) or [None] * images
    if len(masks) != images:
        folder.wrong(
            where,
            f"{many(len(masks), 'mask')} for {many(images, 'image')}; null where none is known",
        )
    checked = (
        None if path is None else folder.file(path, f"{where}, mask {place}")
        for place, path in enumerate(masks)
    )
    return replace(entry, masks=tuple(checked))


def _requests(
    folder: Folder, value: Any, subjects: list[SubjectEntry], where: str
) -> list[RequestEntry]:
    """One per prompt."""
    fields = folder.fields(value, where, ["subjects", "prompts"])
    asked = folder.items(fields, "subjects", where)
    places = {subject.name: place for place, subject in enumerate(subjects)}
    for name in asked:
        if not isinstance(name, str) or name not in places:
            there = ", ".join(places) or "none"
            folder.wrong(where, f"there is no subject {short(name)}; the reference has: {there}")
    targets = [places[name] for name in asked if isinstance(name, str) and name in places]
    if len(asked) > MAX_ASKED or len(set(targets)) < len(targets):
        folder.wrong(where, f"asks for {short(asked)}; 1 to {MAX_ASKED} different ones are drawn")
    requests = []
    for number, said in enumerate(folder.items(fields, "prompts", where)):
        if prompt := folder.text(said, f"{where}, prompt {number}", MAX_PROMPT):
            folder.unnamed([subjects[target] for target in targets], prompt, where)
            requests.append(RequestEntry(tuple(targets), prompt))
    return requests
