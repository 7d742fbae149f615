"""Who may ask: a token beyond loopback; on loopback, nobody whom a foreign web page sends."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError
from pipeline.serving.answers import error

TOKEN_VARIABLE = "SSR_TOKEN"
COOKIE = "ssr_session"
_LEAST_TOKEN = 16
_SESSION_S = 12 * 3600
_FORM_BYTES = 4096
_FORM_S = 10.0
"""Anybody may send one: who sends it for ever is not waited for."""
_OPEN = ("/healthz", "/readyz")
"""Asked by probes, which bring no token; they tell nothing but whether the service is there."""
_READING = ("GET", "HEAD", "OPTIONS")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def read_token(cfg: ServeConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of cfg.token_file, else of the environment; none = without one, on loopback only.

    Raises UserError where one is needed and missing, cannot be read, or is too short.
    """
    if cfg.token_file is not None:
        try:
            token, where = Path(cfg.token_file).read_text().strip(), cfg.token_file
        except (OSError, UnicodeDecodeError) as fault:
            reason = getattr(fault, "strerror", None) or "not a text"
            raise UserError(
                f"token_file: {cfg.token_file}: {reason}; name a file with one"
            ) from None
    else:
        token, where = environment.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token and cfg.on_loopback:
            return None
        if not token:
            raise UserError(
                f"host {cfg.host} is reached by other machines, and there is no token: put one "
                f"into a file and name it with --token_file, or into {TOKEN_VARIABLE}"
            )
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"{where}: the token has less than {_LEAST_TOKEN} characters, or some beside ASCII; "
            "make one with: openssl rand -hex 32"
        )
    return token


class Guard:
    """ASGI middleware around all there is, the page's own routes too.

    With a token: every request but the probes' brings it, as `Authorization: Bearer` or by the
    cookie that /login sets. Without one: the Host header is a name of this machine, so that no
    foreign name was made to point here. In both: the page of another site neither changes something
    nor is let read an answer.
    """

    def __init__(self, app: ASGIApp, token: str | None, host: str) -> None:
        self._app, self._token = app, token
        self._hosts = {*_LOOPBACK, host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        refusal = await self._answer(scope, headers, receive)
        if refusal is None:
            return await self._app(scope, receive, _safer(send))
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await refusal(scope, receive, _safer(send))

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive) -> Response | None:
        """What is answered here; none = the request goes on to the app."""
        path, method = scope["path"], scope.get("method", "GET")
        if path in _OPEN and method in _READING:
            return None
        if self._token is None:
            if _name(headers.get("host", "")) not in self._hosts:
                return error(403, "the Host header names another machine; ask for 127.0.0.1")
        elif _bearer(headers) is not None:
            if self._is_token(_bearer(headers) or ""):
                return None  # which no page of another site knows
            return self._unauthorized("the token is wrong")
        changing = method not in _READING or scope["type"] == "websocket"
        if _of_another_origin(headers) or (changing and _cross_site(headers)):
            return error(403, "asked from the page of another site")
        if self._token is None:
            return None
        if path == "/login":
            return await self._login(scope, headers, receive)
        if path == "/logout" and method == "POST":
            left = RedirectResponse("/login", 303)
            left.delete_cookie(COOKIE)
            return left
        if self._is_session(headers.get("cookie", "")):
            return None
        if method == "GET" and "text/html" in headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return self._unauthorized("bring the token: Authorization: Bearer ...")

    def _unauthorized(self, line: str) -> Response:
        return error(401, line, WWW_Authenticate='Bearer realm="ssr"')

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())

    async def _login(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        if scope["method"] in ("GET", "HEAD"):
            return _form()
        if scope["method"] != "POST":
            return error(405, "Method Not Allowed", Allow="GET, POST")
        try:
            async with asyncio.timeout(_FORM_S):
                body = await _small(receive)
            fields = parse_qs((body or b"").decode("latin-1"), max_num_fields=4)
        except TimeoutError:
            return error(408, "the form did not come in time")
        except ValueError:
            return error(400, "the form has other fields than the token")
        if body is None:
            return error(413, "the form is too large")
        if not self._is_token(fields.get("token", [""])[0].strip()):
            return _form("This is not the token.", 401)
        entered = RedirectResponse("/", 303)
        secure = "https" in (scope.get("scheme"), headers.get("x-forwarded-proto", ""))
        entered.set_cookie(
            COOKIE, self._session(), _SESSION_S, httponly=True, samesite="strict", secure=secure
        )
        return entered

    def _session(self) -> str:
        ends = str(int(time.time()) + _SESSION_S)
        return f"{ends}.{self._signature(ends)}"

    def _signature(self, ends: str) -> str:
        key = (self._token or "").encode()
        return hmac.new(key, f"session {ends}".encode(), hashlib.sha256).hexdigest()

    def _is_session(self, cookies: str) -> bool:
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        if found is None:
            return False
        ends, _, signature = found.value.partition(".")
        genuine = hmac.compare_digest(signature.encode(), self._signature(ends).encode())
        return genuine and ends.isdigit() and int(ends) > time.time()


async def _small(receive: Receive) -> bytes | None:
    """The body of a form; none = it is larger than one with a token."""
    body, more = b"", True
    while more and len(body) <= _FORM_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body if len(body) <= _FORM_BYTES else None


def _bearer(headers: Headers) -> str | None:
    kind, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if kind.lower() == "bearer" else None


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cross_site(headers: Headers) -> bool:
    """Whether a browser says that the page of another site asks; other clients say nothing."""
    return headers.get("sec-fetch-site") == "cross-site"


def _of_another_origin(headers: Headers) -> bool:
    """Whether a script of another site, host or port asks. Who follows a link brings no origin."""
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


def _safer(send: Send) -> Send:
    """Not to be framed, nor guessed at; and no address of ours told to others."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("X-Frame-Options", "DENY")
            headers.setdefault("Referrer-Policy", "same-origin")
        await send(message)

    return sending


_STYLE = "body{font:16px sans-serif;margin:20vh auto;max-width:22em}input{width:100%;margin:.5em 0}"
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def _form(line: str = "", status: int = 200) -> Response:
    page = (
        f'<!doctype html><html lang="en"><title>SSR-Encoder</title><style>{_STYLE}</style>'
        '<form method="post" action="/login"><label>Token '
        '<input type="password" name="token" autocomplete="current-password" required autofocus>'
        f'</label><button>Enter</button><p role="alert">{line}</p></form></html>'
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return HTMLResponse(page, status, headers)
