"""What a response says of itself, in its headers, and how its body is packed."""

from __future__ import annotations

import email.utils
import zlib
from datetime import UTC, datetime

import h11

from pipeline.curation.fetching.failures import FetchError

_LONGEST_WAIT_S = 86_400.0  # what asks for more is told as this
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none", "noml"}
_PLAIN = {"", "identity", "none", "binary"}
_GZIP, _DEFLATE = {"gzip", "x-gzip"}, {"deflate"}


def header(response: h11.Response, name: bytes) -> str:
    """A header's first value, or nothing. The web writes UTF-8 into them."""
    return next(iter(headers(response, name)), "")


def headers(response: h11.Response, name: bytes) -> list[str]:
    """All values of a header; `name` in lower case."""
    return [value.decode("utf-8", "replace") for key, value in response.headers if key == name]


def promised_bytes(response: h11.Response) -> int:
    """Content-Length, where it counts; else 0."""
    if header(response, b"transfer-encoding"):
        return 0
    return int(header(response, b"content-length") or 0)


def opted_out(response: h11.Response, agent_token: str) -> bool:
    """Whether an X-Robots-Tag, for everyone or for us by name, asks not to be used."""
    for value in headers(response, b"x-robots-tag"):
        listed = value.lower()
        name, colon, rest = listed.partition(":")
        if colon and "," not in name and name.strip() not in _VALUED:  # "agent: directives"
            if name.strip() not in ("*", agent_token):
                continue
            listed = rest
        if _OPT_OUT & {directive.strip() for directive in listed.split(",")}:
            return True
    return False


def retry_after(response: h11.Response) -> float | None:
    """Seconds to wait, a day at most: the header holds seconds or a date. None if it is absent
    or broken.
    """
    value = header(response, b"retry-after").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _LONGEST_WAIT_S)
    try:
        when = email.utils.parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        wait = (when - datetime.now(UTC)).total_seconds()
        return min(max(0.0, wait), _LONGEST_WAIT_S)
    except (ValueError, OverflowError):  # no date, or one with an absurd time zone
        return None


class Unpacker:
    """Undoes a Content-Encoding piece by piece, giving at most the bytes asked for.

    We ask for none, so that of br and zstd, which take a library each, is refused.
    Raises FetchError (bad_encoding), zlib.error.
    """

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in _PLAIN | _GZIP | _DEFLATE:
            raise FetchError("bad_encoding", name[:40])
        self._packed = name not in _PLAIN
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its head
        self._raw_may_follow = name in _DEFLATE

    def __call__(self, piece: bytes, limit: int) -> bytes:
        if not self._packed:
            return piece
        if self._zlib.eof:  # what follows is kept by zlib, and copied anew for every piece
            return b""
        try:
            return self._zlib.decompress(piece, limit)
        except zlib.error:
            if not self._raw_may_follow:
                raise
            self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)  # many send deflate without its head
            return self._zlib.decompress(piece, limit)
        finally:
            self._raw_may_follow = False

    def finish(self) -> None:
        """To be called after the last piece: the packing must be whole."""
        if self._packed and not self._zlib.eof:
            raise FetchError("bad_encoding", "the packed body breaks off")
