"""A URL that may be asked for, in the parts that HTTP needs."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from pipeline.curation.fetching.failures import FetchError


@dataclass(frozen=True)
class Target:
    """Where a request goes. `origin` is scheme://host:port, `path` has the query."""

    url: str
    origin: str
    host: str
    port: int
    netloc: str
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Target:
        """Raises FetchError: forbidden_scheme, bad_url."""
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname or "", parts.port
            if parts.scheme not in ("http", "https"):
                raise FetchError("forbidden_scheme", parts.scheme, rule=True)
            if not host.isascii():
                host = host.encode("idna").decode()
        except ValueError as error:  # a broken port, bracket or name
            raise FetchError("bad_url", str(error)) from None
        if not host or any(c <= " " or c == "\x7f" for c in host):
            raise FetchError("bad_url", url[:200])
        tls = parts.scheme == "https"
        # metadata holds raw spaces and umlauts; % stays, as it is quoted already
        path = quote(parts.path or "/", safe="/%:=&?~#+!$,;'@()*[]")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*[]")
        netloc = f"[{host}]" if ":" in host else host
        number = port or (443 if tls else 80)
        origin = f"{parts.scheme}://{netloc}:{number}"
        if port is not None:
            netloc += f":{port}"
        return cls(f"{parts.scheme}://{netloc}{path}", origin, host, number, netloc, path, tls)
