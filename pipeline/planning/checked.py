"""Foreign JSON, figure by figure: what is not what it should be ends in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline import page
from pipeline.errors import UserError
from pipeline.storage import Storage

_MOST_BYTES = 200_000_000
_LONG = 80


def number(value: Any, what: str, whole: bool = False, most: float = 1e15) -> float:
    """A figure that is at least 0 and at most `most`. Raises UserError, which names `what`."""
    fine = page.is_number(value) and 0 <= value <= most and (not whole or value == int(value))
    if not fine:
        kind = "whole number" if whole else "number"
        raise UserError(
            f"{what} is {name(value)}, not a {kind} from 0 to {most:,.0f}; delete the file and run "
            "its job again, or give another root"
        )
    return float(value)


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object. Raises UserError, which names `what`."""
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is {name(value)}, not a JSON object; give another root")
    return value


def name(value: Any) -> str:
    """Foreign text as one may print it."""
    return page.visible(value, _LONG)


def known_json(storage: Storage, path: str) -> Any:
    """A JSON file. Raises UserError where it is none, or too large to be one of ours."""
    check_size(storage, path)
    return storage.read_json(path)


def json_lines(storage: Storage, path: str) -> list[Mapping[str, Any]]:
    """A file of JSON objects, one a line; [] where there is none. The last may be half written."""
    if not storage.exists(path):
        return []
    check_size(storage, path)
    found, lines = [], storage.read_bytes(path).splitlines()
    for at, line in enumerate(lines, 1):
        try:
            found.append(mapping(json.loads(line), f"{storage.url(path)}, line {at}"))
        except ValueError:
            if at < len(lines):
                raise UserError(
                    f"{storage.url(path)}, line {at}, is not JSON; delete the file, or give "
                    "another root"
                ) from None
    return found


def check_size(storage: Storage, path: str) -> None:
    """Raise UserError for a file that is larger than any of ours."""
    if (size := storage.size(path)) > _MOST_BYTES:
        raise UserError(
            f"{storage.url(path)} has {size:,} bytes, more than any of ours; give another root"
        )
