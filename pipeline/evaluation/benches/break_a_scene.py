"""Break-A-Scene's layout (github.com/google/break-a-scene, arXiv 2305.16311), and what it lacks.

    creature/img.jpg mask0.png mask1.png ...    theirs: one picture, one mask per subject
    scenes.json                                 ours: what the subjects are called, and prompts

Prompts name subjects as theirs do, "a photo of <asset0> at the beach": mask0.png's subject. Here
it is drawn as "a photo of a creature at the beach". docs/benches.md has an example.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pipeline.evaluation.benches.entries import ReferenceEntry, RequestEntry, SubjectEntry
from pipeline.evaluation.benches.folder import MAX_PROMPT, MAX_SUBJECTS, Folder, many, short
from pipeline.evaluation.benches.folder_bench import FolderBench
from pipeline.evaluation.benches.multi_subject import MAX_ASKED

VERSION = 1
_IMAGE = "img.jpg"
_ASSET = re.compile(r"<asset(\d+)>")
_MASK = re.compile(r"mask(\d+)\.png")


class BreakASceneBench(FolderBench):
    """One picture per scene, with a mask of every subject."""

    layout = "break-a-scene"
    description = "scenes.json"

    @classmethod
    def read(cls, folder: Folder) -> list[ReferenceEntry]:
        found = folder.read_json(cls.description)
        if folder.problems:
            return []
        fields = folder.fields(found, cls.description, ["version", "scenes"])
        folder.version(fields, cls.description, VERSION)
        scenes = fields.get("scenes", {})
        if not isinstance(scenes, dict) or ("scenes" in fields and not scenes):
            folder.wrong(cls.description, f"'scenes' is {short(scenes)}, not an object of scenes")
            return []
        files = _files(folder)
        for name in sorted(files.keys() - scenes.keys()):
            folder.notes.append(f"{name}/: is not in {cls.description}; left out")
        taken: set[str] = set()
        keys = {name: folder.key(name, cls.description, taken) for name in scenes}
        return [
            _scene(folder, key, scenes[name], files.get(name, []))
            for name, key in keys.items()
            if key is not None
        ]


def _files(folder: Folder) -> dict[str, list[str]]:
    """The pictures and masks of every folder that looks like a scene."""
    found: dict[str, list[str]] = {}
    for path in folder.sizes:
        name, _, file = path.partition("/")
        if file == _IMAGE or _MASK.fullmatch(file):
            found.setdefault(name, []).append(file)
    return found


def _scene(folder: Folder, key: str, value: Any, files: list[str]) -> ReferenceEntry:
    where = f"scene {key}"
    fields = folder.fields(value, where, ["subjects", "prompts"])
    image = folder.file(f"{key}/{_IMAGE}", where)
    listed = folder.items(fields, "subjects", where, MAX_SUBJECTS)
    subjects = [
        replace(entry, masks=(folder.file(f"{key}/mask{number}.png", f"{where}, {entry.name}"),))
        for number, (entry, _) in enumerate(folder.subjects(listed, where))
    ]
    for file in sorted(set(files) - {_IMAGE} - {f"mask{n}.png" for n in range(len(listed))}):
        folder.wrong(where, f"{file} is of none of its {many(len(listed), 'subject')}")
    requests = []
    for number, said in enumerate(folder.items(fields, "prompts", where)):
        here = f"{where}, prompt {number}"
        if prompt := folder.text(said, here, MAX_PROMPT):
            requests.append(_request(folder, prompt, subjects, here))
    return ReferenceEntry(key, (image,), tuple(subjects), tuple(requests))


def _request(folder: Folder, prompt: str, subjects: list[SubjectEntry], where: str) -> RequestEntry:
    """The prompt with the subjects' phrases in the places of their assets."""
    named = [int(number) for number in _ASSET.findall(prompt)]
    targets = tuple(dict.fromkeys(number for number in named if number < len(subjects)))
    for number in sorted({number for number in named if number >= len(subjects)}):
        folder.wrong(where, f"<asset{number}>: the scene has {len(subjects)} subjects, from 0")
    if not 1 <= len(set(named)) <= MAX_ASKED:
        folder.wrong(where, f"{short(prompt)} names no <asset0>, ..., or more than {MAX_ASKED}")

    def phrase(match: re.Match[str]) -> str:
        number = int(match[1])
        return subjects[number].phrase if number in targets else match[0]

    return RequestEntry(targets, _ASSET.sub(phrase, prompt))
