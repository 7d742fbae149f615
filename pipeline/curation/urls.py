"""A url's identity: what two rows of metadata, or a row and a block list, have in common."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import xxhash

_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)([^#]*)")
# Most urls are normal as they are, and to see it costs less than to take one apart. For polars.
_NORMAL = r"\A[a-z][a-z0-9+.-]*://[a-z0-9.:_@-]*(?:[/?](?:[^#]*[^#\s])?)?\z"
# Unicode's White_Space; str.strip() takes four control codes more.
_BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000"
)


def normal_url(url: str) -> str:
    """Scheme and host in lower case, no fragment, no blanks around it; the rest as it is."""
    url = url.strip(_BLANKS)
    parts = _PARTS.match(url)
    return parts[1].lower() + parts[2] if parts else url


def keys_of(urls: pl.Series) -> np.ndarray:
    """The rows' keys, uint64: hashes of their normal urls. In files they are 16 hex digits."""
    keys = hashes(urls)
    odd = ~urls.str.contains(_NORMAL)
    keys[odd.to_numpy()] = [key_of(url) for url in urls.filter(odd)]
    return keys


def key_of(url: str) -> int:
    """The key of one url."""
    return xxhash.xxh3_64_intdigest(normal_url(url).encode())


def hashes(texts: pl.Series) -> np.ndarray:
    """64-bit hashes of texts (xxh3), uint64; the same on every machine."""
    found = map(xxhash.xxh3_64_intdigest, texts.cast(pl.Binary).to_list())
    return np.fromiter(found, np.uint64, len(texts))
