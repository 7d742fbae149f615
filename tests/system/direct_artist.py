"""An Artist that asks a Sampler in a thread, one picture at a time: no queue, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image

from pipeline.generation import png
from pipeline.generation.recipe import Recipe
from pipeline.generation.sampler import Sampler
from pipeline.serving.artist import Drawn, Facts, Late, Look, Step


class GivenUp(Exception):
    """Raised inside of the denoising when nobody waits for it any more."""


class DirectArtist:
    """pause_s: between steps, so that a browser can see them. given_up: how often somebody did."""

    def __init__(self, sampler: Sampler, pause_s: float = 0.0) -> None:
        self._sampler, self.pause_s, self.given_up = sampler, pause_s, 0
        self._alone = asyncio.Lock()

    async def facts(self) -> Facts:
        models: dict[str, object] = {"model": "tiny", "base": "tiny"}
        return Facts(self._sampler.side, self._sampler.step, False, models, "cpu")

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stopped = False

        def on_step(done: int) -> None:
            loop.call_soon_threadsafe(told.put_nowait, Step(done, recipe.steps))
            if stopped:
                raise GivenUp
            if self.pause_s:
                asyncio.run_coroutine_threadsafe(asyncio.sleep(self.pause_s), loop).result()

        async with self._alone:
            work = asyncio.create_task(asyncio.to_thread(self._sampler.make, [recipe], on_step))
            work.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (step := await asyncio.wait_for(told.get(), within_s)) is not None:
                    yield step
                (picture,) = work.result()
                about = {"recipe": recipe.describe()}
                yield Drawn(png.encode(picture, about, sources=recipe.pictures()))
            except TimeoutError:
                raise Late from None
            finally:
                stopped = True
                if not work.done():
                    self.given_up += 1
                await asyncio.gather(work, return_exceptions=True)

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        maps = await asyncio.to_thread(self._sampler.attention, image, queries)
        box = self._sampler.seen_box(image)
        return [Look(query, each, box) for query, each in zip(queries, maps, strict=True)]
