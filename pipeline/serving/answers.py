"""Faults as answers: each is JSON of one line with the status that fits, and nothing of a trace."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pipeline.errors import UserError, user_message
from pipeline.serving.artist import Busy, Gone, Late
from pipeline.serving.bodies import ErrorBody

_log = logging.getLogger(__name__)
RETRY_AFTER_S = 2
_REASONS = {
    400: "The request cannot be read",
    401: "The token is missing or wrong",
    403: "Asked from a foreign site, or by a foreign name",
    404: "There is nothing here",
    405: "The method is not for this path",
    408: "The request came too slowly",
    413: "The request has too many bytes",
    415: "The body is not multipart/form-data",
    422: "A field is missing, or its value cannot be",
    429: "Too many requests wait; Retry-After says when to try again",
    500: "A fault of the service; its log says more",
    503: "Nobody draws, or the service is stopping; Retry-After says when to try again",
    504: "The deadline passed",
}


class Refused(Exception):
    """A request that is answered with `status` and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: what a route may answer, besides what the whole service does."""
    everywhere = (400, 401, 403, 405, 413, 500)
    return {
        status: {"model": ErrorBody, "description": _REASONS[status]}
        for status in sorted({*everywhere, *statuses})
    }


def error(status: int, line: str, **headers: str) -> JSONResponse:
    """The answer of a fault; `headers` with underscores for hyphens."""
    if status in (429, 503):
        headers.setdefault("Retry_After", str(RETRY_AFTER_S))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": " ".join(line.split())}, status, named)


def answer_faults(app: FastAPI) -> None:
    """Let every exception of the app end in such an answer."""

    async def refused(request: Request, fault: Any) -> Response:
        return error(fault.status, str(fault))

    async def http(request: Request, fault: Any) -> Response:
        headers = {name.replace("-", "_"): value for name, value in (fault.headers or {}).items()}
        return error(fault.status_code, str(fault.detail), **headers)

    async def user(request: Request, fault: Exception) -> Response:
        return error(422, user_message(fault) or "bad input")

    async def busy(request: Request, fault: Exception) -> Response:
        return error(429, f"too many requests: {fault}; try again later")

    async def gone(request: Request, fault: Exception) -> Response:
        return error(503, f"nobody draws now: {fault}; try again later")

    async def late(request: Request, fault: Exception) -> Response:
        return error(504, f"too late: {fault}")

    async def client(request: Request, fault: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do

    async def internal(request: Request, fault: Exception) -> Response:
        return error(500, "a fault of the service; its log says more")

    for kind, handler in (
        (Refused, refused),
        (HTTPException, http),
        (UserError, user),
        (Busy, busy),
        (Gone, gone),
        (Late, late),
        (ClientGone, client),
        (Exception, internal),
    ):
        app.add_exception_handler(kind, handler)


def first_fault(fault: ValidationError, name: str) -> Refused:
    """What pydantic found first, with the field's place: `name.subjects[0].query: ...`."""
    found = fault.errors(include_url=False, include_context=False, include_input=False)[0]
    place = name
    for part in found["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    status = 400 if found["type"] == "json_invalid" else 422
    return Refused(status, f"{place}: {found['msg']}")
