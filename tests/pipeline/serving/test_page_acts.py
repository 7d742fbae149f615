"""What the page says when the artist cannot, and what it keeps then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Busy, Drawn, Facts, Gone, Late, Look, Step
from pipeline.serving.page_acts import Acts, Pace
from pipeline.serving.page_card import Card, shown

CUP = Image.new("RGB", (8, 8), "red")
FORM = [Card("cup", shown(CUP), "", "cup").write(), 1, "everywhere", ""]
WORDS = ["a cup", "", 0, 2, 7.5, 0.0, 0, 0, "{}", 1]
FAULTS = [
    (Busy(), "the queue is full"),
    (Late(), "not done in time"),
    (Gone(), "try again"),
    (UserError("cup: no such\nword"), "cup: no such word"),
    (RuntimeError("secret <b>"), "the service failed (RuntimeError); its log says why"),
]


class Failing:
    """Fails after the first step of its `whole`th picture."""

    def __init__(self, error: Exception, whole: int = 0) -> None:
        self.error, self.whole, self.closed = error, whole, 0

    async def facts(self) -> Facts:
        raise self.error

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        try:
            yield Step(1, recipe.steps)
            if not self.whole:
                raise self.error
            self.whole -= 1
            yield Drawn(png.encode(CUP))
        finally:
            self.closed += 1

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        raise self.error


def drawn(artist: Any) -> list[tuple[Any, Any, Any]]:
    request: Any = SimpleNamespace(session_hash="a")

    async def work() -> list[tuple[Any, Any, Any]]:
        acts = Acts(artist, ServeConfig(), 1)
        return [each async for each in acts.draw(request, *FORM, *WORDS)]

    return asyncio.run(work())


@pytest.mark.parametrize("error, line", FAULTS, ids=lambda each: type(each).__name__)
def test_a_fault_is_one_line_and_what_was_there_stays(error: Exception, line: str) -> None:
    artist = Failing(error)
    *_, (progress, results, complaint) = drawn(artist)
    assert progress == "" and not isinstance(results, str)  # no change
    assert line in complaint and "<b>" not in complaint and complaint.count("\n") == 0
    assert artist.closed == 1
    acts = Acts(artist, ServeConfig(), 1)
    assert line in asyncio.run(acts.look(FORM[0]))
    assert line in asyncio.run(acts.greet())[0]
    assert line in asyncio.run(acts.share(*FORM, *WORDS))


def test_the_first_picture_is_kept_when_the_second_fails() -> None:
    told = drawn(Failing(Late(), whole=1))
    pictures = [results for _, results, _ in told if isinstance(results, str)]
    assert len(pictures) == 1 and pictures[0].count("<img") == 1 and "coming" in pictures[0]
    assert "not done in time" in told[-1][2]


def test_giving_up_closes_the_artists_iterator() -> None:
    class Slow(Failing):
        async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
            try:
                yield Step(1, 2)
                await asyncio.sleep(60)
            finally:
                self.closed += 1

    artist, request = Slow(Gone()), SimpleNamespace(session_hash="a")

    async def work() -> list[Any]:
        acts: Any = Acts(artist, ServeConfig(), 1)
        told = []
        async for each in acts.draw(request, *FORM, *WORDS):
            told.append(each)
            if "step 1 of 4" in str(each[0]):
                await acts.cancel(SimpleNamespace(session_hash="another"))
                await acts.cancel(request)
        assert not acts._given_up
        return told

    assert asyncio.run(asyncio.wait_for(work(), 20))[-1][0] == ""
    assert artist.closed == 1


def test_an_example_that_is_not_there() -> None:
    class Well(Failing):
        async def facts(self) -> Facts:
            return Facts(32, 8, False, {}, "cpu")

    event: Any = SimpleNamespace(index="x")
    with pytest.raises(gr.Error, match="no such example"):
        asyncio.run(Acts(Well(Gone()), ServeConfig(), 1).example(event))
    with pytest.raises(gr.Error, match="try again"):
        asyncio.run(Acts(Failing(Gone()), ServeConfig(), 1).example(event))


def test_the_time_left() -> None:
    pace = Pace()
    assert pace.left_s(1, 10) is None
    assert pace.left_s(1, 10) is None  # nothing is seen of its pace yet
    left = pace.left_s(3, 10)
    assert left is not None and left >= 0


def test_a_look_of_a_mask_needs_no_model() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = 255
    card = Card("cup", shown(CUP), shown(Image.fromarray(mask)), "")
    said = asyncio.run(Acts(Failing(Gone()), ServeConfig(), 1).look(card.write()))
    assert "what you painted" in said and 'class="small"' in said
