"""Learned words in prompts: "a cup on snow" -> "a sks cup on snow"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.evaluation.benches import Outline

_ARTICLE = re.compile(r"\s*(?:an?|the)\s+", re.IGNORECASE)


def reworded(request: Outline, called: Sequence[str]) -> str:
    """The request's prompt with its subjects by what they are called, in their order.

    called: for each subject what stands for its name, without an article: "sks cup".

    Of each subject the phrase is looked for, from where the one before it ended, and where the
    prompt has none of it ("a red cup" is not "a cup") the name alone. Raises UserError where
    neither is there: the picture would not be of what was learned.
    """
    prompt, place = request.prompt, 0
    for subject, call in zip(request.subjects, called, strict=True):
        phrase = _whole(subject.phrase).search(prompt, place)
        found = phrase or _whole(subject.name).search(prompt, place)
        if found is None:
            raise UserError(
                f"{request.key}: the prompt {request.prompt!r} says neither {subject.phrase!r} nor "
                f"{subject.name!r} where that subject's turn is, so the word that is learned for "
                "it has no place; correct the bench's prompts"
            )
        new = renamed(found.group(), subject.name, call) if phrase else call
        before = _with_a(prompt[: found.start()], new)
        prompt, place = before + new + prompt[found.end() :], len(before) + len(new)
    return prompt


def renamed(phrase: str, name: str, call: str) -> str:
    """A phrase with `call` for the name in it, or, without the name, for all but its article."""
    places = list(_whole(name).finditer(phrase))
    if places:
        start, end = places[-1].span()
    else:
        article = _ARTICLE.match(phrase)
        start, end = article.end() if article else 0, len(phrase)
    return _with_a(phrase[:start], call) + call + phrase[end:]


def _whole(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def _with_a(before: str, after: str) -> str:
    """The text before a noun phrase, its article for a consonant where that begins with one."""
    if after[:1].lower() in tuple("aeiou"):
        return before
    return re.sub(r"(?<!\w)([aA])n(\s+)$", r"\1\2", before)
