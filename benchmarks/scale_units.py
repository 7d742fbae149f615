"""The scheduler's side of a run of up to a million units: the driver's memory, CPU and requests.

Nothing is downloaded or computed. The markers are made up by a store that counts the requests it is
asked, so that a million of them need no disk; what lists, reads, compares, adds up and schedules
them is the jobs' own code. Every figure comes from a process of its own. Four tables:

- the driver: a run that is taken up again when every stage has half of its units: listing and
  check before work begins, reading what was there (beside the work), a look, the last look;
- Ray Data: units through three stages that find them committed, a task a unit as far as --tasks
  reaches, several a task beyond; what a task costs does not depend on the units in it;
- the manifest: written, read and laid out in lanes, shards of 2,000 images;
- S3: what a page of a listing and a marker cost the client, on a moto server of this machine.

    python benchmarks/scale_units.py                                 # all of it, some minutes
    python benchmarks/scale_units.py --only ray --ray 1000000 --tasks 20000     # a million, whole
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

import psutil
from measuring import processor

from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.units import Ledger, Tally

STAGES = ("images", "captions", "features")
PAGE = 1000
"""Names that a store lists in a request."""
NEW = 200
"""Units that come between two looks."""
_HOSTS, _SUBJECTS = 20, 30


class NoWork:
    """A stage that is never called: its units are committed when it is asked."""

    def __init__(self, name: str) -> None:
        self.name, self.source, self.settings = name, None, {"stage": name}

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        raise AssertionError(f"{unit}: there was nothing to do")


def unit_names(count: int) -> list[str]:
    return [f"train-{n:05d}" for n in range(count)]


class Faked(Storage):
    """A root where the first `made[stage]` units of each stage are committed. Which they are is
    known to the driver alone; a worker finds every marker that it asks for.
    """

    def __init__(self, units: Sequence[str], prints: dict[str, str]) -> None:
        super().__init__("s3://made-up/run")
        self.units, self.prints = units, prints
        self.made = dict.fromkeys(STAGES, 0)
        self.requests = 0
        self.pages: dict[str, list[int]] = {}
        for n, unit in enumerate(units):
            self.pages.setdefault(unit[:-3], []).append(n)
        self._markers = {stage: _marker(stage, prints[stage]) for stage in STAGES}

    def __reduce__(self) -> Any:
        return Faked, ([], self.prints)

    def names(self, folder: str, begin: Sequence[str] | None = None) -> Iterator[str]:
        made = self.made[folder.partition("/")[0]]
        if begin is None:
            self.requests += max(1, -(-made // PAGE))
            yield from (f"{unit}.json" for unit in self.units[:made])
            return
        for page in begin:
            self.requests += 1
            yield from (f"{self.units[n]}.json" for n in self.pages[page] if n < made)

    def read_bytes(self, path: str) -> bytes:
        self.requests += 1
        stage, unit = path.partition("/")[0], path.rpartition("/")[2].removesuffix(".json")
        return self._markers[stage].replace(b"UNIT", unit.encode())

    def read_many(self, paths: list[str]) -> dict[str, bytes]:
        return {path: self.read_bytes(path) for path in paths}

    def exists(self, path: str = "") -> bool:
        return path.endswith(".json")


def _marker(stage: str, fingerprint: str) -> bytes:
    """A marker as large as a real one."""
    extra: dict[str, Any] = {"row_groups": [300] * 4 + [132], "depths": [4, 8, 12, 16, 20, 24]}
    if stage == "images":
        extra = {
            "bytes": 500_000_000, "outcomes": "0" * 64, "transient": {"timeout": 100},
            "sizes": {"edges": list(range(0, 2048, 64)), "rows": [40] * 31},
            "hosts": {f"images-{n}.example.com": [20, 15] for n in range(_HOSTS)},
        }  # fmt: skip
    elif stage == "captions":
        extra = {
            "words": {"edges": list(range(31)), "rows": [40] * 30},
            "subjects": {f"a red thing {n}": 20 for n in range(_SUBJECTS)},
        }
    marker = {
        "unit": "UNIT", "stage": stage, "fingerprint": fingerprint, "settings": {"stage": stage},
        "tally": {
            "rows_in": 2000, "kept": 1332, "dropped": {"too_small": 68},
            "failed": {"http_404": 400, "timeout": 200}, "extra": extra,
        },
        "bytes": 200_000_000, "sha256": "0" * 64, "seconds": 90.0,
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return json.dumps(marker, indent=1).encode()


# --- what is measured, each in a process of its own ---


class Meter:
    """Seconds, CPU seconds and requests of each step; MiB more than at the beginning."""

    def __init__(self, store: Faked | None = None) -> None:
        self.store, self.base = store, _peak()
        self.figures: dict[str, float] = {}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        asked = self.store.requests if self.store else 0
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.figures[f"{name} wall"] = time.perf_counter() - wall
        self.figures[f"{name} cpu"] = time.process_time() - cpu
        if self.store:
            self.figures[f"{name} requests"] = self.store.requests - asked
        self.figures["MiB"] = _peak() - self.base
        return result


def _peak() -> float:
    """Most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def driver(count: int) -> dict[str, float]:
    from pipeline.runner import StageSpec, check_stages
    from pipeline.units import chain
    from pipeline.watch import Watch

    meter = Meter()
    stages = [NoWork(name) for name in STAGES]
    units = unit_names(count)
    meter.store = store = Faked(units, chain(stages))
    for late, name in enumerate(STAGES):
        store.made[name] = max(0, count // 2 - late * NEW)
    specs = [StageSpec(stage.name, partial(NoWork, stage.name)) for stage in stages]
    ledgers: Sequence[Ledger]
    ledgers, _ = meter.step("start", lambda: check_stages(specs, store, None))
    pending = meter.step(
        "pending", lambda: [u for u in units if any(u not in ledger.units for ledger in ledgers)]
    )
    assert len(pending) == count - store.made[STAGES[-1]]
    with Progress(terminal=False, every_s=1e9) as progress:
        watch = meter.step("watch", lambda: Watch(ledgers, units, progress))
        meter.step("read", watch.look)
        for name in STAGES:
            store.made[name] += NEW
        meter.step("look", watch.look)
        store.made = {name: min(count, made + NEW) for name, made in store.made.items()}
        meter.step("last", partial(watch.look, whole=True))
    assert {name: a.units for name, a in watch.accounts.items()} == store.made
    return meter.figures


def scheduled(count: int, tasks: int) -> dict[str, float]:
    from pipeline import runner
    from pipeline.cluster import connect
    from pipeline.config import RayConfig, StageResources
    from pipeline.units import chain

    runner._TASKS = tasks
    store = Faked(unit_names(count), chain([NoWork(name) for name in STAGES]))
    half = StageResources(cpus=0.5, max_workers=1)
    specs = [runner.StageSpec(name, partial(NoWork, name), half) for name in STAGES]
    with connect(RayConfig()), Progress(terminal=False, every_s=1e9) as progress:
        meter = Meter()
        run = partial(runner.run_stages, specs, store.units, store, progress)
        meter.step("run", run)
    shares = list(runner.shares(store.units, half.max_workers))
    return {**meter.figures, "tasks": len(shares), "most": max(map(len, shares))}


def manifest(shards: int, row_groups: int) -> dict[str, float]:
    from pipeline.shards import MANIFEST, Manifest, Shard

    rows = 2000
    each, left = divmod(rows, row_groups)
    sizes = [each + (n < left) for n in range(row_groups)]
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        made = Manifest(
            shards=[
                Shard(
                    path=f"features/train-{n:05d}.parquet", split="train", rows=rows,
                    row_groups=list(sizes), bytes=400_000_000, sha256=f"{n:064x}",
                )
                for n in range(shards)
            ],
            depths=[4, 8, 12, 16, 20, 24], tensors={}, encoders={},
        )  # fmt: skip
        writing = Meter()
        writing.step("save", partial(made.save, storage))
        size = storage.size(MANIFEST)
        # a reader of its own: what it takes is not what writing has left behind
        script = [sys.executable, __file__, "--part", "manifest_read", folder]
        read = json.loads(subprocess.run(script, check=True, capture_output=True).stdout)
    return {**writing.figures, **read, "bytes": size}


def manifest_read(folder: str) -> dict[str, float]:
    from pipeline.shards import Manifest
    from pipeline.training.lanes import LanePlan
    from pipeline.training.row_groups import RowGroups

    storage, meter = Storage(folder), Meter()
    found = meter.step("load", lambda: Manifest.load(storage))
    source = meter.step("groups", lambda: RowGroups(storage, found, []))
    plan = meter.step("plan", lambda: LanePlan(source.sizes, 512, 512, [0]))

    def seek() -> None:
        for lane in range(512):
            plan.rows_of(lane, plan.place(lane, 1_000_000))

    meter.step("seek", seek)
    return {**meter.figures, "row_groups": len(source.sizes)}


def s3(count: int) -> dict[str, float]:
    """A moto server in a process of its own: its time is not the client's CPU time."""
    serve = (
        "from moto.server import ThreadedMotoServer as S; import sys\n"
        "s = S('127.0.0.1', port=0, verbose=False); s.start()\n"
        "print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        storage = Storage("s3://bucket/run")
        storage._fs.mkdir("bucket")
        ledger, data = Ledger(storage, "images"), _marker("images", "f" * 16)
        storage._fs.pipe(
            {
                f"bucket/run/{ledger.path(unit)}": data.replace(b"UNIT", unit.encode())
                for unit in unit_names(count)
            }
        )
        meter = Meter()
        new = meter.step("list", ledger.look)
        read = meter.step("read", lambda: sum(1 for _ in ledger.news()))
        assert len(new) == read == count
        return meter.figures
    finally:
        server.communicate("")


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "driver": driver,
    "scheduled": scheduled,
    "manifest": manifest,
    "manifest_read": manifest_read,
    "s3": s3,
}


def measured(part: str, *words: object) -> dict[str, float]:
    """A part's figures, from a new process."""
    ran = subprocess.run(
        [sys.executable, __file__, "--part", part, *map(str, words)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    print(f"{part} {' '.join(map(str, words))}: done", file=sys.stderr, flush=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


# --- tables ---


def driver_table(sizes: Sequence[int]) -> Iterator[str]:
    yield (
        "| units | start: requests | wall, s | CPU, s | reading what was there: requests | CPU, s "
        "| a look: requests | CPU, s | last look: requests | CPU, s | MiB | kB a unit |"
    )
    yield "| ---: " * 12 + "|"
    for count in sizes:
        found = measured("driver", count)
        start = {k: found[f"start {k}"] + found[f"watch {k}"] for k in ("wall", "cpu")}
        start["cpu"] += found["pending cpu"]
        start["wall"] += found["pending wall"]
        looks = " | ".join(
            f"{found[f'{name} requests']:,.0f} | {found[f'{name} cpu']:.2f}"
            for name in ("read", "look", "last")
        )
        yield (
            f"| {count:,} | {found['start requests']:,.0f} | {start['wall']:.2f} "
            f"| {start['cpu']:.2f} | {looks} | {found['MiB']:,.0f} "
            f"| {found['MiB'] * 1024 / count:.2f} |"
        )


def ray_table(sizes: Sequence[int], tasks: int) -> Iterator[str]:
    yield (
        "| units | most a task | tasks | wall, s | driver CPU, s | CPU, ms a task | CPU, ms a unit "
        "| MiB |"
    )
    yield "| ---: " * 8 + "|"
    for count in sizes:
        found = measured("scheduled", count, tasks)
        cpu, made = found["run cpu"], found["tasks"]
        each = f"{1e3 * cpu / made:.2f} | {1e3 * cpu / count:.2f}"
        yield (
            f"| {count:,} | {found['most']:.0f} | {made:,.0f} | {found['run wall']:.1f} "
            f"| {cpu:.1f} | {each} | {found['MiB']:,.0f} |"
        )


def manifest_table(shards: Sequence[int], row_groups: Sequence[int]) -> Iterator[str]:
    yield (
        "| images | shards | row groups | manifest, MB | written, s | read, s | row groups, s "
        "| lanes, s | 512 windows of a later epoch, s | MiB of a reader |"
    )
    yield "| ---: " * 10 + "|"
    for count, groups in zip(shards, row_groups, strict=True):
        found = measured("manifest", count, groups)
        steps = " | ".join(
            f"{found[f'{n} cpu']:.2f}" for n in ("save", "load", "groups", "plan", "seek")
        )
        yield (
            f"| {count * 2000:,} | {count:,} | {found['row_groups']:,.0f} "
            f"| {found['bytes'] / 1e6:,.1f} | {steps} | {found['MiB']:,.0f} |"
        )


def s3_table(count: int) -> Iterator[str]:
    found, pages = measured("s3", count), -(-count // PAGE)
    yield "| markers | a page, CPU ms | a page, wall ms | a marker, CPU ms | a marker, wall ms |"
    yield "| ---: " * 5 + "|"
    list_, read = (
        [1e3 * found[f"{name} {kind}"] / each for kind in ("cpu", "wall")]
        for name, each in (("list", pages), ("read", count))
    )
    yield f"| {count:,} | {list_[0]:.1f} | {list_[1]:.1f} | {read[0]:.2f} | {read[1]:.2f} |"


def main() -> None:
    """Measure what is asked for, print a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = {"type": int, "nargs": "+"}
    parser.add_argument(
        "--only", nargs="+", choices=["driver", "ray", "manifest", "s3"],
        default=["driver", "ray", "manifest", "s3"], help="tables (default: all)",
    )  # fmt: skip
    parser.add_argument("--units", **whole, default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--ray", **whole, default=[500, 5000, 25_000], help="units through Ray Data"
    )
    parser.add_argument("--tasks", type=int, default=500, help="tasks before units share one")
    parser.add_argument("--shards", **whole, default=[5000, 500_000])
    parser.add_argument("--row-groups", **whole, default=[100, 7], help="of a shard")
    parser.add_argument("--markers", type=int, default=2000, help="markers on the S3 server")
    parser.add_argument("--part", nargs="+", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, *words = args.part
        numbers = [int(word) if word.isdigit() else word for word in words]
        print(json.dumps(PARTS[part](*numbers)))
        return
    print(f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {psutil.cpu_count()} cores")
    tables = {
        "driver": lambda: driver_table(args.units),
        "ray": lambda: ray_table(args.ray, args.tasks),
        "manifest": lambda: manifest_table(args.shards, args.row_groups),
        "s3": lambda: s3_table(args.markers),
    }
    for name in args.only:
        print()
        for line in tables[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
