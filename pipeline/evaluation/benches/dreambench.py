"""DreamBench in its published layout (github.com/google/dreambooth, arXiv 2208.12242).

    dataset/
        prompts_and_classes.txt     classes of the subjects, prompts for objects and for live ones
        backpack/00.jpg 01.jpg ...  pictures of one subject
        ...

30 subjects, 25 prompts each; the paper draws 4 pictures per prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from pipeline.evaluation.benches.entries import ReferenceEntry, RequestEntry, SubjectEntry
from pipeline.evaluation.benches.folder import MAX_IMAGES, MAX_PROMPT, Folder, many, short
from pipeline.evaluation.benches.folder_bench import FolderBench
from pipeline.storage import Storage

PUBLISHED_IMAGES = range(4, 7)
"""Pictures of a subject, by the dataset's README."""
PUBLISHED_SHA256 = "1bfb445443f5190d27f26729df77d353266f3fab030df3bfa2f9232f6cc8b7bb"
"""Of the published subjects, classes and prompts, as `_said` has them."""
LIVE = ("cat", "dog")
"""Classes that get the prompts for live subjects. The file does not say which subjects are live;
the dataset's README does: "9 out of these subjects are live subjects (dogs and cats)"."""
MAX_TEXT_BYTES = 64 * 2**10
"""Largest description, 16 times the published one: subjects and prompts multiply."""

_PICTURE = re.compile(r"\d+\.(jpe?g|png|webp)", re.IGNORECASE)
_PROMPT = re.compile(
    r"""(?P<quote>['"])(?P<text>.*)(?P=quote)"""
    r"""\.format\(\s*unique_token\s*,\s*class_token\s*\)\s*,?"""
)
_SUBJECT = "{0} {1}"  # the learned word and the class, in a prompt
_HEADINGS = {
    "classes": "classes",
    "prompts": "prompts",
    "object prompts": "object",
    "live subject prompts": "live",
}
_FURNITURE = ("subject_name,class", "prompt_list = [", "]")


class DreamBench(FolderBench):
    """One subject per reference, several pictures of it, no masks; every prompt asks for it.

    Prompts have the class in place of the learned word and the class: "a backpack in the jungle".
    """

    layout = "dreambench"
    description = "prompts_and_classes.txt"
    usual_seeds = 4

    def __init__(
        self, folder: Folder, references: int | None = None, seeds: int = 1, seed: int = 0
    ) -> None:
        super().__init__(folder, references, seeds, seed)
        if _is_published(self._entries):
            self.name, self.title = self.layout, f"DreamBench: {self.size}"
            whole = len(self.references()) == len(self._entries)
            self.published = whole and seeds == self.usual_seeds

    @classmethod
    def home(cls, storage: Storage) -> Storage | None:
        """The repository's folder and its dataset/ are both taken."""
        found = super().home(storage)
        return found or super().home(storage.sub("dataset"))

    @staticmethod
    def folder_name(storage: Storage) -> str:
        return storage.root.removesuffix("/dataset").rpartition("/")[2]

    @staticmethod
    def counts(entries: Sequence[ReferenceEntry]) -> str:
        each = sorted({len(entry.requests) for entry in entries})
        prompts = " or ".join(str(count) for count in each)
        return f"{many(len(entries), 'subject')}, {prompts} prompts each"

    @classmethod
    def read(cls, folder: Folder) -> list[ReferenceEntry]:
        text = folder.read_text(cls.description, MAX_TEXT_BYTES)
        if text is None:
            return []
        classes, prompts = _parse(folder, text)
        pictures = _pictures(folder)
        for name in sorted(pictures.keys() - classes.keys()):
            folder.notes.append(f"{name}/: is not among the classes; left out")
        entries = [
            ReferenceEntry(
                key=name,
                images=_usable(folder, name, pictures.get(name, [])),
                subjects=(SubjectEntry(kind, f"a {kind}", (None,) * len(pictures.get(name, []))),),
                requests=tuple(
                    RequestEntry((0,), prompt.replace(_SUBJECT, kind))
                    for prompt in prompts["live" if kind in LIVE else "object"]
                ),
            )
            for name, kind in classes.items()
        ]
        if not _is_published(entries):
            folder.notes.append(
                "subjects, prompts or numbers of pictures are not the published ones: figures of "
                "the paper will not stand beside"
            )
        return entries


def _parse(folder: Folder, text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Class by subject, and the prompts for objects and live subjects, as they stand.

    The lists are Python in the published file. They are matched, never evaluated.
    """
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    taken: set[str] = set()
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line, where = raw.strip(), f"{DreamBench.description}, line {number}"
        if line.lower() in _HEADINGS:
            section = _HEADINGS[line.lower()]
        elif not line or line in _FURNITURE:
            continue
        elif section == "classes":
            name, comma, kind = line.partition(",")
            key = folder.key(name, where, taken)
            words = folder.text(kind, where) if comma else None
            if not comma:
                folder.wrong(where, f"{short(line)} is not subject_name,class")
            if key and words:
                classes[key] = words
        elif section in prompts:
            if prompt := _prompt(folder, line, where):
                prompts[section].append(prompt)
        else:
            folder.wrong(where, f"{short(line)} stands under no heading that is known")
    if not classes:
        folder.wrong(DreamBench.description, "names no subject under the heading Classes")
    for kind, heading in (("object", "Object Prompts"), ("live", "Live Subject Prompts")):
        used = any((name in LIVE) == (kind == "live") for name in classes.values())
        if used and not prompts[kind]:
            folder.wrong(DreamBench.description, f"has no prompt under the heading {heading}")
    return classes, prompts


def _prompt(folder: Folder, line: str, where: str) -> str | None:
    match = _PROMPT.fullmatch(line)
    text = match["text"] if match else ""
    rest = text.replace(_SUBJECT, "", 1)
    if not match or rest == text or set("{}\\") & set(rest):
        folder.wrong(
            where,
            f"{short(line)} is not a prompt like 'a {_SUBJECT} in the snow'"
            ".format(unique_token, class_token)",
        )
        return None
    return folder.text(text, where, MAX_PROMPT)


def _pictures(folder: Folder) -> dict[str, list[str]]:
    """The numbered pictures of every folder, in their order."""
    found: dict[str, list[str]] = {}
    for path in folder.sizes:
        name, _, file = path.partition("/")
        if _PICTURE.fullmatch(file):
            found.setdefault(name, []).append(path)
    return found


def _usable(folder: Folder, name: str, pictures: Sequence[str]) -> tuple[str | None, ...]:
    if not pictures:
        folder.wrong(f"{name}/", "has no pictures; they are called 00.jpg, 01.jpg, ...")
    if len(pictures) > MAX_IMAGES:
        folder.wrong(f"{name}/", f"has {len(pictures):,} pictures; {MAX_IMAGES} are the most")
    return tuple(folder.file(path, f"{name}/") for path in pictures)


def _is_published(entries: Sequence[ReferenceEntry]) -> bool:
    """Whether these are the published subjects with as many pictures, classes and prompts."""
    said = [
        [entry.key, entry.subjects[0].name, [request.prompt for request in entry.requests]]
        for entry in entries
    ]
    digest = hashlib.sha256(json.dumps(sorted(said)).encode()).hexdigest()
    return digest == PUBLISHED_SHA256 and all(
        len(entry.images) in PUBLISHED_IMAGES for entry in entries
    )
