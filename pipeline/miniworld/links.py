"""The mini world's web as its metadata sees it: what each link leads to, and the Parquet rows.

Everything is a function of (site seed, link number), so that the web site (website.py) keeps no
state and the metadata can be written without it. The metadata has LAION's habits: revisions
differ in names, case and types; scores, sizes and flags are sometimes missing; rows repeat.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.miniworld import world
from pipeline.storage import Storage

# What becomes of a request, and its share of the links. 72 % are alive, as on the web of 2024.
FATES: dict[str, float] = {
    "ok": 0.636,
    "slow": 0.02,
    "busy_once": 0.02,
    "moved": 0.04,
    "gone_404": 0.09,
    "gone_410": 0.03,
    "denied_403": 0.02,
    "down_503": 0.025,
    "truncated": 0.025,
    "html": 0.03,
    "empty": 0.005,
    "opted_out": 0.02,
    "moved_inside": 0.015,
    "tiny": 0.013,
    "bomb": 0.003,
    "endless": 0.003,
    "stalled": 0.002,
    "file_scheme": 0.003,
}
ALIVE = ("ok", "slow", "busy_once", "moved")

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_FORMATS = list(_EXTENSIONS)
_DUPLICATE_URL, _DUPLICATE_HASH = 0.03, 0.015
_PARTS = 6


@dataclass(frozen=True)
class Link:
    """One image link: how it is served and which scene (split "train") it shows."""

    seed: int
    index: int
    fate: str
    width: int
    height: int
    """Size as a viewer sees it, after the EXIF orientation; pixels."""
    format: str
    """PIL's name: JPEG, PNG, WEBP."""
    mode: str
    """PIL's mode of the file: RGB, RGBA or P."""
    orientation: int
    """EXIF orientation, 1 = upright, 6 = the camera was turned."""

    @property
    def path(self) -> str:
        return f"/{self.seed}/{self.index:07d}.{_EXTENSIONS[self.format]}"

    @property
    def scene_seed(self) -> int:
        return self.seed * 10_000_000 + self.index


def link(seed: int, index: int) -> Link:
    """The link number `index` of the site with this seed."""
    rng = np.random.default_rng([20_231, seed, index])
    fate = str(rng.choice(list(FATES), p=list(FATES.values())))
    short = int(rng.integers(64, 145))
    long = min(192, round(short * float(rng.choice([1.0, 4 / 3, 3 / 2, rng.uniform(1.0, 1.5)]))))
    width, height = (short, long) if rng.random() < 0.3 else (long, short)
    if fate == "tiny":
        width = height = int(rng.integers(12, 28))
    kind = str(rng.choice(_FORMATS, p=[0.78, 0.14, 0.08]))
    mode, orientation = "RGB", 1
    if kind == "PNG":
        mode = str(rng.choice(["RGB", "RGBA", "P"], p=[0.6, 0.25, 0.15]))
    elif kind == "JPEG" and rng.random() < 0.06:
        orientation = int(rng.choice([3, 6, 8]))
    if fate in ("truncated", "html", "endless"):
        kind, mode = "JPEG", "RGB"
    if fate == "bomb":
        kind, mode = "PNG", "RGB"
    return Link(seed, index, fate, width, height, kind, mode, orientation)


def write_metadata(storage: Storage, folder: str, base_url: str, rows: int, seed: int) -> list[str]:
    """Write the metadata of `rows` rows as Parquet parts into `folder`; return their paths.

    `base_url` is the site's, "http://127.0.0.1:18642". Same arguments, same bytes.
    """
    records = _records(base_url, rows, seed)
    paths = []
    for part, chunk in enumerate(np.array_split(np.arange(rows), min(_PARTS, max(rows, 1)))):
        table = _REVISIONS[part % len(_REVISIONS)]([records[i] for i in chunk])
        path = f"{folder}/part-{part:05d}.parquet"
        with storage.publish(path) as sink:
            pq.write_table(table, sink, compression="snappy", row_group_size=512)
        paths.append(path)
    return paths


def _records(base_url: str, rows: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([20_232, seed, rows])
    records: list[dict[str, Any]] = []
    for index in range(rows):
        draw = rng.random()
        if records and draw < _DUPLICATE_URL + _DUPLICATE_HASH:
            again = dict(records[int(rng.integers(len(records)))])
            if draw < _DUPLICATE_HASH and again["url"].startswith("http"):
                again["url"] += f"?mirror={index}"  # found at another address, hash unchanged
            records.append(again)
            continue
        item = link(seed, index)
        url = (
            f"file:///srv/upload{item.path}" if item.fate == "file_scheme" else base_url + item.path
        )
        text = _alt_text(item, rng)
        digest = hashlib.blake2b((url + (text or "")).encode(), digest_size=8).digest()
        unsized = rng.random() < 0.02
        records.append(
            {
                "url": url,
                "text": text,
                "width": None if unsized else item.width,
                "height": None if unsized else item.height,
                "similarity": _missing(rng, 0.01, float(rng.normal(0.32, 0.03))),
                "hash": int.from_bytes(digest, "little", signed=True),
                "punsafe": _missing(rng, 0.02, _flag(rng, 0.04, 0.5)),
                "pwatermark": _missing(rng, 0.02, _flag(rng, 0.05, 0.8)),
                "score": _missing(rng, 0.005, float(np.clip(rng.normal(6.25, 0.75), 1, 9.5))),
            }
        )
    return records


def _missing(rng: np.random.Generator, share: float, value: float) -> float | None:
    return None if rng.random() < share else value


def _flag(rng: np.random.Generator, share: float, bound: float) -> float:
    """A classifier's probability: above `bound` for this share of rows, mostly low for the rest."""
    return float(rng.uniform(bound, 1.0) if rng.random() < share else bound * rng.beta(0.5, 4.0))


def _alt_text(item: Link, rng: np.random.Generator) -> str | None:
    """What a page's author wrote: now and then the truth, more often a shop's, or nothing."""
    scene = world.scene(item.scene_seed, "train")
    name = scene.subjects[0].cls
    words = [
        world.caption(scene, attributes=bool(rng.random() < 0.4)),
        f"{name.title()} | Free shipping - Shop {int(rng.integers(10, 99))}",
        f"IMG_{int(rng.integers(1000, 9999))}.JPG",
        f"Stock photo of {name}, royalty free, {item.width}x{item.height}",
        f"&quot;{name}&quot; \u2013 Bild Nr. {item.index}",
        "",
        None,
    ]
    return words[int(rng.choice(len(words), p=[0.3, 0.25, 0.12, 0.15, 0.1, 0.06, 0.02]))]


def _table(records: list[dict[str, Any]], columns: list[tuple[str, str, pa.DataType]]) -> pa.Table:
    arrays = [pa.array([record[key] for record in records], kind) for _, key, kind in columns]
    return pa.table(arrays, names=[name for name, _, _ in columns])


def _aesthetics_v2(records: list[dict[str, Any]]) -> pa.Table:
    """As LAION-Aesthetics V2 was published."""
    return _table(
        records,
        [
            ("URL", "url", pa.string()),
            ("TEXT", "text", pa.string()),
            ("WIDTH", "width", pa.float64()),
            ("HEIGHT", "height", pa.float64()),
            ("similarity", "similarity", pa.float64()),
            ("hash", "hash", pa.int64()),
            ("punsafe", "punsafe", pa.float32()),
            ("pwatermark", "pwatermark", pa.float32()),
            ("AESTHETIC_SCORE", "score", pa.float32()),
        ],
    )


def _relaion(records: list[dict[str, Any]]) -> pa.Table:
    """As Re-LAION names and types things, with a score joined to it."""
    table = _table(
        records,
        [
            ("url", "url", pa.large_string()),
            ("caption", "text", pa.large_string()),
            ("similarity", "similarity", pa.float64()),
            ("hash", "hash", pa.int64()),
            ("punsafe", "punsafe", pa.float64()),
            ("pwatermark", "pwatermark", pa.float64()),
            ("width", "width", pa.int32()),
            ("height", "height", pa.int32()),
            ("aesthetic_score", "score", pa.float64()),
        ],
    )
    keys = pa.array([f"{number:09d}" for number in range(len(records))])
    return table.append_column("key", keys)


def _without_hash(records: list[dict[str, Any]]) -> pa.Table:
    """An early revision: no hash, no watermark score, 64-bit sizes, an extra flag."""
    table = _table(
        records,
        [
            ("TEXT", "text", pa.string()),
            ("URL", "url", pa.string()),
            ("HEIGHT", "height", pa.int64()),
            ("WIDTH", "width", pa.int64()),
            ("similarity", "similarity", pa.float64()),
            ("punsafe", "punsafe", pa.float32()),
            ("AESTHETIC_SCORE", "score", pa.float64()),
        ],
    )
    return table.append_column("NSFW", pa.array(["UNLIKELY"] * len(records)))


_REVISIONS = (_aesthetics_v2, _relaion, _aesthetics_v2, _without_hash, _relaion, _aesthetics_v2)
