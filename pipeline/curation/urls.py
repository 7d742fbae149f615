"""A url's identity: what two rows of metadata, or a row and a block list, have in common."""

from __future__ import annotations

import re

import polars as pl
import xxhash

_PARTS = r"^([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)([^#]*)"
# Unicode's White_Space, which is what polars strips; str.strip() takes four control codes more.
_BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000"
)


def normal_url(url: str) -> str:
    """Scheme and host in lower case, no fragment, no blanks around it; the rest as it is."""
    url = url.strip(_BLANKS)
    parts = re.match(_PARTS, url)
    return parts[1].lower() + parts[2] if parts else url


def normal_urls(column: str = "url") -> pl.Expr:
    """`normal_url` of a column."""
    url = pl.col(column).str.strip_chars()
    parts = url.str.extract_groups(_PARTS)
    origin = parts.struct.field("1").str.to_lowercase()
    return pl.coalesce(origin + parts.struct.field("2"), url)


def key_of(normal: str) -> int:
    """The 64-bit key of a row: a hash of its normal url. In files it stands as 16 hex digits."""
    return xxhash.xxh3_64_intdigest(normal.encode())
