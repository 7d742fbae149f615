"""Images and captions of a curation -> a WebDataset, tar by tar.

A tar counts once its marker is written (`_export/_done/<tar>.json` beside the tars) and while it
has the marker's bytes, so a run that was stopped goes on. Its bytes follow from the rows alone: no
times, owners or machines are in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.parquet as pq

from pipeline.accounts import split_of
from pipeline.config import ImagesExportConfig
from pipeline.curation.seal import SCORED, SCORES, STAGES, unit_ids
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import Sink, Storage
from pipeline.units import Ledger, Marker, Tally

_STAGE = "_export"
_VERSION = 1
_ROWS = 64  # read at once: of 512 pixels some ten megabytes
_BUFFER = 8 << 20
_SAFE = re.compile(r"[\w-]{1,64}", re.ASCII)
_KINDS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
_IMAGES, _CAPTIONS = STAGES[1], STAGES[2]
_OF_IMAGE = (
    "key", "url", "aesthetic", "predictor", "image", "width", "height", "original_width",
    "original_height", "sha256",
)  # fmt: skip
_OF_CAPTION = ("key", "caption", "captions", "subjects", "alt_text", "backend", "model")


@dataclass(frozen=True)
class Exported:
    """What lies in the folder now."""

    tars: int
    made: int
    """Of them, those that this call made."""
    samples: int
    bytes: int


@dataclass(frozen=True)
class _Tar:
    """A tar to be: its units, and what says of what they are."""

    name: str
    units: tuple[str, ...]
    fingerprint: str


def export(
    root: Storage, out: Storage, cfg: ImagesExportConfig, progress: Progress | None = None
) -> Exported:
    """Write the tars of a split that are missing from `out`, and <split>.json, which lists them.

    Raises:
        UserError: captions are unfinished; `out` holds an export of other settings, or of another
            curation.
    """
    units, settings = _units(root, cfg.split)
    settings |= {"format": cfg.format, "split": cfg.split, "rows": cfg.rows, "version": _VERSION}
    tars = list(_tars(root, units, settings, cfg))
    ledger = Ledger(out, _STAGE)
    done = {name: m for name, m in ledger.done().items() if split_of(name) == cfg.split}
    other = next((m for m in done.values() if m.settings != settings), None)
    if other is not None or set(done) - {tar.name for tar in tars}:
        raise UserError(
            f"{out.url()} holds an export of another curation, or of other settings; name another "
            "folder with --out, or delete it"
        )
    there = out.sizes() if done else {}
    left = [tar for tar in tars if not _is_made(tar, done.get(tar.name), there)]
    if progress is not None and left:
        progress.task("export", len(left))
    pool = ThreadPoolExecutor(cfg.threads, thread_name_prefix="export")
    try:
        work = [pool.submit(_make, root, out, ledger, tar, settings) for tar in left]
        pending = set(work)
        while pending:
            ended, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
            for each in ended:
                marker = each.result()
                done[marker.unit] = marker
            if progress is not None:
                progress.advance("export", len(ended))
    finally:  # an interrupt waits for no tar that has not been begun
        pool.shutdown(cancel_futures=True)
    listed = [done[tar.name] for tar in tars]
    _list(out, cfg.split, listed)
    return Exported(
        len(tars), len(left), sum(m.tally.kept for m in listed), sum(m.bytes for m in listed)
    )


def _is_made(tar: _Tar, marker: Marker | None, there: Mapping[str, int]) -> bool:
    """Whether a tar of these rows was written, and lies there whole."""
    if marker is None or marker.fingerprint != tar.fingerprint:
        return False
    return there.get(f"{tar.name}.tar") == marker.bytes


def _units(root: Storage, split: str) -> tuple[list[str], dict[str, Any]]:
    """The units of a split, and which curation they are of."""
    units = [u for u in unit_ids(root, Ledger(root, STAGES[0]).done()) if split_of(u) == split]
    captions = Ledger(root, _CAPTIONS)
    captions.look()
    missing = [unit for unit in units if unit not in captions.units]
    if missing:
        raise UserError(
            f"{root.url(_CAPTIONS)}: {len(missing)} of {len(units)} units are unfinished "
            f"({missing[0]} ...); run jobs/curate.py again with this root, then export"
        )
    if not units:
        raise UserError(f"{root.url()}: no unit in the split {split}; choose the other --split")
    first = next(captions.some(units[:1]))
    scored = bool(first.settings.get(SCORED))
    return units, {"captions": first.fingerprint, "scored": scored}


def _tars(
    root: Storage, units: Sequence[str], settings: dict[str, Any], cfg: ImagesExportConfig
) -> Iterator[_Tar]:
    """Units in their order, put together until a tar has its rows."""
    some: list[str] = []
    rows, number, told = 0, 0, hashlib.sha256()
    captions = Ledger(root, _CAPTIONS).some(units, alike=True)
    images = Ledger(root, _IMAGES).some(units, alike=True)
    for unit, caption, image in zip(units, captions, images, strict=True):
        some.append(unit)
        rows += caption.tally.kept
        told.update(json.dumps([unit, caption.sha256, image.sha256]).encode())
        if (rows and rows >= cfg.rows) or unit == units[-1]:
            told.update(json.dumps(settings, sort_keys=True).encode())
            yield _Tar(f"{cfg.split}-{number:05d}", tuple(some), told.hexdigest()[:16])
            some, rows, number, told = [], 0, number + 1, hashlib.sha256()


def _make(
    root: Storage, out: Storage, ledger: Ledger, tar: _Tar, settings: dict[str, Any]
) -> Marker:
    started = time.monotonic()
    with out.publish(f"{tar.name}.tar") as sink:
        tally = _write(root, tar.units, bool(settings["scored"]), sink)
    marker = Marker(
        unit=tar.name,
        stage=_STAGE,
        fingerprint=tar.fingerprint,
        settings=settings,
        tally=tally,
        bytes=sink.bytes,
        sha256=sink.sha256,
        seconds=round(time.monotonic() - started, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    ledger.commit(tar.name, marker)
    return marker


def _write(root: Storage, units: Sequence[str], scored: bool, sink: Sink) -> Tally:
    tally = Tally(rows_in=0, kept=0)
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for unit in units:
            captions = _by_key(root, f"{_CAPTIONS}/{unit}.parquet", _OF_CAPTION)
            scores = _by_key(root, f"{SCORES}/{unit}.parquet") if scored else {}
            tally.rows_in += len(captions)
            for row in _images(root, f"{_IMAGES}/{unit}.parquet"):
                caption = captions.pop(row["key"], None)
                if caption is None:
                    continue
                image = row.pop("image") or b""
                kind = next((k for magic, k in _KINDS if image.startswith(magic)), None)
                if kind is None:
                    _count(tally, "not_an_image")
                    continue
                said = {**row, **caption, **scores.get(row["key"], {}), "split": split_of(unit)}
                name = _name(row["key"])
                _add(tar, f"{name}.{kind}", image)
                _add(tar, f"{name}.txt", caption["caption"].encode())
                said = {k: None if _is_nan(v) else v for k, v in said.items()}  # JSON has none
                told = json.dumps(said, ensure_ascii=False, sort_keys=True)
                _add(tar, f"{name}.json", told.encode())
                tally.kept += 1
            if captions:
                _count(tally, "no_image", len(captions))
    tally.check()
    return tally


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _count(tally: Tally, cause: str, rows: int = 1) -> None:
    tally.failed[cause] = tally.failed.get(cause, 0) + rows


def _by_key(root: Storage, path: str, columns: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    with root.open_input(path) as file:
        rows = pq.read_table(file, columns=list(columns) or None).to_pylist()
    return {row["key"]: row for row in rows}


def _images(root: Storage, path: str) -> Iterator[dict[str, Any]]:
    # a unit is one row group, of hundreds of megabytes: its pages come as they are needed
    with (
        root.open_input(path) as source,
        pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(_ROWS, columns=list(_OF_IMAGE)):
            yield from batch.to_pylist()


def _name(key: str) -> str:
    """What a sample's files are called: its key, unless somebody made it a path."""
    return key if _SAFE.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()[:16]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mode 644, time 0, nobody's
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _list(out: Storage, split: str, markers: Sequence[Marker]) -> None:
    tars = [
        {"name": f"{m.unit}.tar", "samples": m.tally.kept, "bytes": m.bytes, "sha256": m.sha256}
        for m in markers
    ]
    samples = sum(marker.tally.kept for marker in markers)
    out.write_json(f"{split}.json", {"split": split, "samples": samples, "tars": tars})
