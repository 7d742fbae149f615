"""What gets through to Gradio: the routes that the page uses, and bodies of words and numbers."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import gradio as gr
import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from pipeline.config.serve import ServeConfig
from pipeline.generation.recipe import Recipe
from pipeline.serving.api import make_app
from pipeline.serving.artist import Drawn, Facts, Look, Step
from pipeline.serving.page import build_page, mount_page
from pipeline.serving.page_gate import holds_scalars
from tests.pipeline.serving.asking import line


class Nobody:
    """An artist who was asked for nothing, and says so."""

    asked = 0

    async def facts(self) -> Facts:
        return Facts(32, 8, False, {}, "cpu")

    async def draw(self, recipe: Recipe, within_s: float) -> AsyncIterator[Step | Drawn]:
        self.asked += 1
        yield Step(1, 1)

    async def look(self, image: Image.Image, queries: list[str], within_s: float) -> list[Look]:
        self.asked += 1
        return [Look(query, np.ones((8, 8), np.float32), (0, 0, 8, 8)) for query in queries]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The whole: the API, its guard, and the page on it."""
    cfg = ServeConfig()
    cfg.limits.upload_mib = 1
    app = make_app(Nobody(), cfg)
    return mount_page(app, app.state.artist, cfg)


def ask(app: FastAPI, method: str, path: str, **what: Any) -> httpx.Response:
    """One request, without a server."""

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **what)

    return anyio.run(work)


def test_the_page_and_the_services_own_routes_are_open(app: FastAPI) -> None:
    page = ask(app, "GET", "/")
    assert page.status_code == 200 and "SSR on Ray" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy.replace("http-equiv", "")
    assert ask(app, "GET", "/healthz").json() == {"status": "alive"}
    paths = ask(app, "GET", "/openapi.json").json()["paths"]
    assert "/v1/pictures" in paths and not any("gradio" in path for path in paths)


@pytest.mark.parametrize("guidance", [0.0, 7.5, 100.0])
def test_gradio_lets_the_default_guidance_in(guidance: float) -> None:
    """It refuses what lies outside of a slider's ends, and nothing would be drawn."""
    widgets = build_page(Nobody(), ServeConfig(guidance=guidance)).blocks.values()
    (slider,) = (each for each in widgets if getattr(each, "label", "") == "Guidance")
    assert isinstance(slider, gr.Slider) and slider.preprocess(slider.value) == guidance


@pytest.mark.parametrize(
    "method, path, allowed",
    [("GET", "/v1/pictures", "POST"), ("POST", "/v1/facts", "GET"), ("PUT", "/readyz", "GET")],
)
def test_the_services_routes_say_their_methods(
    app: FastAPI, method: str, path: str, allowed: str
) -> None:
    """Though the page, which is mounted at /, is asked as well."""
    answer = ask(app, method, path)
    line(answer, 405)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://a",
        "/gradio_api/file=http://127.0.0.1:9/x", "/gradio_api/info", "/gradio_api/openapi.json",
        "/gradio_api/runs", "/gradio_api/deep_link", "/?deep_link=../../x", "/monitoring",
        "/gradio_api/custom_component/1/client/component/x", "/svelte/x", "/nothing",
        "/assets/../gradio_api/info", "/gradio_api/vibe-code",
    ],
)  # fmt: skip
def test_what_reads_files_or_tells_of_them_is_closed(app: FastAPI, path: str) -> None:
    line(ask(app, "GET", path), 404)


def test_no_page_of_another_host_is_let_read(app: FastAPI) -> None:
    """Gradio would tell browsers that some may."""
    answer = ask(app, "GET", "/config", headers={"origin": "http://127.0.0.1"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    line(ask(app, "GET", "/config", headers={"origin": "http://localhost:3000"}), 403)


@pytest.mark.parametrize(
    "path", ["upload", "run/predict", "api/predict", "call/x", "component_server", "login",
             "process_recording", "run-history/connect", "stream/x"],
)  # fmt: skip
def test_nothing_but_the_queue_is_asked(app: FastAPI, path: str) -> None:
    answer = ask(app, "POST", f"/gradio_api/{path}", files={"files": b"x"})
    line(answer, 404)
    assert ask(app, "PUT", "/gradio_api/queue/join").status_code == 404


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """An address of this machine at which nobody must knock."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("how", ["a path", "an address", "another address", "a list", "inside"])
def test_a_crafted_file_or_address_is_refused(
    app: FastAPI, listener: socket.socket, how: str
) -> None:
    url = "http://{}:{}/x.png".format(*listener.getsockname())
    file = {"meta": {"_type": "gradio.FileData"}}
    crafted = {
        "a path": {"path": "/etc/passwd", **file},
        "an address": {"path": url, **file},
        "another address": {"path": "x.png", "url": url, **file},
        "a list": [{"path": url, **file}],
        "inside": {"value": {"path": url, **file}},
    }[how]
    said = {"fn_index": 0, "session_hash": "a"}
    for values in (
        {"data": [crafted]},
        {"data": ["x"], "event_data": crafted},
        {"data": ["x"], "event_data": {"image": crafted}},
    ):
        answer = ask(app, "POST", "/gradio_api/queue/join", json={**said, **values})
        assert "no files" in line(answer, 400)
    beside = ask(
        app, "POST", "/gradio_api/queue/join", json={**said, "data": [], "request": crafted}
    )
    line(beside, 400)


def test_bodies_that_are_no_form(app: FastAPI) -> None:
    assert not holds_scalars(json.dumps({"data": [0] * 1000}).encode())
    for body in (b"{", b"[1]", b'"x"', b"[" * 100_000, b'{"data": {"a": 1}}', b"\xff\xfe"):
        assert not holds_scalars(body)
    assert holds_scalars(b'{"data": ["a", 1, 2.5, true, null], "event_data": {"index": 1}}')
    large = b'{"data": ["' + b"a" * 2**20 + b'"]}'
    answer = ask(app, "POST", "/gradio_api/queue/join", content=large)
    assert "1,048,576 bytes" in line(answer, 413)

    async def untold() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"a" * 2**16

    line(ask(app, "POST", "/gradio_api/queue/join", content=untold()), 413)


def test_no_endpoint_is_public(app: FastAPI) -> None:
    """Gradio's clients find nothing to call: the documented API is the service's own."""
    for dependency in ask(app, "GET", "/config").json()["dependencies"]:
        assert dependency["api_visibility"] == "private"
