"""What the API and the page share: who draws, how much is asked of it, whether it is stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

from PIL import Image
from pydantic import StringConstraints, TypeAdapter
from starlette.requests import Request

from pipeline.config.serve import ServeConfig
from pipeline.generation.recipe import Recipe
from pipeline.serving.answers import ClientGone
from pipeline.serving.artist import Artist, Busy, Drawn, Facts, Gone, Look, Step
from pipeline.serving.bodies import recipe_body
from pipeline.serving.metrics import Metrics
from pipeline.serving.uploads import Decoder

T = TypeVar("T")
_LAST_WORDS_S = 2.0


class Service:
    """What the routes share: who draws, how many requests there are, whether it is stopping."""

    def __init__(self, artist: Artist, cfg: ServeConfig, metrics: Metrics) -> None:
        self.artist, self.cfg, self.metrics = artist, cfg, metrics
        self.decoder = Decoder(cfg.limits)
        self.recipe = recipe_body(cfg)
        queries = Annotated[str, StringConstraints(min_length=1, max_length=cfg.limits.text)]
        self.queries: TypeAdapter[list[str]] = TypeAdapter(list[queries])
        self.draining = False
        self._ended = asyncio.Event()
        self._requests = 0
        # More could only wait to be refused by the replicas, their uploads in memory and on disk.
        self._room = cfg.room + 1

    @asynccontextmanager
    async def request(self) -> AsyncIterator[float]:
        """A request that is let in; gives its last moment by time.monotonic()."""
        if self.draining:
            raise Gone("the service is stopping")
        if self._requests >= self._room:
            raise Busy(f"{self._requests} are at work or wait")
        self._requests += 1
        try:
            yield time.monotonic() + self.cfg.deadline_s
        finally:
            self._requests -= 1

    async def drain(self, within_s: float) -> bool:
        """Answer 503 from now on; whether those that were let in before are done in time. Those
        that are not are answered 503, too.
        """
        self.draining = True
        await self._empty(within_s)
        in_time = not self._requests
        self._ended.set()
        await self._empty(_LAST_WORDS_S)
        return in_time

    async def _empty(self, within_s: float) -> None:
        ends = time.monotonic() + within_s
        while self._requests and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    async def while_wanted(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled when its client leaves, and when a drain takes too
        long.
        """

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working = asyncio.ensure_future(work)
        leaving, ending = asyncio.ensure_future(left()), asyncio.ensure_future(self._ended.wait())
        tasks = [working, leaving, ending]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone if leaving.done() else Gone("the service is stopping")
            return working.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class LetIn:
    """The service's Artist for the page: its pictures count as requests do, and a drain waits for
    them.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def facts(self) -> Facts:
        return await self._service.artist.facts()

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        async with self._service.request():
            drawing: Any = self._service.artist.draw(recipe, within_s)
            async with aclosing(drawing):
                async for told in drawing:
                    yield told

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        async with self._service.request():
            return await self._service.artist.look(image, queries, within_s)
