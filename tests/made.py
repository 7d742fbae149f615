"""A made-up run: commit markers of any number of units, and a few rows of two of them."""

import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

START = datetime(2026, 1, 1, tzinfo=UTC)
STAGES = ("units", "images", "captions", "features")
ROWS = 100


def write_run(
    root: Path, units: int, done: Sequence[int] | None = None, every_s: int = 10, extra: Any = None
) -> list[str]:
    """Markers of a run of `units` units of 100 rows, a tenth of them test; `done` of them are
    through images, captions, features (all where it is None). A unit takes `every_s`.
    """
    names = [f"test-{n:05d}" for n in range(units // 10)]
    names += [f"train-{n:05d}" for n in range(units - len(names))]
    scores = {"edges": [5.0, 5.5, 6.0, 6.5], "rows": [units * 50, units * 50, units * 100]}
    schema = {
        "files": 64, "example": "part-0.parquet", "missing": ["hash"], "unused": ["exif"],
        "columns": {"url": "URL String"},
    }  # fmt: skip
    found = {"units": names, "scores": scores, "schemas": [schema]}
    tally = {
        "rows_in": units * 200, "kept": units * 100, "dropped": {"low_aesthetic": units * 100},
        "failed": {}, "extra": found,
    }  # fmt: skip
    _mark(root, "units", "_all", tally, START, {"min_aesthetic": 6.0, "unit_rows": 100})
    for stage, count in zip(STAGES[1:], done or [units] * 3, strict=True):
        write_markers(root, stage, names[:count], every_s, extra)
    return names


def write_markers(
    root: Path, stage: str, units: Sequence[str], every_s: int = 10, extra: Any = None
) -> None:
    """Markers of a stage, as of `write_run`."""
    for n, unit in enumerate(units):
        failed = {"http_404": 20, "timeout": 10} if stage == "images" else {}
        rows_in = ROWS if stage == "images" else ROWS - 35
        dropped = {"too_small": 5} if stage == "images" else {}
        kept = rows_in - sum(failed.values()) - sum(dropped.values())
        tally = {
            "rows_in": rows_in, "kept": kept, "dropped": dropped, "failed": failed,
            "extra": _extra(stage, n) | (extra or {}),
        }  # fmt: skip
        settings = {"stage": stage, "model": {"name": "x", "sha256": "0" * 64}}
        _mark(root, stage, unit, tally, START + timedelta(seconds=every_s * n), settings)


def _extra(stage: str, n: int) -> dict[str, Any]:
    if stage == "images":
        return {
            "bytes": 10_000_000,
            "transient": {"timeout": 10},
            "sizes": {"edges": [0, 256, 512, 1024], "rows": [5, 30, 35]},
            "hosts": {f"img{(n + k) % 997}.example": [5, 5 - k % 5] for k in range(20)},
        }
    if stage == "captions":
        return {
            "words": {"edges": [0, 5, 10], "rows": [40, 25]},
            "subjects": {f"a thing {(n * k) % 499}": 2 for k in range(30)},
        }
    return {"row_groups": [65], "depths": [4]}


def _mark(root: Path, stage: str, unit: str, tally: Any, finished: datetime, settings: Any) -> None:
    path = root / stage / "_done" / f"{unit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    marker = {
        "unit": unit, "stage": stage, "fingerprint": "f" * 16, "settings": settings,
        "tally": tally, "bytes": 1_000_000, "sha256": "0" * 64, "seconds": 8.0,
        "finished": finished.isoformat(timespec="seconds"),
    }  # fmt: skip
    path.write_text(json.dumps(marker))


def write_rows(root: Path, unit: str, rows: Sequence[dict[str, Any]], side: int = 512) -> None:
    """Images and captions of a unit: each row has url, caption, and may have subjects, alt_text."""
    for folder in ("images", "captions"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = [f"{n:016x}" for n in range(len(rows))]
    images = [
        {"key": key, "url": row["url"], "alt_text": row.get("alt_text", ""), "image": jpeg(side)}
        for key, row in zip(keys, rows, strict=True)
    ]
    captions = [
        {"key": key, "caption": row["caption"], "subjects": row.get("subjects", [row["caption"]])}
        for key, row in zip(keys, rows, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(images), root / f"images/{unit}.parquet")
    pq.write_table(pa.Table.from_pylist(captions), root / f"captions/{unit}.parquet")


def jpeg(side: int) -> bytes:
    """A noisy picture: as large in bytes as a photograph."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_training(root: Path, stage: str = "semantic", steps: int = 400) -> None:
    """A stage that was begun twice: records, grids of samples, attempts, as an enemy would have
    them where that is possible.
    """
    folder = root / "train" / stage
    for name in ("samples", "attempts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts = [f"t{n}00-{n}99" for n in range(10)]
    lines = []
    for step in range(10, steps + 1, 10):
        record = {"step": step, "loss": 2 / step, "ldm": 1 / step, "reg": 0.5, "grad_norm": 1.0}
        record |= {"lr": 1e-4, "samples_per_s": 100.0, "data_wait": 0.01}
        lines.append(record | {f"ldm_{part}": n / step for n, part in enumerate(parts, 1)})
        if step % 100 == 0:
            held_out = {f"validation_{name}": 1 / step for name in ("loss", "ldm", "reg")}
            held_out |= {f"validation_ldm_{part}": 1 / step for part in parts}
            lines.append({"step": step, **held_out, "<script>": 1.0})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "nonfinite.jsonl").write_text('{"step": 3, "keys": []}\n')
    for step in range(0, steps + 1, 20):
        (folder / f"samples/step-{step:08d}.png").write_bytes(jpeg(64))
    evil = "<img src=x onerror=\"document.title='owned'\">"
    for number, (start, step) in enumerate(((0, 250), (200, steps)), 1):
        attempt = {
            "started": f"2026-01-0{number}T10:00:00+00:00", "start": start, "step": step,
            "seconds": 7200.0, "workers": 8, "kind": "cuda", "device": evil,
            "versions": {"torch": f"2.{number}", evil: evil},
            "settings": {
                "global_batch": 128, "gpu_hour_price": 2.5, "query": evil,
                "models": {"base": "https://user:hunter2@host/x?token=deadbeef"},
            },
        }  # fmt: skip
        (folder / f"attempts/{number:04d}.json").write_text(json.dumps(attempt))
    shard = {"split": "train", "rows": 1000, "bytes": 2**30}
    manifest = {
        "shards": [shard, shard, {**shard, "split": "test", "rows": 64}],
        "codec": evil, "depths": [4, 24],
        "encoders": {evil: {"name": evil, "sha256": "ab" * 32}},
    }  # fmt: skip
    (root / "features").mkdir(exist_ok=True)
    (root / "features/manifest.json").write_text(json.dumps(manifest))


HOSTILE = [
    {
        "url": "javascript:alert(1)//x",
        "caption": "<script>document.title='owned'</script> a cup",
        "subjects": ["<img src=x onerror=\"document.title='owned'\">", "a cup"],
        "alt_text": "\" onmouseover=\"document.title='owned'",
    },
    {"url": "http://user:hunter2@evil.example/\u202egpj", "caption": "a \u202eexe.tac"},
    {"url": "http://long.example/" + "a" * 10_000, "caption": "word " * 2000},
    {"url": "https://s3.example/a.jpg?X-Amz-Signature=deadbeef&x=1", "caption": "قطة على العشب"},
    {"url": "http://[broken/", "caption": "{{ 7 * 7 }} {% raw %}"},
]
"""Rows as an enemy would write them."""
