"""What Prometheus reads at /metrics: requests, and what became of pictures."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from PIL import Image
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Artist, Drawn, Facts, Look, Step

disable_created_metrics()  # a line more for each, of when it was first counted
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """One service's figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ssr_requests", "HTTP requests", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ssr_request_seconds",
            "From a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "ssr_waiting", "Pictures asked for and not begun", registry=self.registry
        )
        self.drawing = Gauge("ssr_drawing", "Pictures being drawn", registry=self.registry)
        self.steps = Counter(
            "ssr_steps", "Denoising steps of pictures that were waited for", registry=self.registry
        )
        self.batch = Histogram(
            "ssr_batch_pictures",
            "Pictures that each picture was denoised with, itself among them",
            buckets=_BATCHES,
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Metered:
    """An Artist that counts what another one does, for the API and the page alike."""

    def __init__(self, artist: Artist, metrics: Metrics) -> None:
        self._artist, self._metrics = artist, metrics

    async def facts(self) -> Facts:
        return await self._artist.facts()

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        return await self._artist.look(image, queries, within_s)

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        state = self._metrics.waiting
        state.inc()
        try:
            drawing: Any = self._artist.draw(recipe, within_s)
            async with aclosing(drawing):
                async for told in drawing:
                    if state is self._metrics.waiting:
                        state.dec()
                        state = self._metrics.drawing
                        state.inc()
                    if isinstance(told, Step):
                        self._metrics.steps.inc()
                    else:
                        self._metrics.batch.observe(told.batch)
                    yield told
        finally:
            state.dec()


class CountRequests:
    """ASGI middleware: requests by route and status, and their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # the route's own path: one of a few, whatever clients ask for
            route = getattr(scope.get("route"), "path", None) or "other"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
