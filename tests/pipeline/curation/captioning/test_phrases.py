from pathlib import Path

import numpy as np
import pytest

from pipeline.curation.captioning.phrases import noun_phrases
from pipeline.miniworld import world


@pytest.mark.parametrize(
    ("caption", "subjects"),
    [
        # the mini world's
        ("a fish and a cup on sand", ["a fish", "a cup"]),
        ("a fish on sand", ["a fish"]),
        ("a red and white fish on sand", ["a red and white fish"]),
        ("a red and white fish and a black yellow key on snow",
         ["a red and white fish", "a black yellow key"]),
        ("a car, a tree and a house in grass", ["a car", "a tree", "a house"]),
        ("a boat and a star in front of a brick wall", ["a boat", "a star"]),
        # as a real BLIP-2 puts it
        ("two dogs are playing with a ball on the grass", ["two dogs", "a ball"]),
        ("a woman in a red dress sitting on a bench", ["a woman", "a red dress"]),
        ("a man riding a horse on the beach", ["a man", "a horse"]),
        ("an orange and a tie on a table", ["an orange", "a tie"]),
        ("a close up of a white flower with green leaves", ["a white flower", "green leaves"]),
        ("a picture of a cat", ["a cat"]),
        ("there is a cat that is sitting on a table", ["a cat"]),
        ("a cup of coffee on a wooden table", ["a cup of coffee"]),
        ("a group of people standing around a table", ["a group of people"]),
        ("a black and white cat laying on top of a bed", ["a black and white cat"]),
        ("a house surrounded by trees", ["a house"]),
        ("a man with a beard and glasses looking at the camera",
         ["a man", "a beard", "glasses"]),
        ("an old building with a clock tower", ["an old building", "a clock tower"]),
        ("a cat sitting next to a dog", ["a cat", "a dog"]),
        ("people walking on the beach at sunset", ["people"]),
        ("a girl wearing a blue hat and holding a book", ["a girl", "a blue hat", "a book"]),
        ("the living room has a couch and a coffee table",
         ["the living room", "a couch", "a coffee table"]),
        ("a sunset over the ocean with a sailboat", ["a sunset", "a sailboat"]),
        ("A girl's red shoes.", ["A girl's red shoes"]),
        ("a big, brown dog running in the snow", ["a big, brown dog"]),
        ("3d rendering of a modern kitchen", ["a modern kitchen"]),
        ("a collage of photos of a bride", ["a bride"]),
        ("an image of a café in paris", ["a café"]),
        # nothing to find
        ("", []),
        ("on the beach", []),
        ("is it", []),
        ("...", []),
    ],
)  # fmt: skip
def test_subjects_of_a_caption(caption: str, subjects: list[str]) -> None:
    assert noun_phrases(caption) == subjects


def test_subjects_of_captions_as_the_web_words_them() -> None:
    """Precision and recall over a table of captions; a phrase counts only when word for word."""
    table = Path(__file__).with_name("subjects.txt").read_text().splitlines()
    hits = told = wanted = 0
    wrong = []
    for line in table:
        if line and not line.startswith("#"):
            caption, _, right = line.partition(" | ")
            expected, found = right.split("; "), noun_phrases(caption)
            assert all(phrase in caption for phrase in expected + found), caption
            hits += len(set(expected) & set(found))
            told, wanted = told + len(found), wanted + len(expected)
            if found != expected:
                wrong.append(f"{caption}: {found}")
    assert wanted > 450
    assert hits / told >= 0.98 and hits / wanted >= 0.98, "\n".join(wrong)


def test_subjects_of_every_caption_of_the_mini_world() -> None:
    for seed in range(60):
        scene = world.scene(seed, "train", None)
        for attributes in (False, True):
            told = world.caption(scene, attributes, np.random.default_rng(seed))
            phrases = noun_phrases(told)
            assert [phrase.split()[-1] for phrase in phrases] == [
                word for word in told.replace(",", "").split() if word in world.CLASSES
            ], told
            named = {world.phrase(subject, attributes=False) for subject in scene.subjects}
            assert attributes or set(phrases) == named


def test_a_repeated_phrase_counts_once() -> None:
    assert noun_phrases("a dog and a dog and a cat") == ["a dog", "a cat"]


def test_any_text_is_survived() -> None:
    for text in (
        "of of of",
        "a",
        "and",
        "a of",
        "with",
        "a, b, c of",
        "été à la plage",
        "🙂 a dog",
    ):
        assert all(phrase.strip() for phrase in noun_phrases(text))
