"""What the page does when something is pressed: it asks the artist, and shows the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.serving import page_share, page_shows
from pipeline.serving.artist import Artist, Busy, Drawn, Gone, Late, Step
from pipeline.serving.page_card import Card, read_card, uploaded
from pipeline.serving.page_examples import Example, examples, gallery
from pipeline.serving.page_form import Form

_log = logging.getLogger(__name__)


class Acts:
    """The page's handlers. slots: how many subjects the page has widgets for."""

    def __init__(self, artist: Artist, cfg: ServeConfig, slots: int) -> None:
        self._artist, self._cfg, self._slots = artist, cfg, slots

    async def greet(self) -> tuple[str, str]:
        """The line that says who draws, and the gallery."""
        try:
            facts = await self._artist.facts()
        except (Busy, Late, Gone, UserError) as error:
            return page_shows.complaint(readable(error)), ""
        shown = await asyncio.to_thread(gallery, facts.side)
        return f"{facts.side} × {facts.side} pixels, on {facts.device}", shown

    async def upload(self, value: str, event: gr.EventData) -> tuple[Any, Any]:
        """A new picture for a card: the card, and what stands beside it."""
        try:
            query = read_card(value).query
            name, image = str(event.name), str(event.image)
            card = await asyncio.to_thread(uploaded, name, image, query, self._cfg.limits)
        except UserError as error:
            return _again(value), page_shows.not_looked(readable(error))
        return card.write(), page_shows.waiting()

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
        reference = await asyncio.to_thread(card.reference, limits)
        if reference.query:
            within = self._cfg.deadline_s
            (look,) = await self._artist.look(reference.image, [reference.query], within)
            masked = reference.mask is not None
            return await asyncio.to_thread(page_shows.looked, reference.image, look, masked)
        assert reference.mask is not None  # or it would have been refused
        return await asyncio.to_thread(page_shows.masked, reference.image, reference.mask)

    async def draw(self, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Progress, pictures, complaint: step by step."""
        skip = gr.skip()
        try:
            form = Form.of(values, self._slots)
            recipe = await asyncio.to_thread(form.recipe, self._cfg)
            wanted = [recipe, recipe.without_subjects()] if recipe.subjects else [recipe]
            total, made, began = recipe.steps * len(wanted), [], 0.0
            yield page_shows.progress(0, total, None, "Waiting for its turn"), skip, ""
            for number, each in enumerate(wanted):
                words = "Drawing with your subjects" if each.subjects else "Drawing without"
                async with aclosing(self._steps(each)) as answers:
                    async for answer in answers:
                        if isinstance(answer, Drawn):
                            made.append(answer.png)
                            continue
                        now = time.monotonic()
                        done = number * recipe.steps + answer.done
                        if not began:
                            began, first = now, done
                        pace = (now - began) / (done - first) if done > first else None
                        left = None if pace is None else pace * (total - done)
                        yield page_shows.progress(done, total, left, words), skip, skip
                said = (recipe.prompt, recipe.seed)
                if not recipe.subjects:
                    pictures = await asyncio.to_thread(page_shows.alone, made[0], *said)
                else:
                    plain = made[1] if len(made) > 1 else None
                    pictures = await asyncio.to_thread(page_shows.pair, made[0], plain, *said)
                yield ("" if number + 1 == len(wanted) else skip), pictures, skip
        except Exception as error:
            yield "", skip, page_shows.complaint(readable(error))

    async def _steps(self, recipe: Any) -> AsyncIterator[Step | Drawn]:
        asked: Any = self._artist.draw(recipe, self._cfg.deadline_s)
        async with aclosing(asked) as answers:
            async for answer in answers:
                yield answer

    async def share(self, *values: Any) -> tuple[str, str, str, str, str]:
        """JSON, Python, command, the files' links, complaint."""
        try:
            form = Form.of(values, self._slots)
            recipe = await asyncio.to_thread(form.recipe, self._cfg)
            facts = await self._artist.facts()
            return (
                page_share.as_json(recipe, facts.models),
                page_share.as_python(recipe, self._cfg),
                page_share.as_command(recipe, self._cfg),
                await asyncio.to_thread(lambda: page_shows.links(page_share.files(recipe))),
                "",
            )
        except Exception as error:
            return "", "", "", "", page_shows.complaint(readable(error))

    async def example(self, event: gr.EventData) -> Example:
        """The one whose button was pressed."""
        facts = await self._artist.facts()
        known = await asyncio.to_thread(examples, facts.side)
        return known[int(event.index) % len(known)]


def readable(error: BaseException) -> str:
    """One line of what went wrong, for people."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Busy):
        return "all are busy and the queue is full; try again in a minute"
    if isinstance(error, Late):
        return "it was not done in time; try fewer steps, or again when less is going on"
    if isinstance(error, Gone):
        return "whoever was drawing is no more, or the service is stopping; try again"
    _log.error("the page failed", exc_info=error)
    return f"the service failed ({type(error).__name__}); its log says why"


def _again(value: str) -> str:
    """The same card, in other bytes: the browser then shows it anew."""
    return value + " " if not value.endswith(" ") else value.rstrip()
