"""What the page lets in: Gradio brings more routes, and takes more in its bodies, than it needs.

The page exchanges words, numbers and data URLs only. So nothing of Gradio that reads or writes
files is reachable: no upload, no /file=, no /proxy=, no endpoint but the queue. And a body that
holds more than scalars is refused: Gradio would take a crafted {"path": ...} for a file of its
cache, or fetch the address in it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.answers import error

_READ = re.compile(
    r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/config/?"
    r"|/gradio_api/(queue/data|heartbeat/\w+|startup-events|theme\.css)/?"
)
_ASK = re.compile(r"/gradio_api/(queue/join|reset)/?")
_COMES_S = 120.0
"""A body of some MiB takes as long on a slow line; one that comes for ever holds its memory."""
_MOST_VALUES = 200
"""Of a body: four for each subject, and a few beside them."""

_HEADERS = {
    # Gradio's scripts are inline, and it makes functions of strings; but nothing leaves the host
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageGate:
    """ASGI middleware around the mounted page; LimitBody outside of it counts the bytes.

    What is refused is answered as the API does (answers.error): 404, 408, or 400 with a reason.
    before: the service's own routes. What is asked of one by a wrong method comes here, for the
    page is mounted at /; that route says then which methods it has (405).
    """

    def __init__(self, app: ASGIApp, before: Sequence[BaseRoute] = ()) -> None:
        self._app, self._before = app, before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        for route in self._before:
            if route.matches(scope)[0] is Match.PARTIAL:
                return await route.handle(scope, receive, send)
        if not _is_open(scope):
            return await error(404, "no such page")(scope, receive, send)
        if scope["method"] == "POST":
            try:
                async with asyncio.timeout(_COMES_S):
                    body = await _body(receive)
            except TimeoutError:
                line = f"the request did not come within {_COMES_S:g} s"
                return await error(408, line)(scope, receive, send)
            if not holds_scalars(body):
                line = "only words and numbers are taken, no files and no addresses"
                return await error(400, line)(scope, receive, send)
            receive = _replayed(body, receive)
        await self._app(scope, receive, _with_headers(send))


def holds_scalars(body: bytes) -> bool:
    """Whether the values in a request to Gradio's queue are words and numbers, and few."""
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return False
    if not isinstance(said, dict):
        return False
    values: list[Any] = []
    for name, value in said.items():
        if name == "data" and isinstance(value, list):
            values += value
        elif name == "event_data" and isinstance(value, dict):
            values += value.values()
        else:
            values.append(value)
    return len(values) <= _MOST_VALUES and all(
        value is None or isinstance(value, str | int | float) for value in values
    )


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    if scope["method"] in ("GET", "HEAD"):
        # a deep link names a file of Gradio's cache
        return bool(_READ.fullmatch(path)) and b"deep_link" not in scope.get("query_string", b"")
    return scope["method"] == "POST" and bool(_ASK.fullmatch(path))


async def _body(receive: Receive) -> bytes:
    """The whole body, or what came of it before the client left."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_headers(send: Send) -> Send:
    """With the page's policies, and without Gradio's leave for pages of other hosts to read it."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_HEADERS)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
        await send(message)

    return told
