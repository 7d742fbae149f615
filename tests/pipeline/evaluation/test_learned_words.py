import pytest

from pipeline.errors import UserError
from pipeline.evaluation.benches import Outline, SubjectName
from pipeline.evaluation.methods.learned_words import renamed, reworded


def asking(prompt: str, *subjects: tuple[str, str]) -> Outline:
    """A request for (name, phrase) each."""
    return Outline("r-0", prompt, 0, tuple(SubjectName(*each) for each in subjects), False)


@pytest.mark.parametrize(
    ("prompt", "name", "phrase", "call", "expected"),
    [
        ("a cup on snow", "cup", "a cup", "sks cup", "a sks cup on snow"),
        ("a cup on snow", "cup", "a cup", "<v1>", "a <v1> on snow"),
        ("A cup on snow", "cup", "a cup", "sks cup", "A sks cup on snow"),
        ("a photo of an apple.", "apple", "an apple", "sks apple", "a photo of a sks apple."),
        ("a red cup", "cup", "a cup", "sks cup", "a red sks cup"),
        ("a cupboard and a cup", "cup", "a cup", "sks cup", "a cupboard and a sks cup"),
        ("the red cup in a cup", "cup", "the red cup", "sks cup", "the red sks cup in a cup"),
        ("a toy on snow", "dog toy", "a toy", "sks dog toy", "a sks dog toy on snow"),
        ("an apple", "apple", "apple", "sks apple", "a sks apple"),
        ("a c++ (book)", "c++ (book)", "a c++ (book)", "sks book", "a sks book"),
    ],
)
def test_the_word_takes_the_names_place(prompt, name, phrase, call, expected) -> None:
    assert reworded(asking(prompt, (name, phrase)), [call]) == expected


def test_subjects_are_found_in_the_selections_order() -> None:
    twins = asking("a cup beside a cup", ("cup", "a cup"), ("cup", "a cup"))
    assert reworded(twins, ["sks cup", "ktn cup"]) == "a sks cup beside a ktn cup"
    pair = asking("a cup and a red boat", ("cup", "a cup"), ("boat", "a boat"))
    assert reworded(pair, ["<v1>", "<v2>"]) == "a <v1> and a red <v2>"


def test_a_prompt_that_does_not_say_the_subject_is_refused() -> None:
    with pytest.raises(UserError, match=r"r-0: .*says neither 'a cup' nor 'cup'"):
        reworded(asking("a cupboard", ("cup", "a cup")), ["sks cup"])
    with pytest.raises(UserError, match="nor 'cup'"):
        reworded(asking("a cup", ("cup", "a cup"), ("cup", "a cup")), ["sks cup", "ktn cup"])


def test_a_phrase_without_the_name_keeps_its_article_alone() -> None:
    assert renamed("an old teapot", "kettle", "sks kettle") == "a sks kettle"
    assert renamed("grandmother", "woman", "sks woman") == "sks woman"
