"""The artist of one process: a Sampler behind a queue, asked by any number of coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.generation import png
from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Drawn, Facts, Gone, Late, Look, Step
from pipeline.serving.batches import Batches, Made, Ticket

if TYPE_CHECKING:
    from pipeline.generation.sampler import Sampler


class LocalArtist:
    """Draws in this process, on one device.

    models: names and hashes of the models (identities.py). device: as people call it.
    """

    def __init__(
        self,
        sampler: Sampler,
        cfg: ServeConfig,
        models: dict[str, object] | None = None,
        device: str = "cpu",
    ) -> None:
        self._sampler = sampler
        self._batches = Batches(sampler, cfg.batch, cfg.batch_wait_ms / 1000, cfg.queue)
        self._facts = Facts(
            side=sampler.side,
            step=sampler.step,
            controlnet=cfg.controlnet is not None,
            models=models or {},
            device=device,
        )

    @classmethod
    def load(cls, cfg: ServeConfig) -> LocalArtist:
        """With the models of the settings. Raises UserError for what is not there."""
        import torch

        from pipeline import models
        from pipeline.generation.identities import identities
        from pipeline.generation.sampler import Sampler, model_folder
        from pipeline.storage import Storage

        where = models.device(cfg.device)
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
        with model_folder(Storage(cfg.root), cfg.model) as folder:
            known = {**identities(cfg, folder), "dtype": cfg.dtype}
            sampler = Sampler.load(folder, cfg, precision=cfg.dtype, controlnet=cfg.controlnet)
        return cls(sampler, cfg, known, name)

    @property
    def well(self) -> bool:
        """Whether it can draw; a replica that cannot is started anew."""
        return self._batches.well

    def close(self, within_s: float = 0.0) -> bool:
        """Refuse what comes from now on; whether all that had come was done in time."""
        self._batches.close()
        return self._batches.join(within_s)

    async def facts(self) -> Facts:
        if not self.well:
            raise Gone("the drawing thread has ended")
        return self._facts

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        if recipe.size is not None:
            self._sampler.check_size(recipe.size)
        if recipe.control is not None and not self._facts.controlnet:
            raise UserError("control: the service was started without a ControlNet")
        async with aclosing(self._ask(recipe, within_s)) as answers:
            async for told in answers:
                if isinstance(told, Step):
                    yield told
                else:
                    made: Made = told
                    yield Drawn(await asyncio.to_thread(self._encode, made, recipe), made.batch)

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        def work() -> list[Look]:
            box = self._sampler.seen_box(image)
            maps = self._sampler.attention(image, queries)
            return [Look(query, each, box) for query, each in zip(queries, maps, strict=True)]

        async with aclosing(self._ask(work, within_s)) as answers:
            found: list[Look] = await anext(answers)
            return found

    async def _ask(self, asked: Recipe | Callable[[], Any], within_s: float) -> AsyncGenerator[Any]:
        """Steps, and last the answer. An answer that is an exception is raised."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(what: Any) -> None:
            loop.call_soon_threadsafe(told.put_nowait, what)

        ticket = Ticket(asked, time.monotonic() + within_s, tell)
        self._batches.put(ticket)
        try:
            while True:
                left_s = ticket.ends - time.monotonic()
                try:
                    what = await asyncio.wait_for(told.get(), max(left_s, 0))
                except TimeoutError:
                    raise Late(f"not done within {within_s:.1f} s") from None
                if isinstance(what, BaseException):
                    raise what
                yield what
                if not isinstance(what, Step):
                    return
        finally:
            self._batches.give_up(ticket)

    def _encode(self, made: Made, recipe: Recipe) -> bytes:
        about = {"recipe": recipe.describe(), **self._facts.models}
        return png.encode(made.picture, about, sources=recipe.pictures())
