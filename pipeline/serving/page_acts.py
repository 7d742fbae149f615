"""What the page does when something is pressed: it asks the artist, and shows the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import gradio as gr

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError, user_message
from pipeline.generation.recipe import Recipe
from pipeline.serving import page_share, page_shows
from pipeline.serving.artist import Artist, Busy, Drawn, Gone, Late, Step
from pipeline.serving.page_card import Card, read_card, uploaded
from pipeline.serving.page_examples import Example, examples, gallery
from pipeline.serving.page_form import Form

T = TypeVar("T")
_AT_ONCE = 2
"""Pictures that are decoded or made at a time: each takes `limits.pixels` x 4 bytes, twice."""
_log = logging.getLogger(__name__)


class Acts:
    """The page's handlers. slots: how many subjects the page has widgets for."""

    def __init__(self, artist: Artist, cfg: ServeConfig, slots: int) -> None:
        self._artist, self._cfg, self._slots = artist, cfg, slots
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="page")
        self._given_up: dict[str, asyncio.Event] = {}
        """Of each browser that has something drawn, by Gradio's name for it."""

    async def _apart(self, work: Callable[..., T], *given: Any) -> T:
        """Out of the event loop, a few at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    async def greet(self) -> tuple[str, str]:
        """The head, which says who draws, and the gallery."""
        try:
            facts = await self._artist.facts()
        except Exception as error:
            return page_shows.head(readable(error)), ""
        shown = await self._apart(gallery, facts.side)
        line = f"Pictures of {facts.side} × {facts.side} pixels, drawn on {facts.device}."
        return page_shows.head(line), shown

    async def upload(self, event: gr.EventData) -> tuple[Any, Any]:
        """A new picture for a card: the card, and what stands beside it."""
        try:
            return await self._uploaded(event), page_shows.waiting()
        except Exception as error:
            return gr.skip(), page_shows.not_looked(readable(error))

    async def upload_control(self, event: gr.EventData) -> tuple[Any, Any]:
        """A new control image: its card, and what is wrong with it."""
        try:
            return await self._uploaded(event), ""
        except Exception as error:
            return gr.skip(), page_shows.complaint(readable(error))

    async def _uploaded(self, event: gr.EventData) -> str:
        name, image = str(event.name), str(event.image)
        return (await self._apart(uploaded, name, image, self._cfg.limits)).write_picture()

    async def look(self, value: str) -> str:
        """What a card selects."""
        try:
            card = read_card(value)
            if not card.image:
                return page_shows.waiting()
            return await self._selected(card)
        except Exception as error:
            return page_shows.not_looked(readable(error))

    async def _selected(self, card: Card) -> str:
        limits = self._cfg.limits
        if not (card.query.strip() or card.mask):
            return page_shows.waiting()
        reference = await self._apart(card.reference, limits)
        if reference.query:
            within = self._cfg.deadline_s
            (look,) = await self._artist.look(reference.image, [reference.query], within)
            masked = reference.mask is not None
            return await self._apart(page_shows.looked, reference.image, look, masked)
        assert reference.mask is not None  # or it would have been refused
        return await self._apart(page_shows.masked, reference.image, reference.mask)

    async def draw(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Progress, pictures, complaint: step by step."""
        skip, session = gr.skip(), request.session_hash or ""
        given_up = self._given_up[session] = asyncio.Event()
        try:
            form = Form.of(values, self._slots)
            recipe = await self._apart(form.recipe, self._cfg)
            wanted = [recipe, recipe.without_subjects()] if recipe.subjects else [recipe]
            total, made, pace = recipe.steps * len(wanted), [], Pace()
            yield page_shows.progress(0, total, None, "Waiting for its turn"), skip, ""
            for number, each in enumerate(wanted):
                words = "Drawing with your subjects" if each.subjects else "Drawing without"
                asked = self._artist.draw(each, self._cfg.deadline_s)
                async with aclosing(_until(asked, given_up)) as answers:
                    async for answer in answers:
                        if isinstance(answer, Drawn):
                            made.append(answer.png)
                            continue
                        done = number * recipe.steps + answer.done
                        left = pace.left_s(done, total)
                        yield page_shows.progress(done, total, left, words), skip, skip
                if given_up.is_set():
                    break
                shown = await self._apart(page_shows.pictures, recipe, made)
                yield skip, shown, skip
            yield "", skip, skip
        except Exception as error:
            yield "", skip, page_shows.complaint(readable(error))
        finally:
            if self._given_up.get(session) is given_up:
                del self._given_up[session]

    async def cancel(self, request: gr.Request) -> None:
        """Give up what the browser has drawn."""
        if given_up := self._given_up.get(request.session_hash or ""):
            given_up.set()

    async def share(self, *values: Any) -> str:
        """The settings as texts to copy."""
        try:
            form = Form.of(values, self._slots)
            recipe = await self._apart(form.recipe, self._cfg)
            facts = await self._artist.facts()
            return await self._apart(self._shared, recipe, facts.models)
        except Exception as error:
            return page_shows.complaint(readable(error))

    def _shared(self, recipe: Recipe, models: Mapping[str, Any]) -> str:
        texts = {
            "JSON": page_share.as_json(recipe, models),
            "Python, with diffusers": page_share.as_python(recipe, self._cfg),
            "Command of this repository": page_share.as_command(recipe, self._cfg),
        }
        return page_shows.shared(texts, page_share.files(recipe))

    async def example(self, event: gr.EventData) -> Example:
        """The one whose button was pressed."""
        try:
            facts = await self._artist.facts()
            known = await self._apart(examples, facts.side)
            if event.index not in range(len(known)):
                raise UserError("there is no such example; load the page anew")
            return known[event.index]
        except Exception as error:
            raise gr.Error(readable(error), print_exception=False) from None


class Pace:
    """How long is left, by the steps that were seen."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left_s(self, done: int, of: int) -> float | None:
        """Seconds; none before the second step."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first, began = self._first
        return (now - began) / (done - first) * (of - done) if done > first else None


async def _until(
    answers: AsyncIterator[Step | Drawn], given_up: asyncio.Event
) -> AsyncGenerator[Step | Drawn]:
    """The answers, until they are given up; the artist's iterator is closed either way."""
    stop = asyncio.ensure_future(given_up.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(answers))
            try:
                await asyncio.wait([coming, stop], return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            if coming.cancelled():
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        stop.cancel()
        if isinstance(answers, AsyncGenerator):
            await answers.aclose()


def readable(error: BaseException) -> str:
    """One line of what went wrong, for people."""
    if line := user_message(error):
        return line
    if isinstance(error, Busy):
        return "all are busy and the queue is full; try again in a minute"
    if isinstance(error, Late):
        return "it was not done in time; try fewer steps, or again when less is going on"
    if isinstance(error, Gone):
        return "whoever was drawing is no more, or the service is stopping; try again"
    _log.error("the page failed", exc_info=error)
    return f"the service failed ({type(error).__name__}); its log says why"
