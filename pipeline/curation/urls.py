"""A url's identity: what two rows of metadata, or a row and a block list, have in common."""

from __future__ import annotations

import re

import polars as pl
import xxhash

_ORIGIN = r"^([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)([^#]*)"


def normal_url(url: str) -> str:
    """Scheme and host in lower case, no fragment, no blanks around it."""
    url = url.strip(" \t\n\r\x0b\x0c")
    match = re.match(_ORIGIN, url)
    return match[1].lower() + match[2] if match else url


def normal_urls(column: str = "url") -> pl.Expr:
    """`normal_url` of a column."""
    url = pl.col(column).str.strip_chars(" \t\n\r\x0b\x0c")
    origin = url.str.extract(_ORIGIN, 1).str.to_lowercase()
    return pl.coalesce(origin + url.str.extract(_ORIGIN, 2), url)


def key_of(normal: str) -> int:
    """The 64-bit key of a row: a hash of its normal url. In files it stands as 16 hex digits."""
    return xxhash.xxh3_64_intdigest(normal.encode())
