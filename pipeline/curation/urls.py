"""A url's identity: what two rows of metadata, or a row and a block list, have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import xxhash

_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)([^#]*)")
# Most urls are normal as they are, and to see it costs less than to take one apart.
_NORMAL = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:_@-]*(?:[/?][^#]*)?(?<!\s)")
# Unicode's White_Space; str.strip() takes four control codes more.
_BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000"
)


def normal_url(url: str) -> str:
    """Scheme and host in lower case, no fragment, no blanks around it; the rest as it is."""
    if _NORMAL.fullmatch(url):
        return url
    url = url.strip(_BLANKS)
    parts = _PARTS.match(url)
    return parts[1].lower() + parts[2] if parts else url


def keys_of(urls: Iterable[str]) -> np.ndarray:
    """The rows' keys, uint64: hashes of their normal urls. In files they are 16 hex digits."""
    return hashes(map(normal_url, urls))


def hashes(texts: Iterable[str]) -> np.ndarray:
    """64-bit hashes of texts (xxh3), uint64; the same on every machine."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)
