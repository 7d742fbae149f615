"""The API: what comes back, and every status, on a real queue with a counted sampler."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline.generation import png
from pipeline.generation.recipe import rebuild
from pipeline.serving.artist import Drawn, Facts, Gone, Look, Step
from tests.hostile import scan_bomb
from tests.pipeline.serving.asking import LIMITS, app, asked, asking, client, line
from tests.pipeline.serving.painter import PATIENCE_S, Painter, picture


def mask(*size: int) -> bytes:
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_comes_back_with_its_recipe() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        subjects = [
            {"image": 0, "query": " cup ", "scale": 0.5, "region": [0, 0, 0.5, 1]},
            {"image": 1, "mask": 2},
        ]
        files = (picture(), picture(20, 20, "red", "JPEG"), mask(40, 40))
        given = {"subjects": subjects, "seed": 7, "size": [32, 48], "guidance": 2, "steps": 4}
        answer = await c.post("/v1/pictures", **asked(*files, **given))
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        said = png.made_by(answer.content)
        assert said is not None
        recipe = rebuild(said["recipe"], png.sources(answer.content))
        assert (recipe.prompt, recipe.seed, recipe.steps) == ("a cup on snow", 7, 4)
        assert (recipe.size, recipe.guidance, recipe.guidance_rescale) == ((32, 48), 2.0, 0.0)
        cup, other = recipe.subjects
        assert (cup.query, cup.scale, cup.region) == ("cup", 0.5, (0, 0, 0.5, 1))
        assert (cup.name, cup.image.size, cup.mask) == ("photo 0", (40, 30), None)
        assert other.query is None and other.mask is not None
        assert np.asarray(other.mask)[:, :10].all() and not np.asarray(other.mask)[:, 10:].any()

    asking(app(), test)


def test_json_with_attention_where_it_is_asked_for() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        subjects = [{"image": 0, "query": "cup"}, {"image": 0, "mask": 1}]
        given = asked(picture(), mask(40, 30), subjects=subjects, attention="true")
        said = (await c.post("/v1/pictures", **given)).json()
        data = base64.b64decode(said["picture"])
        assert png.made_by(data) == said["settings"] and said["batch"] == 1
        (look,) = said["attention"]  # a mask has no attention
        assert (look["subject"], look["query"], look["box"]) == (0, "cup", [0, 0, 40, 30])
        assert np.asarray(look["attention"]).shape == (8, 8)
        assert png.picture(base64.b64decode(look["overlay"])).size == (40, 30)

        plain = await c.post("/v1/pictures", **asked(), headers={"accept": "application/json"})
        assert plain.json()["attention"] == [] and plain.json()["picture"]

        queries = {"data": {"queries": ["cup", "fish"]}, "files": [("image", ("a", picture()))]}
        looks = (await c.post("/v1/attention", **queries)).json()["looks"]
        assert [look["query"] for look in looks] == ["cup", "fish"]
        assert sum(map(sum, looks[0]["attention"])) == pytest.approx(1)

    asking(app(), test)


def test_a_control_image_is_one_of_the_files() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        assert (await c.get("/v1/facts")).json()["controlnet"] is True
        given = asked(picture(), picture(20, 24, "red"), control=1, control_scale=0.5)
        answer = await c.post("/v1/pictures", **given)
        assert answer.status_code == 200, answer.text
        said = png.made_by(answer.content)
        assert said is not None
        recipe = rebuild(said["recipe"], png.sources(answer.content))
        assert recipe.control is not None and recipe.control_scale == 0.5
        assert (recipe.control.size, recipe.control.getpixel((0, 0))) == ((20, 24), (255, 0, 0))

    asking(app(controlnet="edges"), test)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (asked(prompt=" "), 422, "prompt: missing"),
    (asked(prompt="a" * 41), 422, "recipe.prompt: "),
    (asked(steps=21), 422, "recipe.steps: "),
    (asked(steps="many"), 422, "recipe.steps: "),
    (asked(seed=-1), 422, "recipe.seed: "),
    (asked(size=[65, 64]), 422, "recipe.size[0]: "),
    (asked(size=[30, 32]), 422, "size: 30x32"),
    (asked(stepps=3), 422, "recipe.stepps: "),
    (asked(deadline_s=0), 422, "recipe.deadline_s: "),
    (asked(control=0), 422, "control: "),
    (asked(control=3), 422, "recipe.control: files[3] of 1"),
    (asked(subjects=[{"image": 0, "query": "a"}] * 3), 422, "recipe.subjects: "),
    (asked(subjects=[{"image": 1, "query": "a"}]), 422, "recipe.subjects[0].image: files[1] of 1"),
    (asked(subjects=[{"image": 0, "mask": 1}]), 422, "recipe.subjects[0].mask: files[1] of 1"),
    (asked(subjects=[{"image": 0}]), 422, "recipe.subjects[0]: neither a query nor a mask"),
    (asked(subjects=[{"image": 0, "query": " "}]), 422, "recipe.subjects[0]: neither"),
    (asked(subjects=[{"image": "/etc/passwd", "query": "a"}]), 422, "recipe.subjects[0].image: "),
    (asked(subjects=[{"image": 0, "query": "a", "scale": 1e9}]), 422, "[0].scale: "),
    (asked(subjects=[{"image": 0, "query": "a", "region": [0.5, 0, 0.5, 1]}]), 422, "region: "),
    (asked(picture(), mask(30, 30), subjects=[{"image": 0, "mask": 1}]), 422, "files[1]: the mask"),
    (asked(picture(101, 100)), 422, "files[0]: 101x100 pixels"),
    (asked(b"no picture"), 422, "files[0]: not a readable image (of no known format)"),
    (asked(picture()[:60]), 422, "files[0]: not a readable image"),
    (asked(b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run"), 422, "files[0]: not a readable image"),
    (asked(scan_bomb(64, 200)), 422, "files[0]: a JPEG of too many scans"),
    (asked(attention="maybe"), 422, "attention: "),
    ({"files": [("files", ("a.png", picture()))]}, 422, "recipe: missing"),
    ({"files": [("recipe", ("a.png", picture()))]}, 422, "recipe: is a file"),
    ({**asked(), "data": {"recipe": "{"}}, 400, "recipe: Invalid JSON"),
    ({**asked(), "data": {"recipe": "[]"}}, 422, "recipe: "),
    ({**asked(), "data": {"recipe": ["{}", "{}"]}}, 422, "recipe: given 2 times"),
    ({**asked(), "data": {"recipe": "{}", "url": "http://h"}}, 422, "url: no such field"),
    ({"json": {}}, 415, "content-type: application/json"),
    ({}, 415, "content-type: none"),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    (asked(*[picture()] * 6), 400, "Too many files"),
]


def test_what_cannot_be_is_refused_with_its_place() -> None:
    painter = Painter()

    async def test(c: httpx.AsyncClient) -> None:
        for given, status, reason in REFUSED:
            assert reason in line(await c.post("/v1/pictures", **given), status)
        image = [("image", ("a.png", picture()))]
        for data, reason in (({}, "queries: 0"), ({"queries": [""]}, "queries[0]: "),
                             ({"queries": ["a"] * 17}, "queries: 17"),
                             ({"queries": ["wrong"]}, "no such word")):  # fmt: skip
            assert reason in line(await c.post("/v1/attention", data=data, files=image), 422)
        two = await c.post("/v1/attention", data={"queries": "cup"}, files=image * 2)
        line(two, 400)
        line(await c.get("/nothing"), 404)
        answer = await c.get("/v1/pictures")
        line(answer, 405)
        assert answer.headers["allow"] == "POST"

    asking(app(painter), test)
    assert painter.batches == [], "nothing of it was drawn"


def test_no_name_of_a_file_is_opened_and_none_is_trusted() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        names = (
            "../../etc/passwd",
            "/etc/passwd",
            "http://host/a.png",
            "C:\\a\\b.png",
            "a\x1b[2J.png",
        )
        for name in names:
            given = {**asked(), "files": [("files", (name, picture()))]}
            answer = await c.post("/v1/pictures", **given)
            assert answer.status_code == 200, "the bytes are what is read"
            said = png.made_by(answer.content)
            assert said is not None
            kept = said["recipe"]["subjects"][0]["name"]
            assert "/" not in kept and "\\" not in kept and kept.isprintable()

    asking(app(), test)


def test_a_body_is_counted_while_it_comes() -> None:
    read = list[int]()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            read.append(2**16)
            yield b"x" * 2**16

    async def test(c: httpx.AsyncClient) -> None:
        large = asked(b"x" * (LIMITS.upload_mib * 2**20))
        assert "larger than 1,048,576 bytes" in line(await c.post("/v1/pictures", **large), 413)
        kind = {"content-type": 'multipart/form-data; boundary="b"'}
        start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'

        async def body() -> AsyncIterator[bytes]:
            yield start
            async for part in endless():
                yield part

        line(await c.post("/v1/pictures", content=body(), headers=kind), 413)
        assert sum(read) <= 2 * LIMITS.upload_mib * 2**20, "it does not read on"

    asking(app(), test)


def test_a_request_that_comes_too_slowly() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"--b\r\n"
        await asyncio.sleep(PATIENCE_S)
        yield b""

    async def test(c: httpx.AsyncClient) -> None:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        line(await c.post("/v1/pictures", content=body(), headers=kind), 408)

    asking(app(deadline_s=0.3), test)


def test_a_hundred_at_once_are_drawn_or_told_to_come_again() -> None:
    painter = Painter()

    async def test(c: httpx.AsyncClient) -> None:
        found = await asyncio.gather(*(c.post("/v1/pictures", **asked(seed=i)) for i in range(100)))
        statuses = Counter(answer.status_code for answer in found)
        assert set(statuses) == {200, 429} and statuses[200] >= 8, statuses
        for answer in found:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                line(answer, 429)
        assert (await c.post("/v1/pictures", **asked())).status_code == 200
        assert sum(map(len, painter.batches)) == statuses[200] + 1

    asking(app(painter, queue=8), test)


def test_late_is_said_and_not_drawn_on() -> None:
    painter = Painter()
    painter.go.clear()

    async def test(c: httpx.AsyncClient) -> None:
        assert "not done within" in line(await c.post("/v1/pictures", **asked(deadline_s=2)), 504)
        painter.go.set()
        assert (await c.post("/v1/pictures", **asked(steps=2))).status_code == 200
        assert painter.steps <= 3

    asking(app(painter), test)


def test_a_client_that_leaves_is_not_drawn_for() -> None:
    painter = Painter()
    painter.go.clear()
    of = app(painter)
    request = httpx.Request("POST", "http://127.0.0.1/v1/pictures", **asked(steps=20))
    body, left = request.read(), asyncio.Event()
    sent = list[Any]()

    async def receive() -> dict[str, Any]:
        nonlocal body
        if body:
            part, body = body, b""
            return {"type": "http.request", "body": part}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def test() -> None:
        headers = [(k.lower().encode(), v.encode()) for k, v in request.headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/pictures", "query_string": b""}
        asking = of({**scope, "headers": headers, "http_version": "1.1"}, receive, send)
        task = asyncio.create_task(asking)  # type: ignore[arg-type]
        assert await asyncio.to_thread(painter.begun.acquire, timeout=PATIENCE_S)
        left.set()
        await asyncio.wait_for(task, PATIENCE_S)
        painter.go.set()
        async with client(of) as c:
            assert (await c.post("/v1/pictures", **asked(steps=2))).status_code == 200
            text = (await c.get("/metrics")).text
        assert painter.steps <= 4, "of twenty-two"
        assert 'route="/v1/pictures",status="499"' in text

    asyncio.run(test())


class Silent:
    """An artist whose process is gone: it raises, or says nothing at all."""

    def __init__(self, hangs: bool = False, fault: Exception | None = None) -> None:
        self.hangs, self.fault = hangs, fault or Gone("its process has ended")

    async def facts(self) -> Facts:
        if self.hangs:
            await asyncio.sleep(PATIENCE_S)
        raise self.fault

    async def draw(self, recipe: object, within_s: float) -> AsyncIterator[Step | Drawn]:
        raise self.fault
        yield

    async def look(self, image: object, queries: list[str], within_s: float) -> list[Look]:
        raise self.fault


def test_an_artist_that_is_gone() -> None:
    from pipeline.config import ServeConfig
    from pipeline.serving.api import make_app

    async def gone(c: httpx.AsyncClient) -> None:
        picture_of = await c.post("/v1/pictures", **asked())
        for answer in (picture_of, await c.get("/readyz"), await c.get("/v1/facts")):
            assert "its process has ended" in line(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
        assert (await c.get("/healthz")).json() == {"status": "alive"}

    asking(make_app(Silent(), ServeConfig()), gone)  # type: ignore[arg-type]

    async def fails() -> None:
        of = make_app(Silent(fault=RuntimeError("secret at 0x7f")), ServeConfig())  # type: ignore[arg-type]
        transport = httpx.ASGITransport(of, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as c:
            assert "secret" not in line(await c.post("/v1/pictures", **asked()), 500)

    asyncio.run(fails())


def test_a_probe_is_answered_though_the_artist_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config import ServeConfig
    from pipeline.serving import api

    monkeypatch.setattr(api, "_READY_S", 0.2)

    async def test(c: httpx.AsyncClient) -> None:
        line(await c.get("/readyz"), 503)

    asking(api.make_app(Silent(hangs=True), ServeConfig()), test)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_time", [True, False])
def test_a_drain_finishes_what_is_begun(in_time: bool) -> None:
    painter = Painter()
    painter.go.clear()
    of = app(painter)

    async def test(c: httpx.AsyncClient) -> None:
        begun = asyncio.create_task(c.post("/v1/pictures", **asked()))
        assert await asyncio.to_thread(painter.begun.acquire, timeout=PATIENCE_S)
        drain = asyncio.create_task(of.state.service.drain(PATIENCE_S if in_time else 0.2))
        await asyncio.sleep(0)
        assert of.state.service.draining and not drain.done()
        for answer in (await c.get("/readyz"), await c.post("/v1/pictures", **asked())):
            assert "stopping" in line(answer, 503)
        with pytest.raises(Gone):
            await of.state.artist.look(Image.new("RGB", (8, 8)), ["a"], 1.0)
        assert (await c.get("/healthz")).status_code == 200
        if in_time:
            painter.go.set()
        assert await drain is in_time
        answer = await begun
        assert answer.status_code == (200 if in_time else 503)
        painter.go.set()

    asking(of, test)


def test_figures_for_prometheus() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        await asyncio.gather(*(c.post("/v1/pictures", **asked()) for _ in range(3)))
        await c.get("/made/up/by/clients")
        text = (await c.get("/metrics")).text
        assert 'ssr_requests_total{method="POST",route="/v1/pictures",status="200"} 3.0' in text
        assert 'ssr_requests_total{method="GET",route="other",status="404"} 1.0' in text
        assert "ssr_steps_total 9.0" in text and "made/up" not in text
        assert "ssr_batch_pictures_count 3.0" in text and "ssr_batch_pictures_sum 9.0" in text
        assert "ssr_waiting 0.0" in text and "ssr_drawing 0.0" in text
        assert 'ssr_request_seconds_count{route="/v1/pictures"} 3.0' in text

    asking(app(batch=3, batch_wait_ms=10_000), test)


def test_openapi_says_all_of_it_and_no_foreign_script_is_served() -> None:
    async def test(c: httpx.AsyncClient) -> None:
        said = (await c.get("/openapi.json")).json()
        recipe = said["components"]["schemas"]["Recipe"]
        assert recipe["properties"]["steps"]["maximum"] == LIMITS.steps
        assert recipe["properties"]["steps"]["default"] == 3
        assert recipe["properties"]["subjects"]["maxItems"] == LIMITS.subjects
        draw = said["paths"]["/v1/pictures"]["post"]
        statuses = {200, 400, 401, 403, 405, 408, 413, 415, 422, 429, 500, 503, 504}
        assert set(map(int, draw["responses"])) == statuses
        assert set(draw["responses"]["200"]["content"]) == {"image/png", "application/json"}
        assert "#/components/schemas/Subject" in json.dumps(recipe)
        assert "Subject" in said["components"]["schemas"]
        for path in ("/docs", "/redoc"):
            line(await c.get(path), 404)
        facts = (await c.get("/v1/facts")).json()
        assert facts["side"] == 32 and facts["limits"]["steps"] == LIMITS.steps

    asking(app(), test)
