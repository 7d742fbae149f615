"""The filter against polars alone and against Ray Data's own filter, on LAION-like metadata.

Every contestant applies the same conditions to the same files (aesthetic > 6, punsafe < 0.5,
pwatermark < 0.8, shortest side >= 512). "polars" scans them in one process, all cores, and keeps
the survivors in memory. "Ray Data" is `read_parquet(...).filter(expr=...)`, survivors counted.
"The scan" is our same step: it also counts every dropped row under its condition and every score
in a histogram, and writes the survivors out, sorted by their place in the shuffle. "The stage" is
all: the scan, then duplicates by url and by hash, shuffle, split, and the units written. Ray runs
already, with a slot for each core, and the first round is not counted. What a survivor costs does
not depend on how many rows fail, so the share that passes decides the stage's ratio: by default one
in five hundred, as of LAION-5B (12.1 million of 5.85 billion rows have a V2 score above 6).

    python benchmarks/filter.py                          # 48 million rows in 64 files
    python benchmarks/filter.py --memory                 # ours alone: peak memory, rows growing
    python benchmarks/filter.py --memory --bound 0 --rows 100000000   # every row survives
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import psutil
from measuring import alternate, medians, processor

from pipeline.cluster import connect
from pipeline.config import FilterConfig, RayConfig
from pipeline.curation.filtering.metadata import UNIT, Filter
from pipeline.curation.filtering.scan import Scan, parts_of
from pipeline.progress import Progress
from pipeline.storage import Storage
from pipeline.tasks import spread
from pipeline.units import Marker, run_unit

ROW_GROUP = 100_000
MIN_SIDE, SPREAD = 512, 0.5


def write_metadata(folder: Path, files: int, rows: int, passing: float) -> str:
    """`rows` rows of LAION-Aesthetics' schema in `files` files, 2 % of the urls twice; of them the
    share `passing` passes all conditions.
    """
    # a share of 0.66 passes the conditions on size, safety and watermark
    mean = 6.0 - SPREAD * statistics.NormalDist().inv_cdf(1 - min(passing / 0.66, 0.99))
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        count = rows // files
        rng = np.random.default_rng([5, number])
        ids = rng.integers(0, 50 * rows, count)
        ids[: count // 50] = np.random.default_rng(5).integers(0, 50 * rows, count // 50)
        frame = pl.DataFrame({"id": ids}).select(
            pl.format(
                "https://cdn{}.example.com/images/{}_large.jpg", pl.col("id") % 9973, "id"
            ).alias("URL"),
            pl.format(
                "Photo of item {} for the living room, {} pieces, free shipping",
                pl.col("id") % 99_991,
                pl.col("id") % 77,
            ).alias("TEXT"),
            pl.Series("WIDTH", rng.integers(64, 3000, count).astype(np.float64)),
            pl.Series("HEIGHT", rng.integers(64, 3000, count).astype(np.float64)),
            pl.Series("similarity", rng.normal(0.32, 0.03, count)),
            pl.col("id").hash(7).reinterpret(signed=True).alias("hash"),
            pl.Series("punsafe", rng.beta(0.3, 4.0, count).astype(np.float32)),
            pl.Series("pwatermark", rng.beta(0.5, 1.5, count).astype(np.float32)),
            pl.Series("AESTHETIC_SCORE", rng.normal(mean, SPREAD, count).astype(np.float32)),
        )
        frame.write_parquet(
            folder / f"part-{number:05d}.parquet", compression="snappy", row_group_size=ROW_GROUP
        )
    return str(folder)


def ours(inputs: str, root: Path, bound: float, part_of: Progress) -> Marker:
    """The stage, whole."""
    shutil.rmtree(root, ignore_errors=True)
    cfg = FilterConfig(
        inputs=[inputs], min_aesthetic=bound, min_side=MIN_SIDE if bound > 0 else 0,
        unit_rows=2000, test_rows=100,
        **({} if bound > 0 else {"max_punsafe": 2.0, "max_pwatermark": 2.0}),
    )  # fmt: skip
    stage = Filter(cfg, spread=partial(spread, progress=part_of))
    marker = run_unit(stage, UNIT, Storage(root), "benchmark")
    stage.clear(Storage(root))
    return marker


def our_scan(inputs: str, root: Path, progress: Progress) -> None:
    """The stage as far as the survivors are set aside."""
    shutil.rmtree(root, ignore_errors=True)
    cfg = FilterConfig(inputs=[inputs], min_side=MIN_SIDE)
    stage = Filter(cfg, spread=partial(spread, progress=progress))
    found, mapped = stage.look()
    stage.scan(Scan(cfg, parts_of(found), mapped, stage.settings), Storage(root))


def polars_alone(inputs: str) -> int:
    """Survivors, by polars."""
    passes = (
        (pl.col("AESTHETIC_SCORE") > 6)
        & (pl.col("punsafe") < 0.5)
        & (pl.col("pwatermark") < 0.8)
        & (pl.min_horizontal("WIDTH", "HEIGHT") >= MIN_SIDE)
    )
    return pl.scan_parquet(f"{inputs}/*.parquet").filter(passes).collect().height


def ray_data(inputs: str) -> int:
    """Survivors, by Ray Data."""
    import ray.data
    from ray.data.expressions import col

    passes = (
        (col("AESTHETIC_SCORE") > 6)
        & (col("punsafe") < 0.5)
        & (col("pwatermark") < 0.8)
        & (col("WIDTH") >= MIN_SIDE)
        & (col("HEIGHT") >= MIN_SIDE)
    )
    names = [f"{inputs}/{path.name}" for path in sorted(Path(inputs).glob("*.parquet"))]
    kept = ray.data.read_parquet(names).filter(expr=passes)
    return sum(
        batch.num_rows for batch in kept.iter_batches(batch_format="pyarrow", batch_size=None)
    )


def race(inputs: str, root: Path, rows: int, rounds: int, progress: Progress) -> str:
    """The three, in turn."""
    alone = polars_alone(inputs)
    marker = ours(inputs, root, 6.0, progress)
    dropped = marker.tally.dropped
    repeated = dropped.get("duplicate_url", 0) + dropped.get("duplicate_hash", 0)
    if not marker.tally.kept + repeated == alone == ray_data(inputs):
        raise SystemExit("the contestants do not keep the same rows: nothing was measured")

    runs = alternate(
        {
            "polars alone": partial(polars_alone, inputs),
            "ours, the scan": partial(our_scan, inputs, root, progress),
            "ours, the stage": partial(ours, inputs, root, 6.0, progress),
            "Ray Data, filter(expr)": partial(ray_data, inputs),
        },
        rounds,
    )
    lines = [
        f"{alone:,} rows pass, {repeated:,} of them repeat.\n",
        f"| {rows:,} rows | wall, s | CPU, s | million rows/s | million rows/CPU s "
        "| wall, of polars' rate | CPU, of polars' rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = runs["polars alone"]
    for name, own in runs.items():
        wall, cpu = medians(own)
        ratios = [_spread([a[i] / b[i] for a, b in zip(first, own, strict=True)]) for i in (0, 1)]
        lines.append(
            f"| {name} | {wall:.2f} | {cpu:.2f} | {rows / wall / 1e6:.2f} | {rows / cpu / 1e6:.2f} "
            f"| {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Largest resident memory, MiB, of any process of ours while the block runs."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    peak[0] = max(peak[0], (memory.rss - memory.shared) / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _machine() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {psutil.cpu_count()} cores"


def main() -> None:
    """Write the metadata, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=48_000_000, help="rows (default: 48 million)")
    parser.add_argument("--files", type=int, default=64, help="files (default: 64)")
    parser.add_argument(
        "--passing", type=float, default=0.002, help="share of rows that pass (default: 0.002)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--memory", action="store_true", help="measure ours' memory instead")
    parser.add_argument(
        "--bound", type=float, default=6.0, help="with --memory: least score; 0 = every row passes"
    )
    parser.add_argument("--folder", default=None, help="where to work (default: a new folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, Progress(every_s=1e9) as progress:
        root = Path(folder) / "root"
        if not args.memory:
            inputs = write_metadata(Path(folder) / "metadata", args.files, args.rows, args.passing)
            with connect(RayConfig(num_cpus=psutil.cpu_count() or 1)):
                found = race(inputs, root, args.rows, args.rounds, progress)
            print(f"{_machine()}; polars {pl.__version__}; {args.files} files; {found}")
            return
        lines = [
            "| rows | kept | wall, s | largest process, MiB |",
            "| ---: | ---: | ---: | ---: |",
        ]
        with connect(RayConfig()):
            for share in (4, 2, 1):
                inputs = write_metadata(
                    Path(folder) / f"m{share}", args.files // share or 1, args.rows // share, 0.01
                )
                with peak_memory() as peak:
                    marker = ours(inputs, root, args.bound, progress)
                shutil.rmtree(inputs)
                rows, kept = marker.tally.rows_in, marker.tally.kept
                lines.append(f"| {rows:,} | {kept:,} | {marker.seconds:.1f} | {peak[0]:,.0f} |")
        print(f"{_machine()}; {args.files} files\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
