"""Training's part of the report: made of records, grids and attempts as they lie in storage.

Every part may be absent or broken. No torch here: a report is made where nothing is trained, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import charts, page
from pipeline.progress import clock
from pipeline.shards import MANIFEST
from pipeline.storage import Storage
from pipeline.storage_faults import scrubbed

Record = Mapping[str, Any]

# Charts of a stage: title, each line's name and the metric that it shows, whether by logarithm.
_CHARTS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss", {"training": "loss", "held out": "validation_loss"}, True),
    ("L_LDM", {"training": "ldm", "held out": "validation_ldm"}, True),
    ("L_reg", {"training": "reg", "held out": "validation_reg"}, True),
    ("Gradient norm", {"training": "grad_norm"}, True),
    ("Learning rate", {"training": "lr"}, False),
    ("Samples per second", {"training": "samples_per_s"}, False),
    ("Share of time waiting for data", {"training": "data_wait"}, False),
)
_PART = re.compile(r"t(\d+)-(\d+)$")
_GRIDS, _GRID_SIDE, _GRID_BYTES = 8, 1200, 400_000
_STEP = re.compile(r"/samples/step-(\d+)\.png$")
_ATTEMPTS = 50


def overview(storage: Storage) -> dict[str, Any]:
    """What the template shows of training; {} where there is none."""
    stages, attempts = [], {}
    for path in page.paths(storage, "train"):
        folder, _, file = path.rpartition("/")
        name = folder.rpartition("/")[2]
        records = _records(storage, path) if file == "metrics.jsonl" else []
        if records:
            attempts[name] = _attempts(storage, folder)
            stages.append(
                {
                    "name": name,
                    "steps": int(max(record["step"] for record in records)),
                    "told": _told(storage, folder, attempts[name]),
                    "charts": _charts(records),
                    "grids": _grids(storage, folder),
                    "attempts": _rows(attempts[name]),
                }
            )
    if not stages:
        return {}
    stages.sort(key=lambda stage: stage["name"] != "semantic")  # it is the first
    every = [attempt for found in attempts.values() for attempt in found]
    every.sort(key=lambda attempt: str(attempt.get("started")))
    return {
        "stages": stages,
        "cost": _cost(every),
        "data": _data(storage),
        "versions": _versions(every),
        "settings": _settings(every),
    }


def headline(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures at the top of the page."""
    steps = sum(stage["steps"] for stage in training.get("stages", []))
    return [("training steps", f"{steps:,}")] if steps else []


# --- curves -----------------------------------------------------------------------------


def _records(storage: Storage, path: str) -> list[dict[str, Any]]:
    """Whole records of a JSON-lines file by step; a half-written line is skipped."""
    records: dict[tuple[float, bool], dict[str, Any]] = {}
    with page.whatever_is_there():
        for line in storage.read_bytes(path).decode(errors="replace").splitlines():
            with page.whatever_is_there():
                record = json.loads(line)
                # training and validation of one step are two records
                held_out = any(key.startswith("validation_") for key in record)
                records[float(record["step"]), held_out] = record
    return sorted(records.values(), key=lambda record: float(record["step"]))


def _charts(records: Sequence[Record]) -> list[str]:
    drawn = []
    for title, lines, log in _CHARTS:
        series = {name: _series(records, key) for name, key in lines.items()}
        drawn.append(charts.line_chart(title, series, log=log, smooth=True))
    with page.whatever_is_there():
        drawn += [_over_timesteps(records), _parts_over_steps(records)]
    return [chart for chart in drawn if chart]


def _series(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[key])) for r in records if page.is_number(r.get(key))]


def _parts(records: Sequence[Record], prefix: str) -> dict[tuple[int, int], str]:
    """Metrics of L_LDM by timestep: {(first, last timestep): key}."""
    found = {key for record in records for key in record if key.startswith(f"{prefix}_t")}
    matches = {key: _PART.search(key) for key in found}
    return dict(sorted(((int(m[1]), int(m[2])), key) for key, m in matches.items() if m))


def _over_timesteps(records: Sequence[Record]) -> str:
    """L_LDM against the timestep: as the run began, as it is now, and held out now."""
    training, held_out = _parts(records, "ldm"), _parts(records, "validation_ldm")
    logged = [r for r in records if page.is_number(r.get("ldm"))]
    tenth = max(1, len(logged) // 10)
    validated = [r for r in records if page.is_number(r.get("validation_ldm"))]
    series = {
        "first tenth": _by_part(logged[:tenth], training),
        "last tenth": _by_part(logged[-tenth:], training),
        "held out": _by_part(validated[-1:], held_out),
    }
    return charts.line_chart(
        "L_LDM by timestep: first and last tenth of the steps", series, "timestep", log=True
    )


def _by_part(
    records: Sequence[Record], parts: Mapping[tuple[int, int], str]
) -> list[tuple[float, float]]:
    points = []
    for (first, last), key in parts.items():
        values = [float(r[key]) for r in records if page.is_number(r.get(key))]
        if values:
            points.append(((first + last + 1) / 2, sum(values) / len(values)))
    return points


def _parts_over_steps(records: Sequence[Record]) -> str:
    """Every part's L_LDM over the steps, the moving averages alone."""
    series = {
        str(first): charts.smoothly(_series(records, key))
        for (first, _), key in _parts(records, "ldm").items()
    }
    title = "L_LDM by the timestep that each tenth begins with"
    return charts.line_chart(title, series, log=True, colours=charts.RAMP)


# --- grids, attempts, cost ----------------------------------------------------------------


def _grids(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """Grids of samples, the newest first: at most `_GRIDS`, evenly over the steps."""
    found = sorted(
        (int(match[1]), path)
        for path in page.paths(storage, f"{folder}/samples")
        if (match := _STEP.search(path))
    )
    last, most = len(found) - 1, min(len(found), _GRIDS)
    chosen = {round(i * last / max(1, most - 1)) for i in range(most)}
    grids = []
    for index in sorted(chosen, reverse=True):
        step, path = found[index]
        with page.whatever_is_there():
            picture = page.thumbnail(storage.read_bytes(path), _GRID_SIDE, _GRID_BYTES)
            grids.append({"step": f"{step:,}", "image": picture})
    return grids


def _attempts(storage: Storage, folder: str) -> list[dict[str, Any]]:
    paths = [p for p in page.paths(storage, f"{folder}/attempts") if p.endswith(".json")]
    found = [page.read_json(storage, path) for path in sorted(paths)]
    return [{**each, "stage": folder.rpartition("/")[2]} for each in found if "started" in each]


def _told(storage: Storage, folder: str, attempts: Sequence[Record]) -> list[str]:
    """Sentences on what did not go as planned."""
    told = []
    with page.whatever_is_there():
        again = sum(a["step"] - a["start"] for a in attempts) - max(a["step"] for a in attempts)
        if len(attempts) > 1:
            told.append(f"{len(attempts)} attempts; {max(0, again):,} steps were taken twice")
    for file, what in (
        ("nonfinite.jsonl", "steps were not a number, and not taken"),
        ("corrupt.jsonl", "damaged row groups, for whose rows others stood in"),
    ):
        with page.whatever_is_there():
            if storage.exists(f"{folder}/{file}"):
                lines = len(storage.read_bytes(f"{folder}/{file}").splitlines())
                told.append(f"{lines:,} {what} ({file})")
    return told


def _rows(attempts: Sequence[Record]) -> list[tuple[str, ...]]:
    """Attempts as lines of a table, the newest ones."""
    rows: list[tuple[str, ...]] = []
    for attempt in attempts[-_ATTEMPTS:]:
        with page.whatever_is_there():
            steps, seconds = attempt["step"] - attempt["start"], float(attempt["seconds"])
            rows.append(
                (
                    page.visible(attempt["started"][:19].replace("T", " ")),
                    f"{int(attempt['workers'])} × {page.visible(attempt['device'], 60)}",
                    f"{attempt['start']:,}",
                    f"{attempt['step']:,}",
                    clock(seconds),
                    f"{steps / seconds:.3g}" if seconds else "–",
                )
            )
    return rows


def _cost(attempts: Sequence[Record]) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    with page.whatever_is_there():
        hours, samples, price = 0.0, 0, 0.0
        for attempt in attempts:
            settings, taken = attempt["settings"], float(attempt["seconds"]) / 3600
            hours += taken * attempt["workers"]
            samples += (attempt["step"] - attempt["start"]) * int(settings["global_batch"])
            price = float(settings.get("gpu_hour_price") or 0.0)
        if attempts:
            kind = "GPU" if attempts[-1]["kind"] != "cpu" else "CPU worker"
            figures.append((f"{kind}-hours", f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"))
            figures.append(("samples trained on", f"{samples:,}"))
            if price and kind == "GPU":
                figures.append((f"at {price:g} per GPU-hour", f"{hours * price:,.2f}"))
    return figures


# --- what it was made of -------------------------------------------------------------------


def _data(storage: Storage) -> list[tuple[str, str]]:
    """The manifest of the shards."""
    told: list[tuple[str, str]] = []
    manifest = page.read_json(storage, MANIFEST)
    with page.whatever_is_there():
        shards = list(manifest["shards"])
        for split in ("train", "test"):
            of = [shard for shard in shards if shard["split"] == split]
            rows, size = sum(s["rows"] for s in of), sum(s["bytes"] for s in of)
            told.append((split, f"{rows:,} rows, {len(of):,} shards, {size / 2**30:,.2f} GiB"))
        told.append(("codec", page.visible(manifest["codec"], 40)))
        told.append(("depths", ", ".join(str(int(depth)) for depth in manifest["depths"])))
        for part, encoder in manifest["encoders"].items():
            name, digest = page.visible(encoder["name"], 100), page.visible(encoder["sha256"], 12)
            told.append((page.visible(part, 20), f"{name} ({digest.partition('…')[0]})"))
    return told


def _versions(attempts: Sequence[Record]) -> list[tuple[str, str]]:
    """Of every package, those that the attempts ran with."""
    seen: dict[str, list[str]] = {}
    for attempt in attempts:
        with page.whatever_is_there():
            for name, version in attempt["versions"].items():
                versions = seen.setdefault(page.visible(name, 40), [])
                if (shown := page.visible(version, 40)) not in versions:
                    versions.append(shown)
    return [(name, ", then ".join(versions)) for name, versions in seen.items()]


def _settings(attempts: Sequence[Record]) -> list[tuple[str, str]]:
    """Of the newest attempt; credentials never."""
    with page.whatever_is_there():
        return [
            (page.visible(key, 60), page.visible(scrubbed(str(value)), 200))
            for key, value in page.flat(attempts[-1]["settings"])
        ]
    return []
