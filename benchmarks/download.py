"""The download stage against img2dataset.download(): images per CPU-second, wall, and quality.

A server in a process of its own (its CPU is not counted) gives JPEGs of quality 85 from memory:
noise with the spectrum of photographs, median 1 megapixel, a tenth above 4. Both sides crop to the
same size, encode alike, hash the bodies and write Parquet, with as many processes and threads, in
turn, in an order that changes every round. CPU and wall are those of the work in warm workers; what
the rest of the process tree takes (imports, above all) is shown beside as start-up.

    python benchmarks/download.py                       # some minutes
    python benchmarks/download.py --dead 0.2            # a fifth of the hosts dead, too
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import processor
from photo_site import encode, links, photos, website
from PIL import Image

from pipeline.config import DownloadConfig
from pipeline.curation.downloading.download import Download
from pipeline.storage import Storage
from pipeline.units import run_unit

RIVAL, OURS, FULL = "img2dataset.download()", "ours", "ours, decode full"
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Run:
    """One run of one side."""

    images: int
    wall: float
    cpu: float
    startup: float
    """CPU seconds of everything else, once per process."""


@dataclass
class Settings:
    """What both sides are told."""

    side: int
    threads: int
    processes: int
    timeout_s: float
    private: list[str] = field(default_factory=list)


# --- the sides --------------------------------------------------------------------------


def _work(told: Any, cfg: DownloadConfig, root: str) -> None:
    """A worker of ours, as Ray would keep it: opened once, then unit after unit."""
    stage = Download(cfg)
    stage.open()
    told.send(time.process_time())
    with contextlib.suppress(EOFError):  # the benchmark is over
        while True:
            unit = told.recv()
            before = time.process_time()
            run_unit(stage, unit, Storage(root), "benchmark")
            told.send(time.process_time() - before)


class Ours:
    """Workers that are kept over all rounds."""

    def __init__(self, root: Path, settings: Settings, decode: Any) -> None:
        cfg = DownloadConfig(
            image_size=settings.side, decode=decode, encode_format="jpg", encode_quality=95,
            threads=settings.threads, timeout_s=settings.timeout_s, retries=0,
            per_host=settings.threads, outage_share=2.0, allow_private_hosts=settings.private,
        )  # fmt: skip
        self.root, self.runs, self.pipes = root, 0, []
        for _ in range(settings.processes):
            here, there = _CONTEXT.Pipe()
            _CONTEXT.Process(target=_work, args=(there, cfg, str(root)), daemon=True).start()
            self.pipes.append(here)
        self.startup = sum(pipe.recv() for pipe in self.pipes)
        self.warm = False

    def __call__(self, urls: list[str]) -> Run:
        if not self.warm:
            self.warm = True
            self(urls[: max(1, len(urls) // _SHARDS)])
        self.runs += 1
        units = []
        for worker in range(len(self.pipes)):
            mine = urls[worker :: len(self.pipes)]
            keys = [f"{index:016x}" for index in range(len(mine))]
            table = {"key": keys, "url": mine, "alt_text": keys, "aesthetic": [6.5] * len(mine)}
            table["predictor"] = ["v2"] * len(mine)
            units.append(f"train-{self.runs:03d}{worker:02d}")
            (self.root / "units").mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(table), self.root / f"units/{units[-1]}.parquet")
        started = time.perf_counter()
        for pipe, unit in zip(self.pipes, units, strict=True):
            pipe.send(unit)
        cpu = sum(pipe.recv() for pipe in self.pipes)
        wall = time.perf_counter() - started
        tables = [pq.read_table(self.root / f"images/{unit}.parquet") for unit in units]
        self.table = pa.concat_tables(tables).select(["url", "image"])
        return Run(len(self.table), wall, cpu, self.startup)


_RIVAL = """
import json, os, sys, time
import img2dataset
from img2dataset.downloader import Downloader

class Measured(Downloader):
    def __call__(self, row):
        told = {"pid": os.getpid(), "shard": row[0], "start": time.time()}
        before = time.process_time()
        result = super().__call__(row)
        told |= {"cpu": time.process_time() - before, "end": time.time()}
        with open(f"{self.output_folder}/{row[0]}.measured", "w") as file:
            json.dump(told, file)
        return result

if __name__ == "__main__":
    sys.modules["img2dataset.main"].Downloader = Measured
    img2dataset.download(**json.loads(sys.argv[1]))
"""
_SHARDS = 5  # of a process; it starts a new one after five


class Rival:
    """img2dataset by its own entry, in fresh processes each time. Of each process the first shard,
    a fifth of the urls given twice, warms up; CPU and wall are those of the other four.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.settings, self.runs = root, settings, 0
        # a script, since its processes import the main module again
        self.script = root / "rival.py"
        self.script.write_text(_RIVAL)

    def __call__(self, urls: list[str]) -> Run:
        self.runs += 1
        out, listed = self.root / f"out-{self.runs}", self.root / f"urls-{self.runs}.txt"
        shard = -(-len(urls) // ((_SHARDS - 1) * self.settings.processes))
        warm_up = (urls * 2)[: shard * self.settings.processes]
        listed.write_text("\n".join([*warm_up, *urls]) + "\n")
        told = {
            "url_list": str(listed),
            "output_folder": str(out),
            "image_size": self.settings.side,
            "resize_mode": "center_crop",
            "output_format": "parquet",
            "processes_count": self.settings.processes,
            "thread_count": self.settings.threads,
            "number_sample_per_shard": shard,
            "timeout": self.settings.timeout_s,
            "encode_quality": 95,
            "extract_exif": False,
            "compute_hash": "sha256",
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(
            [sys.executable, str(self.script), json.dumps(told)],
            capture_output=True,
            text=True,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if ran.returncode:
            raise SystemExit(f"img2dataset failed: {ran.stderr[-2000:]}")
        whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        measured = [json.loads(path.read_text()) for path in out.glob("*.measured")]
        measured.sort(key=lambda entry: entry["start"])
        first = {entry["pid"]: entry["shard"] for entry in reversed(measured)}
        counted = [entry for entry in measured if entry["shard"] != first[entry["pid"]]]
        tables = [self._stored(out, entry["shard"]) for entry in counted]
        self.table = pa.concat_tables(tables)
        wall = max(e["end"] for e in counted) - min(e["start"] for e in counted)
        cpu = sum(entry["cpu"] for entry in counted)
        every = sum(entry["cpu"] for entry in measured)
        return Run(len(self.table), wall, cpu, whole - every)

    def _stored(self, out: Path, shard: int) -> pa.Table:
        path = next(path for path in out.glob("*.parquet") if int(path.stem) == shard)
        table = pq.read_table(path, columns=["url", "jpg"]).rename_columns(["url", "image"])
        return table.filter(table["image"].is_valid())


# --- what came out ----------------------------------------------------------------------


def index_of(url: str) -> int:
    return int(url.rpartition("/")[2].partition(".")[0])


def pixels_of(table: pa.Table) -> dict[int, np.ndarray]:
    """Index of the original -> the stored image, BGR."""
    return {
        index_of(row["url"]): cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_COLOR)
        for row in table.to_pylist()
    }


def ideal(original: np.ndarray, side: int) -> np.ndarray:
    """The original's centre crop by Pillow's Lanczos, from the pixels of before the JPEG; BGR."""
    height, width = original.shape[:2]
    size = [round(length * side / min(height, width)) for length in (width, height)]
    image = Image.fromarray(original).resize((size[0], size[1]), Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = np.asarray(image.crop((left, top, left + side, top + side)))
    return np.ascontiguousarray(cut[:, :, ::-1])


def psnr(ours: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> str:
    found = [cv2.PSNR(image, other[index]) for index, image in ours.items()]
    return f"{statistics.mean(found):.1f} ({min(found):.1f})"


def table_of(title: str, runs: dict[str, list[Run]]) -> None:
    print(
        f"| {title} | images | wall, s | CPU, s | images / CPU s | against it | least to most "
        "| start-up, CPU s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, own in runs.items():
        rates = [run.images / run.cpu for run in own]
        ratios = [
            rate / (other.images / other.cpu)
            for rate, other in zip(rates, runs[RIVAL], strict=True)
        ]
        middle = statistics.median
        print(
            f"| {name} | {own[0].images} | {middle(run.wall for run in own):.2f} "
            f"| {middle(run.cpu for run in own):.2f} | {middle(rates):.1f} "
            f"| {middle(ratios):.2f}x | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {own[0].startup:.1f} |"
        )
    print()


def compare(
    sides: dict[str, Callable[[list[str]], Run]], urls: list[str], rounds: int
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    order = random.Random(0)
    for number in range(rounds):
        for name in order.sample(list(sides), len(sides)):
            runs[name].append(sides[name](urls))
            print(f"{name}: {runs[name][-1].wall:.0f} s", file=sys.stderr, flush=True)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return runs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=240, help="urls of a run (default: 240)")
    parser.add_argument("--pool", type=int, default=60, help="different images (default: 60)")
    parser.add_argument(
        "--largest", type=float, default=12.0, help="of an image, megapixels (default: 12)"
    )
    parser.add_argument("--side", type=int, default=512, help="stored side, pixels (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all sides (default: 3)")
    parser.add_argument("--threads", type=int, default=32, help="of a process (default: 32)")
    parser.add_argument("--processes", type=int, default=1, help="of a side (default: 1)")
    parser.add_argument(
        "--dead", type=float, default=0.0, help="share of dead hosts in a second table (default: 0)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3.0, help="of a fetch, seconds (default: 3)"
    )
    args = parser.parse_args()
    originals = photos(args.pool, args.largest)
    bodies = [encode(pixels) for pixels in originals]
    with website(bodies) as ports, tempfile.TemporaryDirectory(prefix="download-") as folder:
        alive = links(args.images, args.pool, ports, 0.0)
        dying = links(args.images, args.pool, ports, args.dead)
        hosts = sorted({url.split("/")[2] for url in [*alive, *dying]})
        settings = Settings(args.side, args.threads, args.processes, args.timeout, hosts)
        root = Path(folder)
        (root / "rival").mkdir()
        sides: dict[str, Any] = {
            RIVAL: Rival(root / "rival", settings),
            OURS: Ours(root / "reduced", settings, "reduced"),
            FULL: Ours(root / "full", settings, "full"),
        }
        runs = compare(sides, alive, args.rounds)
        tables = {name: side.table for name, side in sides.items()}
        stored = {name: pixels_of(table) for name, table in tables.items()}
        dead = compare(sides, dying, args.rounds) if args.dead else {}
    mega = sorted(pixels.shape[0] * pixels.shape[1] / 1e6 for pixels in originals)
    size = sum(map(len, bodies)) * 8 / sum(mega) / 1e6
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {os.cpu_count()} cores; "
        f"{args.processes} process(es) of {args.threads} threads; {args.rounds} rounds "
        f"of {args.images} urls, "
        f"medians; JPEGs of {mega[0]:.1f} to {mega[-1]:.1f} megapixels, median "
        f"{statistics.median(mega):.1f}, {sum(m > 4 for m in mega)} of {len(mega)} above 4, "
        f"{size:.1f} bits a pixel; stored {args.side} x {args.side}, JPEG 95; "
        f"img2dataset {version('img2dataset')}\n"
    )
    table_of("all hosts alive", runs)
    if dead:
        table_of(f"{args.dead:.0%} of the urls dead", dead)
    best = {index: ideal(originals[index], args.side) for index in stored[OURS]}
    print("| PSNR, dB: mean (least) | to img2dataset's | to Lanczos of the originals | kB |")
    print("| --- | ---: | ---: | ---: |")
    for name, images in stored.items():
        kilobytes = statistics.mean(map(len, tables[name]["image"].to_pylist())) / 1e3
        same = "-" if name == RIVAL else psnr(images, stored[RIVAL])
        print(f"| {name} | {same} | {psnr(images, best)} | {kilobytes:.1f} |")


if __name__ == "__main__":
    main()
