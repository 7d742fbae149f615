"""A lint is one small function from documents to findings, with the rule it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from infra.checks.render import Document


@dataclass(frozen=True)
class Finding:
    """`wrong` at `path` of `subject` (Kind/name), and what to `do`."""

    subject: str
    path: str
    wrong: str
    do: str
    lint: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.path}: {self.wrong}; {self.do} [{self.lint}]"


Check = Callable[[list[Document]], Iterator[Finding]]


@dataclass(frozen=True)
class Lint:
    """`text` says the rule; `check` finds what breaks it."""

    name: str
    theme: str
    text: str
    check: Check

    def __call__(self, documents: list[Document]) -> list[Finding]:
        return [replace(finding, lint=self.name) for finding in self.check(documents)]


def lint(theme: str, text: str) -> Callable[[Check], Lint]:
    """Make a lint of a function; its name, with dashes, is the lint's."""

    def wrap(check: Check) -> Lint:
        return Lint(check.__name__.replace("_", "-"), theme, text, check)

    return wrap


def subject(document: Document) -> str:
    """Kind/name of `document`."""
    metadata = document.get("metadata") or {}
    return f"{document.get('kind', '?')}/{metadata.get('name', '?')}"
