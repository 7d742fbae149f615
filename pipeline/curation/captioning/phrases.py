"""Subjects of a caption: its noun phrases, by rules, without a tagger or a model.

Captions are short, plain and formulaic, so closed word lists are enough: a phrase opens at a
determiner, a number or a bare noun, and ends before a preposition, a verb or punctuation. What
follows a preposition of place is ground, not subject. The captioner's words are kept as they are.

Why no library: spaCy's and nltk's models are downloads of their own, not packages of the index
(what stands there under spaCy's names is by others), and a parser tells nouns from verbs, but not
a subject from the ground it stands on. The rules are measured on
tests/pipeline/curation/captioning/subjects.txt.
"""

from __future__ import annotations

import re

from pipeline.curation.captioning import vocabulary

RULES = 2
"""Number of these rules: another one makes captions anew."""

_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\s\w]")
# A hyphen that the tokenizer set apart: "close - up", "t - shirt".
_HYPHEN = re.compile(r"\b(close|t|pick|x) - (?=\w)", re.IGNORECASE)


def noun_phrases(caption: str) -> list[str]:
    """Subjects named by a caption, in its order, without repeats.

    Args:
        caption: one sentence, e.g. "a fish and a cup on sand".

    Returns:
        Noun phrases in the caption's own words, grounds left out: ["a fish", "a cup"]. Empty if
        no subject was found.
    """
    words = _WORD.findall(_HYPHEN.sub(r"\1-", caption.strip()))
    lower = [word.lower().replace("’", "'") for word in words]
    found: list[str] = []
    ground, i = False, 0
    while i < len(words):
        between = _between(lower, i, ground)
        if between is not None:
            i, ground = between
            continue
        end = _phrase_end(lower, i)
        head, follower = lower[end - 1], "".join(lower[end : end + 1])
        frame = _is_frame(lower, i, end)
        # "photos showing a man" frames the man, as "photos of a man" does
        shows = head in vocabulary.FRAMES and follower in vocabulary.SHOWING and not found
        if not frame and not shows and (not ground or _is_garment(head)):
            text = _joined(words[i:end])
            if _is_subject(lower[i:end]) and text not in found:
                found.append(text)
        i = end + 1 if frame else max(end, i + 1)
    return found


def _between(lower: list[str], i: int, ground: bool) -> tuple[int, bool] | None:
    """What stands between phrases at `i`: where it ends, and whether ground follows; None where a
    phrase begins.
    """
    before, word, follower = ["", *lower][i], lower[i], [*lower, ""][i + 1]
    if word == "with" and ground and before in vocabulary.FILLED:
        return i + 1, True
    if word in vocabulary.COMPANION:
        return i + 1, False
    if word in vocabulary.TO_COMPANIONS and follower == "to":
        return i + 2, False
    if word == "full" and follower == "of":  # "a basket full of apples": as with "with"
        return i + 2, ground
    if word == "by" and i > 1 and lower[i - 2] == "being":  # "being walked by a man"
        return i + 1, False
    if word == "to" and i + 2 < len(lower) and _is_infinitive(lower, i + 1):
        return i + 2, False
    if word == "that" and follower in vocabulary.VERBS | vocabulary.AUXILIARY:
        return i + 2, follower in vocabulary.SAYING  # "a sign that says hello"
    if word == "of" or _is_particle(lower, i):
        return i + 1, ground  # a phrase with "of" has taken it already: "in front of a house"
    if word in vocabulary.PLACE:
        return i + 1, True
    verb = _is_verb(lower, i)
    if verb and word in vocabulary.PLACE_VERBS:
        return i + 1, True
    if verb or _separates(word):
        # A verb's object is a subject again; after a comma or "and", a new determiner is.
        opens = follower in vocabulary.DETERMINERS - vocabulary.DEFINITE
        ends = opens or word == "." or (verb and word not in vocabulary.FILLED)
        return i + 1, (ground and not ends) or word in vocabulary.SAYING
    return None


def _is_garment(word: str) -> bool:
    return word in vocabulary.GARMENTS or word.removesuffix("s") in vocabulary.GARMENTS


def _separates(word: str) -> bool:
    return not word[0].isalnum() or word == "and" or word in vocabulary.AUXILIARY


def _is_verb(lower: list[str], i: int) -> bool:
    """Whether the word acts as a verb: it follows a noun (a leading one is an adjective)."""
    word = lower[i]
    if word in vocabulary.NOT_VERBS:
        return False
    leads = i == 0 or lower[i - 1] in vocabulary.DETERMINERS or _separates(lower[i - 1])
    if leads and not (i and lower[i - 1] in vocabulary.AUXILIARY):
        return False
    follower = lower[i + 1] if i + 1 < len(lower) else ""
    closed = not follower or follower in vocabulary.ENDS or _separates(follower)
    if word in vocabulary.STATES or word in vocabulary.PARTICIPLES:
        return closed  # "a horse drawn carriage"
    if word in vocabulary.VERBS:
        return _agrees(lower, i)
    if word.endswith("ing") and len(word) > 4:
        return f"{word} {follower}" not in vocabulary.COMPOUNDS
    # "a snow covered mountain" is one thing; "a mountain covered in snow" tells of one
    return (
        word.endswith("ed") and len(word) > 4 and closed and follower not in vocabulary.DETERMINERS
    )


def _agrees(lower: list[str], i: int) -> bool:
    """Whether the verb at `i` can follow its noun, which is one ("a") or many ("two")."""
    for word in reversed(lower[:i]):
        if word in vocabulary.ONE:
            return lower[i] not in vocabulary.BASE_VERBS
        if word in vocabulary.MANY:
            return not (lower[i].endswith("s") and lower[i][:-1] in vocabulary.BASE_VERBS)
        if word in vocabulary.ENDS or _separates(word):
            break
    return True


def _is_infinitive(lower: list[str], i: int) -> bool:
    """Whether the word after "to" is a verb with an object: "to pet a dog"."""
    return lower[i] not in vocabulary.DETERMINERS and lower[i + 1] in vocabulary.DETERMINERS


def _is_particle(lower: list[str], i: int) -> bool:
    """Whether "out" or "up" belongs to the verb before it, not to a place after it."""
    verb, follower = lower[i - 1] if i else "", lower[i + 1 : i + 2]
    if lower[i] == "out":
        return (
            verb.endswith("ing") and bool(follower) and follower[0] not in vocabulary.PLACE | {"of"}
        )
    return lower[i] == "up" and verb in vocabulary.LIFTING


def _phrase_end(lower: list[str], start: int) -> int:
    """Index after the phrase that starts at `start`."""
    i = start + 1
    while i < len(lower):
        word = lower[i]
        if word == "of" and i + 1 < len(lower) and not _is_frame(lower, start, i):
            if i - start == 1 and lower[start] in vocabulary.DETERMINERS:
                return i  # "some of", "two of"
            i = _phrase_end(lower, i + 1)  # "a cup of coffee", "a group of people"
            continue
        if word == "and" or word == ",":
            # "a black and white cat", "a big, brown dog": one phrase; "a fish and a cup": two.
            adjectives = vocabulary.COLOURS | vocabulary.SIZES
            if lower[i - 1] not in adjectives or not set(lower[i + 1 : i + 2]) & adjectives:
                return i
        elif (
            word in vocabulary.MANY | {"one"}
            and lower[start] in vocabulary.OWNING
            and i == start + 1
        ):
            pass  # "her two lambs"
        elif word == "up" and lower[i + 1 : i + 2] == ["of"]:
            pass  # "a close up of a flower": the preposition belongs to the frame
        elif (
            word in vocabulary.ENDS
            or _separates(word)
            or _is_verb(lower, i)
            or lower[i : i + 2] == ["full", "of"]
        ):
            break
        i += 1
    return i


def _is_frame(lower: list[str], start: int, end: int) -> bool:
    """Whether "<phrase> of" frames what comes after it: "a picture of ..."."""
    return end < len(lower) and lower[end] == "of" and lower[end - 1] in vocabulary.FRAMES


def _is_subject(lower: list[str]) -> bool:
    content = [word for word in lower if word not in vocabulary.DETERMINERS]
    if not content or content[-1] in vocabulary.EMPTY_PRONOUNS:
        return False
    return content[-1] not in vocabulary.EMPTY


def _joined(words: list[str]) -> str:
    return " ".join(words).replace(" ,", ",")
