"""How every row of a download ended: the table beside the unit, and the marker's figures of it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Marker, Tally

FOLDER = "images/_outcomes"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("host", pa.string()),
        ("cause", pa.string()),
        ("rule", pa.bool_()),
        ("transient", pa.bool_()),
        ("bytes", pa.int64()),
        ("seconds", pa.float32()),
        ("tries", pa.int32()),
    ]
)
_TOP_HOSTS = 20
_SIDE_EDGES = [0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384]
_SECOND_EDGES = [0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 600.0]


@dataclass(frozen=True)
class Outcome:
    """How one row ended: "ok", or a cause."""

    cause: str
    rule: bool = False
    """We declined the image, where otherwise the web (or we) failed."""
    transient: bool = False
    """A later try may succeed: what --retry_failed takes up."""
    size: int = 0
    """Bytes received."""
    seconds: float = 0.0
    """Spent on the fetch, waiting for its turn included."""
    tries: int = 0
    """Requests made for it; 0 = none."""
    side: int = 0
    """Shorter side of the image as it came, pixels; 0 = unknown."""


def save(
    storage: Storage, unit: str, keys: list[str], urls: list[str | None], ended: Sequence[Outcome]
) -> str:
    """Publish the outcomes of a unit, a row each in the unit's order; return the file's sha256.

    The file counts only with the unit's marker, which holds that hash (see `load`).
    """
    columns = {
        "key": keys,
        "url": urls,
        "host": [host_of(url) for url in urls],
        "cause": [outcome.cause for outcome in ended],
        "rule": [outcome.rule for outcome in ended],
        "transient": [outcome.transient for outcome in ended],
        "bytes": [outcome.size for outcome in ended],
        "seconds": [outcome.seconds for outcome in ended],
        "tries": [outcome.tries for outcome in ended],
    }
    with storage.publish(f"{FOLDER}/{unit}.parquet") as sink:
        pq.write_table(pa.Table.from_pydict(columns, SCHEMA), sink, compression="zstd")
    return sink.sha256


def load(storage: Storage, marker: Marker) -> pa.Table:
    """The outcomes of a committed unit. Raises UserError if they are not those of its marker."""
    path = f"{FOLDER}/{marker.unit}.parquet"
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != marker.tally.extra.get("outcomes"):
        raise UserError(
            f"{storage.url(path)} is not what its unit's marker speaks of; delete "
            f"{storage.url(f'images/_done/{marker.unit}.json')} and run again"
        )
    return pq.read_table(io.BytesIO(data))


def tally(ended: Sequence[Outcome], urls: Sequence[str | None]) -> Tally:
    """Counts for the marker. `extra` has:

    bytes received; `transient` {cause: rows}, of the failed ones those that may pass; `hosts`, the
    twenty with most rows {host: [rows, ok, failed]}, and how many hosts there are; `sizes`, the
    shorter sides of the images as they came, pixels, and `seconds`, the time of a fetch: rows per
    bin, the last one open.
    """
    lost = [outcome for outcome in ended if outcome.cause != "ok"]
    failed = [outcome for outcome in lost if not outcome.rule]
    tried = [outcome.seconds for outcome in ended if outcome.tries]
    return Tally(
        rows_in=len(ended),
        kept=len(ended) - len(lost),
        dropped=_counts(outcome.cause for outcome in lost if outcome.rule),
        failed=_counts(outcome.cause for outcome in failed),
        extra={
            "bytes": sum(outcome.size for outcome in ended),
            "transient": _counts(outcome.cause for outcome in failed if outcome.transient),
            "hosts": _hosts(ended, urls),
            "host_count": len({host_of(url) for url in urls}),
            "sizes": _histogram([outcome.side for outcome in ended if outcome.side], _SIDE_EDGES),
            "seconds": _histogram(tried, _SECOND_EDGES),
        },
    )


def host_of(url: str | None) -> str:
    """The url's host in lower case, with its port if it names one; "" where there is none."""
    try:
        netloc = urlsplit((url or "").strip()).netloc
    except ValueError:  # a broken bracket
        return ""
    return netloc.rpartition("@")[2].lower()


def _hosts(ended: Sequence[Outcome], urls: Sequence[str | None]) -> dict[str, list[int]]:
    hosts = [host_of(url) for url in urls]
    rows = Counter(hosts)
    ok = Counter(host for host, end in zip(hosts, ended, strict=True) if end.cause == "ok")
    failed = Counter(
        host for host, end in zip(hosts, ended, strict=True) if end.cause != "ok" and not end.rule
    )
    top = sorted(rows, key=lambda host: (-rows[host], host))[:_TOP_HOSTS]
    return {host: [rows[host], ok[host], failed[host]] for host in top}


def _counts(causes: Any) -> dict[str, int]:
    return dict(sorted(Counter(causes).items()))


def _histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, list[Any]]:
    """Rows per bin [edge, next edge); what is beyond counts in the last one."""
    last = len(edges) - 2
    bins = (np.searchsorted(edges, np.asarray(values, float), side="right") - 1).clip(0, last)
    return {"edges": list(edges), "rows": np.bincount(bins, minlength=last + 1).tolist()}
