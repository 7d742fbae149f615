"""The API asked in this process: httpx on the ASGI app, no socket between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
from fastapi import FastAPI

from pipeline.config import ServeConfig
from pipeline.config.serve import LimitsConfig
from pipeline.serving.api import make_app
from pipeline.serving.local import LocalArtist
from tests.pipeline.serving.painter import Painter, picture

LIMITS = LimitsConfig(upload_mib=1, pixels=10_000, subjects=2, steps=20, side=64, text=40)
URL = "http://127.0.0.1:8000"


def app(painter: Painter | None = None, token: str | None = None, **settings: Any) -> FastAPI:
    given: dict[str, Any] = {"steps": 3, "batch_wait_ms": 0, "limits": LIMITS, **settings}
    cfg = ServeConfig(**given)
    return make_app(LocalArtist(painter or Painter(), cfg), cfg, token)  # type: ignore[arg-type]


def client(of: FastAPI, **options: Any) -> httpx.AsyncClient:
    given = {"base_url": URL, "timeout": 60, **options}
    return httpx.AsyncClient(transport=httpx.ASGITransport(of), **given)


def asked(*files: bytes, attention: str | None = None, **recipe: Any) -> dict[str, Any]:
    """A request for a picture, for httpx; without `recipe` that of a cup in the first file."""
    cup = {"prompt": "a cup on snow", "subjects": [{"image": 0, "query": "cup"}]}
    data = {"recipe": json.dumps({**cup, **recipe})}
    if attention is not None:
        data["attention"] = attention
    uploads = files or (picture(),)
    return {
        "data": data,
        "files": [("files", (f"photo {i}.png", f)) for i, f in enumerate(uploads)],
    }


def asking(of: FastAPI, test: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60), client(of) as c:
            await test(c)

    asyncio.run(bounded())


def line(answer: httpx.Response, status: int) -> str:
    """The one line of a fault; it fails where the answer is another one, or tells of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    assert list(said) == ["error"]
    found = str(said["error"])
    assert found and "\n" not in found and "Traceback" not in found and ".py" not in found
    return found
