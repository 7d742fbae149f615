"""Who may ask: tokens, cookies, foreign names and foreign pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, WebSocket

from pipeline.config import ServeConfig
from pipeline.errors import UserError
from pipeline.serving import access
from pipeline.serving.access import COOKIE, Guard, read_token
from pipeline.serving.api import make_app
from tests.pipeline.serving.asking import app, asked, asking, client, line

TOKEN = "a-token-of-the-tests-0123456789"


def test_beyond_loopback_a_token_is_needed(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert read_token(ServeConfig(host=host), {}) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(UserError, match="token_file") as caught:
            read_token(ServeConfig(host=host), {})
        assert "SSR_TOKEN" in str(caught.value) and "\n" not in str(caught.value)
        assert read_token(ServeConfig(host=host), {"SSR_TOKEN": TOKEN}) == TOKEN
        with pytest.raises(ValueError, match="token"):
            make_app(None, ServeConfig(host=host))  # type: ignore[arg-type]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(ServeConfig(token_file=str(tmp_path / "token")), {}) == TOKEN
    (tmp_path / "short").write_text("hunter2")
    (tmp_path / "bytes").write_bytes(b"\xff" * 40)
    for name in ("short", "bytes", "missing"):
        with pytest.raises(UserError, match="token"):
            read_token(ServeConfig(token_file=str(tmp_path / name)), {})


def guarded() -> FastAPI:
    return app(token=TOKEN, host="0.0.0.0")


def test_with_a_token_nothing_is_told_without_it() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        for path in (
            "/",
            "/v1/facts",
            "/openapi.json",
            "/metrics",
            "/gradio_api/info",
            "/healthz/x",
        ):
            answer = await c.get(path)
            line(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Bearer")
        line(await c.post("/v1/pictures", **asked()), 401)
        for wrong in ("Bearer ", "Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
            answer = await c.get("/v1/facts", headers={"authorization": wrong})
            assert TOKEN not in line(answer, 401)
        for path in ("/healthz", "/readyz"):
            assert (await c.get(path)).status_code == 200, "probes bring none"
        bearer = {"authorization": f"Bearer {TOKEN}", "host": "any.name.example"}
        assert (await c.get("/v1/facts", headers=bearer)).status_code == 200
        drawn = await c.post("/v1/pictures", headers=bearer, **asked())
        assert drawn.status_code == 200
        said = (await c.get("/openapi.json", headers=bearer)).json()
        assert said["security"] == [{"token": []}]

    asking(guarded(), test)


def test_people_log_in_with_a_form() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        page = {"accept": "text/html"}
        sent = await c.get("/", headers=page)
        assert (sent.status_code, sent.headers["location"]) == (303, "/login")
        form = await c.get("/login")
        assert "<form" in form.text and "<script" not in form.text
        assert "default-src 'none'" in form.headers["content-security-policy"]
        refused = await c.post("/login", data={"token": "<b>wrong"})
        assert refused.status_code == 401 and "<b>wrong" not in refused.text
        assert COOKIE not in c.cookies
        line(await c.post("/login", content=b"token=" + b"x" * 5000), 413)
        line(await c.put("/login"), 405)
        line(await c.post("/login", content=b"token=a&b=1&c=1&d=1&e=1"), 400)

        entered = await c.post("/login", data={"token": TOKEN})
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
        assert TOKEN not in entered.headers["set-cookie"]
        assert (await c.get("/v1/facts")).status_code == 200
        foreign = {"origin": "http://elsewhere.example"}
        line(await c.post("/v1/pictures", headers=foreign, **asked()), 403)
        own = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
        assert (await c.post("/v1/pictures", headers=own, **asked())).status_code == 200
        assert (await c.post("/logout")).status_code == 303
        assert COOKIE not in c.cookies
        over_tls = {"x-forwarded-proto": "https"}
        tls = await c.post("/login", data={"token": TOKEN}, headers=over_tls)
        assert "secure" in tls.headers["set-cookie"].lower()

    asking(guarded(), test)


def test_a_form_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has shown a token yet."""
    monkeypatch.setattr(access, "_FORM_S", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"token="
        await asyncio.sleep(30)

    async def test(c: httpx.AsyncClient) -> None:
        line(await c.post("/login", content=slow()), 408)

    asking(guarded(), test)


def test_a_cookie_is_not_to_be_made_up() -> None:
    guard = Guard(guarded(), TOKEN, "0.0.0.0")
    genuine = guard._session()
    ends, _, signature = genuine.partition(".")
    later = f"{int(ends) + 1}.{signature}"
    past = f"1.{guard._signature('1')}"
    of_another = Guard(guarded(), TOKEN + "x", "0.0.0.0")._session()

    async def test(c: httpx.AsyncClient) -> None:
        for value in (later, past, of_another, "", ".", TOKEN, f"{ends}.", '"', "é"):
            raw = f"{COOKIE}={value}".encode()
            line(await c.get("/v1/facts", headers=[(b"cookie", raw)]), 401)
        answer = await c.get("/v1/facts", headers={"cookie": f"{COOKIE}={genuine}"})
        assert answer.status_code == 200

    asking(guarded(), test)


def test_on_loopback_a_foreign_name_and_a_foreign_page_are_refused() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            assert (await c.get("/v1/facts", headers={"host": host})).status_code == 200
        for host in ("evil.example:8000", "127.0.0.1.evil.example", "", "[", "localhost@evil"):
            line(await c.get("/v1/facts", headers={"host": host}), 403)
        for header in (
            {"sec-fetch-site": "cross-site"},
            {"origin": "https://evil.example"},
            {"origin": "http://127.0.0.1:3000"},
            {"origin": "null"},
        ):
            line(await c.post("/v1/pictures", headers=header, **asked()), 403)
            if "origin" in header:
                line(await c.get("/v1/facts", headers=header), 403)
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert (await c.get("/v1/facts", headers=link)).status_code == 200, "a link leads here"
        line(await c.get("/login"), 404)

    asking(app(), test)


def test_what_is_mounted_later_is_behind_it_too() -> None:
    of, page = guarded(), FastAPI()

    @page.get("/secret")
    def secret() -> str:
        return "secret"

    @page.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()

    of.mount("/", page)

    async def test() -> None:
        async with client(of) as c:
            line(await c.get("/secret"), 401)
            bearer = {"authorization": f"Bearer {TOKEN}"}
            assert (await c.get("/secret", headers=bearer)).json() == "secret"
        sent = list[str]()

        async def send(message: dict[str, str]) -> None:
            sent.append(message["type"])

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": "/live", "headers": [], "query_string": b""}
        await of(scope, receive, send)  # type: ignore[arg-type]
        assert sent == ["websocket.close"]

    asyncio.run(test())
