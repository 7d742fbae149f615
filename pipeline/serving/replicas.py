"""Replicas that draw, and the artist that asks them over Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from PIL import Image
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Busy, Drawn, Facts, Gone, Late, Look, Step

_TAKEN_S = 10.0
"""A replica that lives takes a request at once; where there is none, one is waited for so long."""
_TRIES = 2
_FACTS_S = 5.0


@dataclass(frozen=True)
class _Fault:
    """An exception of the artist as an answer: raised, Ray would log it as a failure."""

    kind: str
    line: str


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, Busy, Late, Gone, RuntimeError)
}


def keep_replica_port_here() -> None:
    """Let the gRPC port that Ray Serve opens in every replica listen on 127.0.0.1, not on all
    addresses: it unpickles whatever anybody sends. Handles and the proxy do not use it, unless they
    are told to by RAY_SERVE_USE_GRPC_BY_DEFAULT. Called before a replica opens it: in __init__.
    """
    from ray.serve._private import constants, replica

    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT or constants.RAY_SERVE_PROXY_USE_GRPC:
        return
    opens = replica.add_port_to_grpc_server

    def open_here(server: Any, address: str) -> Any:
        return opens(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = open_here


class Drawer:
    """A replica: the models on its device, and the queue before them."""

    def __init__(self, cfg: ServeConfig) -> None:
        from pipeline.progress import quiet_libraries
        from pipeline.serving.local import LocalArtist

        keep_replica_port_here()
        quiet_libraries()
        self._artist = LocalArtist.load(cfg)

    async def ask(self, name: str, *asked: Any) -> AsyncGenerator[Any]:
        """What the artist's method gives, one by one; before it a None: the request has arrived."""
        yield None
        try:
            if name == "draw":
                drawing: Any = self._artist.draw(*asked)
                async with aclosing(drawing):
                    async for told in drawing:
                        yield told
            else:
                yield await getattr(self._artist, name)(*asked)
        except (UserError, Busy, Late, Gone) as fault:
            yield _Fault(type(fault).__name__, str(fault))
        except Exception as fault:  # the artist has logged it
            yield _Fault("RuntimeError", type(fault).__name__)

    async def check_health(self) -> None:
        """Called by Ray Serve, which starts a replica anew where it raises."""
        if not self._artist.well:
            raise RuntimeError("the drawing thread has ended, or its batches fail")


class RemoteArtist:
    """The Artist of all replicas. A request whose replica dies is asked once more of another."""

    def __init__(self, drawers: DeploymentHandle) -> None:
        self._ask = drawers.options(method_name="ask", stream=True)

    async def facts(self) -> Facts:
        try:
            return await self._one("facts", _FACTS_S)  # type: ignore[no-any-return]
        except Late:
            raise Gone("no replica answers") from None

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        return await self._one("look", within_s, image, queries)  # type: ignore[no-any-return]

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        async with aclosing(self._answers("draw", within_s, recipe)) as answers:
            async for told in answers:
                yield told

    async def _one(self, name: str, within_s: float, *asked: Any) -> Any:
        async with aclosing(self._answers(name, within_s, *asked)) as answers:
            async for told in answers:
                return told
        raise Gone("no answer came")

    async def _answers(self, name: str, within_s: float, *asked: Any) -> AsyncGenerator[Any]:
        ends = time.monotonic() + within_s
        for tried in range(1, _TRIES + 1):
            try:
                async with aclosing(self._try(name, ends, within_s, *asked)) as answers:
                    async for told in answers:
                        yield told
                return
            except BackPressureError as fault:
                raise Busy("all replicas are at work") from fault
            except (RayActorError, RayServeException) as fault:
                if tried == _TRIES:
                    raise Gone("its process has ended") from fault
            except RayError as fault:
                raise Gone(type(fault).__name__) from fault

    async def _try(
        self, name: str, ends: float, within_s: float, *asked: Any
    ) -> AsyncGenerator[Any]:
        left_s = ends - time.monotonic()
        last = () if name == "facts" else (left_s,)
        response = self._ask.remote(name, *asked, *last)
        taken = False
        try:
            while True:
                # a replica keeps the deadline itself; the second more is for its word to come
                patience_s = ends + 1 - time.monotonic() if taken else min(_TAKEN_S, left_s)
                try:
                    told = await asyncio.wait_for(anext(response), max(patience_s, 0))
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if taken or time.monotonic() >= ends:
                        raise Late(f"not done within {within_s:.1f} s") from None
                    raise Gone("no replica is there") from None
                if isinstance(told, _Fault):
                    raise _KINDS[told.kind](told.line)
                if told is not None:
                    yield told
                taken = True
        finally:
            response.cancel()  # of what is done already it is nothing
