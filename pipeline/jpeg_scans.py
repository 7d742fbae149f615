"""JPEGs of thousands of scans: few bytes that take hours to decode."""

from __future__ import annotations

import re
import struct

# A JPEG's every scan, of 26 bytes or more, walks all of its blocks. Encoders make up to a dozen.
_MAX_SCANS = 100
_SCAN = b"\xff\xda"
# What libjpeg takes for a marker; of those with a length, the length is skipped with it.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_LONG = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}
_END = 0xD9


def has_many_scans(body: bytes) -> bool:
    """Whether a JPEG has more scans than any encoder makes. What comes before its first end counts,
    outside of its segments: a camera's thumbnail or film may hold the marker by chance.
    """
    if body.count(_SCAN) <= _MAX_SCANS:  # nearly always
        return False
    scans, at = 0, 2
    while scans <= _MAX_SCANS and (found := _MARKER.search(body, at)):
        marker, at = found[1][0], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN[1]
        if marker in _LONG and at + 2 <= len(body):
            at += struct.unpack_from(">H", body, at)[0]
    return scans > _MAX_SCANS
