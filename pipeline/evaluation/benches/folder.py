"""A bench's folder, local or in an object store, read with suspicion: a bench may come from anyone.

Nothing raises at the first fault: all that is wrong is collected, so that a person can mend it in
one go (python -m pipeline.evaluation.benches FOLDER).
"""

from __future__ import annotations

import difflib
import functools
import io
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluation.benches.bench import BoolMask
from pipeline.evaluation.benches.entries import SubjectEntry
from pipeline.generation.references import fitted_mask, on_white, open_picture
from pipeline.storage import Storage

MAX_PICTURE_BYTES = 64 * 2**20
"""Largest file of a picture or mask that is read; its pixels are limited as everywhere."""
MAX_JSON_BYTES = 16 * 2**20
"""Largest description of a bench."""
MAX_NAME, MAX_PROMPT = 100, 1000
"""Longest key, name or phrase, and longest prompt, in characters."""
MAX_IMAGES = 20
"""Of a reference: they are in memory together."""
MAX_SUBJECTS = 26
"""Of a reference: results call them A, B, ..."""
MAX_PROBLEMS = 1000
_COMPARED = 2000  # files among which a missing one's nearest name is looked for
_KEY = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


class Folder:
    """The files of a bench, and what is wrong with them.

    `problems` keep the bench from being used; `notes` are worth knowing. Both are lines that begin
    with where.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.problems: list[str] = []
        self.notes: list[str] = []

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Every file under the folder and its bytes; folders behind symlinks are not entered."""
        return self.storage.sizes()

    def wrong(self, where: str, what: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{where}: {what}")
        elif len(self.problems) == MAX_PROBLEMS:
            self.problems.append(f"more than {MAX_PROBLEMS:,} things; the others are left out")

    def refuse(self) -> None:
        """Raise UserError where anything is wrong: the first thing, and where to see the others."""
        if self.problems:
            others = len(self.problems) - 1
            more = f"; {others} more:" if others else "; to check it:"
            raise UserError(
                f"bench {self.storage.url()}: {self.problems[0]}{more} "
                f"python -m pipeline.evaluation.benches {self.storage.url()}"
            )

    # --- files ---

    def file(self, path: object, where: str, most: int = MAX_PICTURE_BYTES) -> str | None:
        """The path of a file of the bench, if it is one that may be read."""
        fault = self._fault(path, most)
        if fault or not isinstance(path, str):
            self.wrong(where, f"{short(path)} {fault}")
            return None
        return path

    def _fault(self, path: object, most: int) -> str | None:
        if not isinstance(path, str) or not path:
            return "is not the name of a file"
        if not path.isprintable() or "\\" in path or {"", ".", ".."} & set(path.split("/")):
            return "is not a path inside of the bench's folder"
        size = self.sizes.get(path)
        if size is None:
            return f"is missing{self._near(path)}"
        if self.storage.local:
            root, target = self.storage.url(), self.storage.url(path)
            if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root)):
                return "is a link that leaves the bench's folder"
            if not Path(target).is_file():
                return "is not a file, or a link to none"
        if size > most:
            return f"has {size:,} bytes, more than {most:,} are not read"
        return None if size else "is empty"

    def _near(self, path: str) -> str:
        few = self.sizes if len(self.sizes) <= _COMPARED else []
        near = difflib.get_close_matches(path, few, n=1, cutoff=0.8)
        return f"; there is {short(near[0])}" if near else ""

    def read_text(self, path: str, most: int) -> str | None:
        """A description's text, UTF-8 with or without a byte order mark."""
        if self.file(path, "description", most) is None:
            return None
        try:
            return self.storage.read_bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.wrong(path, f"is not UTF-8 text ({error.reason} at byte {error.start})")
            return None

    def read_json(self, path: str) -> Any:
        """A description's JSON; None where there is none that could be read."""
        text = self.read_text(path, MAX_JSON_BYTES)
        try:
            return None if text is None else json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            self.wrong(path, f"is not JSON ({' '.join(str(error).split())[:120]})")
            return None

    # --- what descriptions say ---

    def fields(
        self, value: object, where: str, needed: Sequence[str], others: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A JSON object with the needed keys and no unknown ones; {} where it is no object."""
        if not isinstance(value, dict):
            self.wrong(where, f"is {short(value)}, not an object")
            return {}
        known = [*needed, *others]
        for key in [key for key in value if key not in known]:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            self.wrong(where, f"unknown key {short(key)}; {hint}")
        for key in needed:
            if key not in value:
                self.wrong(where, f"{key!r} is missing")
        return value

    def items(
        self, fields: dict[str, Any], key: str, where: str, most: int | None = None
    ) -> list[Any]:
        """The list under a key, which may not be empty: the first `most` of it; [] where it is
        missing or no list.
        """
        found = fields.get(key)
        if key in fields and (not isinstance(found, list) or not found):
            self.wrong(where, f"{key!r} is {short(found)}, not a list of one or more")
        if not isinstance(found, list):
            return []
        if most is not None and len(found) > most:
            self.wrong(where, f"{key!r} are {len(found):,}; {most} are the most")
        return found[:most]

    def version(self, fields: dict[str, Any], where: str, ours: int) -> None:
        found = fields.get("version")
        if "version" in fields and (found != ours or isinstance(found, bool)):
            self.wrong(where, f"version {short(found)} is not known; this program reads {ours}")

    def text(self, value: object, where: str, most: int = MAX_NAME) -> str | None:
        """A line of text, without white space around it."""
        text = value.strip() if isinstance(value, str) else ""
        if not text or not text.isprintable() or len(text) > most:
            self.wrong(where, f"{short(value)} is not one line of text, of 1 to {most} characters")
            return None
        return text

    def key(self, value: object, where: str, taken: set[str]) -> str | None:
        """A reference's key, unlike those that are taken; it becomes part of the names of files."""
        if not isinstance(value, str) or not _KEY.fullmatch(value):
            self.wrong(where, f"{short(value)} is no key; keys have letters, digits and . _ -")
            return None
        # some file systems take A.png and a.png for one
        if value.casefold() in taken:
            self.wrong(where, f"the key {short(value)} is there twice")
            return None
        taken.add(value.casefold())
        return value

    def subjects(
        self, listed: list[Any], where: str, masks: bool = False
    ) -> list[tuple[SubjectEntry, dict[str, Any]]]:
        """Subjects, each an object with "name" and perhaps "phrase", or a bare name: the entry,
        still without masks, and the object. `masks`: whether objects may have "masks" too.
        """
        known = ["phrase", "masks"] if masks else ["phrase"]
        found: list[tuple[SubjectEntry, dict[str, Any]]] = []
        for number, value in enumerate(listed):
            here = f"{where}, subject {number}"
            fields = {"name": value} if isinstance(value, str) else value
            said = self.fields(fields, here, ["name"], known)
            given = self.text(said["name"], here) if "name" in said else None
            name = given or f"subject {number}"
            if any(name == entry.name for entry, _ in found):
                self.wrong(here, f"{short(name)} is there twice; name what tells them apart")
            phrase = said.get("phrase", with_article(name))
            found.append((SubjectEntry(name, self.text(phrase, here) or name, ()), said))
        return found

    def unnamed(self, subjects: Iterable[SubjectEntry], prompt: str, where: str) -> None:
        """Note subjects that their prompt does not name."""
        for subject in subjects:
            if subject.name.casefold() not in prompt.casefold():
                self.notes.append(
                    f"{where}: {short(prompt)} does not say {short(subject.name)}, which methods "
                    "that learn a word put theirs in place of"
                )


def read_picture(storage: Storage, path: str) -> Image.Image:
    """RGB, upright. Raises UserError."""
    data = io.BytesIO(storage.read_bytes(path))
    return on_white(open_picture(storage.url(path), data))


def read_mask(storage: Storage, path: str, size: tuple[int, int] | None) -> BoolMask:
    """(h, w) of an image of `size` (w, h), None = of its own. Raises UserError."""
    url = storage.url(path)
    mask = open_picture(url, io.BytesIO(storage.read_bytes(path)))
    return fitted_mask(mask, size or mask.size, url)


def with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def short(value: object) -> str:
    """A value as a line can show it: a hostile one may be long or deep."""
    return "null" if value is None else _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


def many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, JSON would drop the first in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {short(key)} is there twice in one object")
    return found
