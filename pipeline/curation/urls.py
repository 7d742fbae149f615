"""A url's identity, one at a time; the filter has the same rule as an expression over columns."""

from __future__ import annotations

import re

_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/?#]*)([^#]*)")
# Unicode's White_Space, which is what polars strips; str.strip() takes four control codes more.
_BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + ("\u2028\u2029\u202f\u205f\u3000")
)


def normal_url(url: str) -> str:
    """Scheme and host in lower case, no fragment, no blanks around it; the rest as it is."""
    url = url.strip(_BLANKS)
    parts = _PARTS.match(url)
    return parts[1].lower() + parts[2] if parts else url
