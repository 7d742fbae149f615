"""What the page lets in: Gradio brings more routes, and takes more in its bodies, than it needs.

The page exchanges words, numbers and data URLs only. So nothing of Gradio that reads or writes
files is reachable: no upload, no /file=, no /proxy=, no endpoint but the queue. And a body that
holds more than scalars is refused: Gradio would take a crafted {"path": ...} for a file of its
cache, or fetch the address in it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READ = re.compile(
    r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/config/?"
    r"|/gradio_api/(queue/data|heartbeat/\w+|startup-events|theme\.css)/?"
)
_ASK = re.compile(r"/gradio_api/(queue/join|reset)/?")

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
    """ASGI middleware of the mounted page.

    most_bytes: of a body. What is refused is answered in JSON: 404, 413, or 400 with a reason.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not _is_open(scope):
            await _refuse(404, "no such page", scope, receive, send)
            return
        if scope["method"] == "POST":
            body = await _body(receive, self._most_bytes)
            if body is None:
                mib = self._most_bytes / 2**20
                await _refuse(
                    413, f"a request has at most {mib:g} MiB; use smaller pictures",
                    scope, receive, send,
                )  # fmt: skip
                return
            if not holds_scalars(body):
                await _refuse(
                    400, "only words and numbers are taken, no files and no addresses",
                    scope, receive, send,
                )  # fmt: skip
                return
            receive = _replayed(body, receive)
        await self._app(scope, receive, _with_headers(send))


def holds_scalars(body: bytes) -> bool:
    """Whether the values in a request to Gradio's queue are words and numbers."""
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return False
    if not isinstance(said, dict):
        return False
    values = said.get("data") or []
    event = said.get("event_data") or {}
    if not isinstance(values, list):
        return False
    if isinstance(event, dict):
        values = values + list(event.values())
    else:
        values = [*values, event]
    return all(value is None or isinstance(value, str | int | float) for value in values)


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    if scope["method"] in ("GET", "HEAD"):
        # a deep link names a file of Gradio's cache
        return bool(_READ.fullmatch(path)) and b"deep_link" not in scope.get("query_string", b"")
    return scope["method"] == "POST" and bool(_ASK.fullmatch(path))


async def _body(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None when it is larger than `most`."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
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
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra: list[tuple[bytes, bytes]] = [
                (name.encode(), value.encode()) for name, value in _HEADERS.items()
            ]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return told


async def _refuse(status: int, why: str, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    content: dict[str, Any] = {"detail": why}
    await JSONResponse(content, status_code=status)(scope, receive, send)
