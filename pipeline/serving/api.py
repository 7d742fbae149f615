"""The HTTP API, on whatever Artist draws: one ASGI app, the same under uvicorn and Ray Serve."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from PIL import Image
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

import pipeline
from pipeline.config.serve import ServeConfig
from pipeline.generation import png
from pipeline.generation.recipe import Recipe
from pipeline.serving.access import Guard
from pipeline.serving.answers import (
    Refused,
    answer_faults,
    described,
    first_fault,
)
from pipeline.serving.artist import Artist, Drawn, Facts, Gone, Late, Look
from pipeline.serving.bodies import (
    AttentionBody,
    FactsBody,
    HealthBody,
    PictureBody,
)
from pipeline.serving.metrics import CountRequests, Metered, Metrics
from pipeline.serving.openapi import FILES, MOST_QUERIES, REF, describe, multipart
from pipeline.serving.service import LetIn, Service
from pipeline.serving.uploads import LimitBody, files_of, form_of, only, text_of

T = TypeVar("T")
_READY_S = 5.0


def make_app(artist: Artist, cfg: ServeConfig, token: str | None = None) -> FastAPI:
    """The API, behind its guard: the whole of what is mounted on it later is, too.

    `app.state.service` is its Service; `app.state.artist` is for a page beside it. token: see
    access.read_token.
    """
    if token is None and not cfg.on_loopback:
        raise ValueError(f"{cfg.host} is reached by other machines: a token is needed")
    metrics = Metrics()
    service = Service(Metered(artist, metrics), cfg, metrics)
    app = FastAPI(
        title="SSR-Encoder",
        version=pipeline.__version__,
        description="Draws the selected subjects of uploaded pictures.",
        docs_url=None,  # Swagger UI and ReDoc load scripts of a foreign host
        redoc_url=None,
    )
    app.state.service, app.state.artist = service, LetIn(service)
    answer_faults(app)
    _pictures(app, service)
    _attention(app, service)
    _standing(app, service)
    describe(app, service, with_token=token is not None)
    app.add_middleware(LimitBody, most=cfg.limits.upload_mib * 2**20)
    app.add_middleware(Guard, token=token, host=cfg.host)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


def _pictures(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/pictures",
        operation_id="draw",
        summary="Draw a picture",
        response_class=Response,
        responses={
            200: {
                "model": PictureBody,
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
                "description": "The PNG, which holds its recipe; or JSON, where that was asked for",
            },
            **described(408, 415, 422, 429, 503, 504),
        },
        openapi_extra=multipart(
            {
                "recipe": {"$ref": REF.format(model="Recipe")},
                "files": FILES,
                "attention": {
                    "type": "boolean",
                    "default": False,
                    "description": "Answer JSON, and in it where the aligner looked.",
                },
            },
            required=["recipe"],
            json_field="recipe",
        ),
    )
    async def draw(request: Request) -> Response:
        async with (
            service.request() as ends,
            form_of(request, ends - time.monotonic(), 2 * service.cfg.limits.subjects + 1) as form,
        ):
            only(form, "recipe", "files", "attention")
            said = text_of(form, "recipe")
            if said is None:
                raise Refused(422, "recipe: missing; send it as a field with JSON")
            try:
                body = service.recipe.model_validate_json(said)
            except ValidationError as fault:
                raise first_fault(fault, "recipe") from None
            with_attention = _flag(text_of(form, "attention"))
            if body.deadline_s is not None:
                ends = min(ends, time.monotonic() + body.deadline_s)
            files = files_of(form, "files")

            async def work() -> Response:
                recipe = await _before(ends, service.decoder.recipe(body, files))
                looks = await _looks(service.artist, recipe, ends) if with_attention else []
                drawn = await _drawn(service.artist, recipe, ends)
                if with_attention or _wants_json(request):
                    return JSONResponse(await asyncio.to_thread(_picture_body, drawn, looks))
                return Response(drawn.png, media_type="image/png")

            return await service.while_wanted(request, work())


def _attention(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/attention",
        operation_id="look",
        summary="See where the aligner looks",
        responses={200: {"model": AttentionBody}, **described(408, 415, 422, 429, 503, 504)},
        response_class=JSONResponse,
        openapi_extra=multipart(
            {
                "image": {**FILES["items"], "description": "jpg, png, webp."},
                "queries": {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": MOST_QUERIES,
                    "description": "Words that name subjects; the field once for each.",
                },
            },
            required=["image", "queries"],
        ),
    )
    async def look(request: Request) -> Response:
        async with service.request() as ends, form_of(request, ends - time.monotonic(), 1) as form:
            only(form, "image", "queries")
            files = files_of(form, "image")
            if len(files) != 1:
                raise Refused(422, f"image: {len(files)} files; upload one")
            try:
                queries = service.queries.validate_python(form.getlist("queries"))
            except ValidationError as fault:
                raise first_fault(fault, "queries") from None
            if not 1 <= len(queries) <= MOST_QUERIES:
                raise Refused(422, f"queries: {len(queries)}; give 1 to {MOST_QUERIES}")

            async def work() -> Response:
                image = await _before(ends, service.decoder.picture("image", files[0]))
                looks = await service.artist.look(image, queries, _left(ends))
                bodies = await asyncio.to_thread(lambda: [_look_body(image, it) for it in looks])
                return JSONResponse({"looks": bodies})

            return await service.while_wanted(request, work())


def _standing(app: FastAPI, service: Service) -> None:
    """How the service is: for people, for Kubernetes, for Prometheus."""

    @app.get(
        "/v1/facts",
        operation_id="facts",
        summary="What the service can do",
        responses={200: {"model": FactsBody}, **described(503)},
        response_class=JSONResponse,
    )
    async def facts() -> Response:
        found: Facts = await _in_time(service.artist.facts())
        cfg = service.cfg
        return JSONResponse(
            {**asdict(found), "limits": asdict(cfg.limits), "deadline_s": cfg.deadline_s}
        )

    @app.get(
        "/healthz",
        operation_id="health",
        summary="Whether the process answers",
        responses={200: {"model": HealthBody}, **described()},
        response_class=JSONResponse,
    )
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get(
        "/readyz",
        operation_id="ready",
        summary="Whether pictures can be asked for",
        responses={200: {"model": HealthBody}, **described(503)},
        response_class=JSONResponse,
    )
    async def ready() -> Response:
        if service.draining:
            raise Gone("the service is stopping")
        await _in_time(service.artist.facts())
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics",
        operation_id="metrics",
        summary="Figures for Prometheus",
        responses={200: {"content": {"text/plain": {}}, "description": "Text"}, **described()},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _drawn(artist: Artist, recipe: Recipe, ends: float) -> Drawn:
    drawing: Any = artist.draw(recipe, _left(ends))
    async with aclosing(drawing):
        async for told in drawing:
            if isinstance(told, Drawn):
                return told
    raise Gone("no picture came")


async def _looks(artist: Artist, recipe: Recipe, ends: float) -> list[dict[str, Any]]:
    """Of each subject that has a query, in their order."""
    found = []
    for number, subject in enumerate(recipe.subjects):
        if subject.query:
            (look,) = await artist.look(subject.image, [subject.query], _left(ends))
            body = await asyncio.to_thread(_look_body, subject.image, look)
            found.append({"subject": number, **body})
    return found


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise Late("the deadline passed before it was begun")
    return left


def _look_body(image: Image.Image, look: Look) -> dict[str, Any]:
    from ssr_model.maps import overlay  # torch: not before it is needed

    shown = overlay(image.crop(look.box), look.attention)
    return {
        "query": look.query,
        "box": list(look.box),
        "attention": [[round(float(value), 6) for value in row] for row in look.attention],
        "overlay": _base64(png.encode(shown, quick=True)),
    }


def _picture_body(drawn: Drawn, looks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "picture": _base64(drawn.png),
        "settings": png.made_by(drawn.png) or {},
        "batch": drawn.batch,
        "attention": looks,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _flag(text: str | None) -> bool:
    if text is None or text.lower() in ("", "false", "0"):
        return False
    if text.lower() in ("true", "1"):
        return True
    raise Refused(422, "attention: neither true nor false")


def _wants_json(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    return "application/json" in accept and "image/png" not in accept


async def _before(ends: float, asked: Coroutine[Any, Any, T]) -> T:
    try:
        return await asyncio.wait_for(asked, max(ends - time.monotonic(), 0))
    except TimeoutError:
        raise Late("its pictures were not decoded in time") from None


async def _in_time(asked: Coroutine[Any, Any, T]) -> T:
    try:
        return await asyncio.wait_for(asked, _READY_S)
    except TimeoutError:
        raise Gone(f"no answer within {_READY_S:g} s") from None
