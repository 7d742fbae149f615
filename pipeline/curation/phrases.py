"""Subjects of a caption: its noun phrases, by rules, without a tagger or a model.

Captions are short, plain and formulaic, so closed word lists are enough: a phrase opens at a
determiner, a number or a bare noun, and ends before a preposition, a verb or punctuation. What
follows a preposition of place is ground, not subject. The captioner's words are kept as they are.
"""

from __future__ import annotations

import re

RULES = 1
"""Number of these rules: another one makes captions anew."""

_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\s\w]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a phrase may open with. "the" opens one too, but after a ground it stays ground.
_DETERMINERS = _words(
    "a an the one two three four five six seven eight nine ten some several many few both this "
    "that these those his her its their my your our another each every various"
)
_DEFINITE = _words("the its their this that these those")
# After these stands where it is, not what it is.
_PLACE = _words(
    "on in at inside into onto upon under underneath below beneath above over across along around "
    "through against near by behind before beyond between among amid from off outside within "
    "during after toward towards to up down out until via past for as about like"
)
# After these stands another subject, even where the words before told of a ground.
_COMPANION = _words("with beside besides alongside holding wearing carrying riding")
_TO_COMPANIONS = frozenset(["next", "close", "adjacent"])  # "next to", "close to"
# No phrase goes on over these.
_ENDS = _PLACE | _COMPANION | _TO_COMPANIONS | _DETERMINERS | {"of"}
_GARMENTS = _words(
    "dress shirt suit hat coat jacket skirt uniform costume sweater gown kimono helmet robe "
    "bikini scarf tie cap hoodie armor tuxedo"
)
_AUXILIARY = _words(
    "is are was were be been being am has have had having does do did can could will would may "
    "might must shall should there here it he she they we i you who whom whose which what where "
    "when while that's it's there's not no and/or if because so then than but or nor"
)
_VERBS = _words(
    "sits sit sat stands stand stood lies lie lay lays walks walk runs run plays play holds hold "
    "held wears wear wore rides ride looks look eats eat drinks drink flies fly jumps jump swims "
    "swim hangs hang hung shows show showed shown smiles smile poses pose reads read rests rest "
    "sleeps sleep leans lean floats float grows grow grown features feature contains contain says "
    "say reading made seen taken drawn worn written built lit set left covers covered makes make "
    "uses use goes go going comes come gets get takes take talks talk waits wait watches watch "
    "overlooking facing surrounded parked filled decorated dressed"
)
# Nouns in -ing and -ed, which are not verbs where they follow a noun or an adjective.
_NOT_VERBS = _words(
    "building painting drawing ceiling ring earring string king wing spring morning evening "
    "clothing awning pudding wedding sling swing railing siding icing dumpling duckling sibling "
    "offspring lightning engraving carving rendering bed shed seed weed sled reed feed speed breed "
    "red"
)
_COLOURS = _words(
    "black white red green blue yellow orange purple pink brown gray grey gold golden silver beige "
    "tan cyan teal magenta violet turquoise maroon navy cream dark light"
)
_SIZES = _words("big large huge small little tiny tall long short old young new round")
# "a picture of a cat" is about the cat.
_FRAMES = _words(
    "picture photo photograph image painting drawing illustration sketch view portrait shot "
    "close-up closeup close-ups up rendering screenshot collage depiction pictures photos "
    "photographs images paintings drawings illustrations sketches views portraits shots"
)
# Never the last word of a subject: what is left when the noun was cut off.
_NOUNS_TOO = _words("orange cream light gold silver violet")
_EMPTY = (
    (_COLOURS - _NOUNS_TOO)
    | _SIZES
    | _words("very other same front top back side middle background")
)
_EMPTY_PRONOUNS = _words("him her them something someone everything it this that")


def noun_phrases(caption: str) -> list[str]:
    """Subjects named by a caption, in its order, without repeats.

    Args:
        caption: one sentence, e.g. "a fish and a cup on sand".

    Returns:
        Noun phrases in the caption's own words, grounds left out: ["a fish", "a cup"]. Empty if
        no subject was found.
    """
    words = _WORD.findall(caption.strip())
    lower = [word.lower().replace("’", "'") for word in words]
    found: list[str] = []
    ground, i = False, 0
    while i < len(words):
        word = lower[i]
        if word in _COMPANION or (word in _TO_COMPANIONS and lower[i + 1 : i + 2] == ["to"]):
            ground, i = False, i + (1 if word in _COMPANION else 2)
        elif word == "of":  # a phrase that takes "of" has taken it already: "in front of a house"
            i += 1
        elif word in _PLACE:
            ground, i = True, i + 1
        elif _separates(word) or _is_verb(lower, i):
            # A verb's object is a subject again; after a comma or "and", a new determiner is.
            opens = bool(set(lower[i + 1 : i + 2]) & (_DETERMINERS - _DEFINITE))
            ground = ground and not (opens or word == "." or _is_verb(lower, i))
            i += 1
        else:
            end = _phrase_end(lower, i)
            phrase, head = words[i:end], lower[end - 1]
            if _is_frame(lower, i, end):
                end += 1
            elif not (ground and head not in _GARMENTS) and _is_subject(lower[i:end]):
                text = _joined(phrase)
                if text not in found:
                    found.append(text)
            i = max(end, i + 1)
    return found


def _separates(word: str) -> bool:
    return not word[0].isalnum() or word == "and" or word in _AUXILIARY


def _is_verb(lower: list[str], i: int) -> bool:
    """Whether the word acts as a verb: it follows a noun (a leading one is an adjective)."""
    word = lower[i]
    if word in _NOT_VERBS:
        return False
    leads = i == 0 or lower[i - 1] in _DETERMINERS or _separates(lower[i - 1])
    after_auxiliary = i > 0 and lower[i - 1] in _AUXILIARY
    if word in _VERBS:
        return not leads or after_auxiliary
    if word.endswith("ing") and len(word) > 4:
        return not leads or after_auxiliary
    follower = lower[i + 1] if i + 1 < len(lower) else ""
    participle = word.endswith("ed") and len(word) > 4 and follower in _PLACE | {"with", "by"}
    return participle and (not leads or after_auxiliary)


def _phrase_end(lower: list[str], start: int) -> int:
    """Index after the phrase that starts at `start`."""
    i = start + 1
    while i < len(lower):
        word = lower[i]
        if word == "of" and i + 1 < len(lower) and not _is_frame(lower, start, i):
            if i - start == 1 and lower[start] in _DETERMINERS:
                return i  # "some of", "two of"
            i = _phrase_end(lower, i + 1)  # "a cup of coffee", "a group of people"
            continue
        if word == "and" or word == ",":
            # "a black and white cat", "a big, brown dog": one phrase; "a fish and a cup": two.
            adjectives = _COLOURS | _SIZES
            if lower[i - 1] not in adjectives or not set(lower[i + 1 : i + 2]) & adjectives:
                return i
        elif word == "up" and lower[i + 1 : i + 2] == ["of"]:
            pass  # "a close up of a flower": the preposition belongs to the frame
        elif word in _ENDS or _separates(word) or _is_verb(lower, i):
            return i
        i += 1
    return i


def _is_frame(lower: list[str], start: int, end: int) -> bool:
    """Whether "<phrase> of" frames what comes after it: "a picture of ..."."""
    return end < len(lower) and lower[end] == "of" and lower[end - 1] in _FRAMES


def _is_subject(lower: list[str]) -> bool:
    content = [word for word in lower if word not in _DETERMINERS]
    if not content or content[-1] in _EMPTY_PRONOUNS:
        return False
    return content[-1] not in _EMPTY


def _joined(words: list[str]) -> str:
    return " ".join(words).replace(" ,", ",")
