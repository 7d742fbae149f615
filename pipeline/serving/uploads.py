"""What a request brings: counted while it comes, decoded a few at a time, never opened by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from typing import TypeVar

from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config.serve import LimitsConfig
from pipeline.generation.recipe import Recipe, Reference
from pipeline.generation.references import UPLOADED, bounded, open_picture, reference
from pipeline.serving.answers import ClientGone, Refused, error
from pipeline.serving.bodies import RecipeBody

T = TypeVar("T")
_AT_ONCE = 2
"""Requests whose pictures are decoded at a time: each takes `limits.pixels` x 4 bytes, twice."""
_FIELD_BYTES = 256 * 1024
_MOST_FIELDS = 40
_NAME = 60


class LimitBody:
    """ASGI middleware: a body of more bytes is answered 413, before it is read where its length is
    told, else as soon as it is too long.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        line = f"the request is larger than {self._most:,} bytes"
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told[:20]) > self._most:
            return await error(413, line)(scope, receive, send)
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._most:
                raise HTTPException(413, line)
            return message

        await self._app(scope, counted, send)


@asynccontextmanager
async def form_of(request: Request, within_s: float, files: int) -> AsyncIterator[FormData]:
    """The multipart form; its files are closed with the block.

    Raises Refused for another kind of body, one that cannot be read, and one that comes slowly.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refused(415, f"content-type: {kind or 'none'}; send multipart/form-data")
    asked = request.form(max_files=files, max_fields=_MOST_FIELDS, max_part_size=_FIELD_BYTES)
    try:
        async with asyncio.timeout(within_s):
            form = await asked
    except TimeoutError:
        raise Refused(408, f"the request did not come within {within_s:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        yield form
    finally:
        await form.close()


def only(form: FormData, *known: str) -> None:
    """Refuse fields that mean nothing: a misspelled one would be left out in silence."""
    for name in form:
        if name not in known:
            there = ", ".join(known)
            raise Refused(422, f"{_printable(name)}: no such field; there are: {there}")


def text_of(form: FormData, name: str) -> str | None:
    """A field that is no file; none = it is not there."""
    values = form.getlist(name)
    if len(values) > 1:
        raise Refused(422, f"{name}: given {len(values)} times; give it once")
    if values and not isinstance(values[0], str):
        raise Refused(422, f"{name}: is a file; give it as a field, without a file name")
    return values[0] if values else None  # type: ignore[return-value]


def files_of(form: FormData, name: str) -> list[UploadFile]:
    found = form.getlist(name)
    for place, each in enumerate(found):
        if not isinstance(each, UploadFile):
            raise Refused(422, f"{name}[{place}]: is no file; upload a jpg, png or webp")
    return found  # type: ignore[return-value]


class Decoder:
    """Turns uploads into recipes: outside of the event loop, a few at a time."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="decoding")

    async def recipe(self, body: RecipeBody, files: Sequence[UploadFile]) -> Recipe:
        """Raises UserError and Refused for what is no picture, or none of `files`."""
        return await self._apart(lambda: self._recipe(body, files))

    async def picture(self, name: str, file: UploadFile) -> Image.Image:
        """RGB, of bounded size, as a reference is."""
        return await self._apart(lambda: bounded(self._open(name, file)))

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _open(self, name: str, file: UploadFile) -> Image.Image:
        file.file.seek(0)
        return open_picture(name, file.file, self._limits.pixels, UPLOADED)

    def _recipe(self, body: RecipeBody, files: Sequence[UploadFile]) -> Recipe:
        def opened(place: int, asked_by: str) -> Image.Image:
            if place >= len(files):
                raise Refused(422, f"{asked_by}: files[{place}] of {len(files)} uploaded files")
            return self._open(f"files[{place}]", files[place])

        subjects: list[Reference] = []
        for number, its in enumerate(body.subjects):
            at = f"recipe.subjects[{number}]"
            image = opened(its.image, f"{at}.image")
            mask = None if its.mask is None else opened(its.mask, f"{at}.mask")
            if mask is None and not (its.query or "").strip():
                raise Refused(422, f"{at}: neither a query nor a mask says what to take")
            subjects.append(
                reference(
                    image,
                    stem(files[its.image].filename) or f"reference {number}",
                    query=its.query,
                    mask=mask,
                    mask_name=f"files[{its.mask}]",
                    scale=its.scale,
                    region=its.region,
                )
            )
        control = None
        if body.control is not None:
            control = bounded(opened(body.control, "recipe.control"))
        return Recipe(
            prompt=body.prompt,
            subjects=tuple(subjects),
            negative_prompt=body.negative_prompt,
            seed=body.seed,
            steps=body.steps,
            guidance=body.guidance,
            guidance_rescale=body.guidance_rescale,
            size=body.size,
            control=control,
            control_scale=body.control_scale,
        )


def stem(name: str | None) -> str:
    """What a client calls its file: it is shown, and never opened."""
    return _printable(PurePosixPath((name or "").replace("\\", "/")).stem)


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:_NAME]
