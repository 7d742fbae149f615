"""Training batches through lanes, against pyarrow's raw read and the loaders of others.

The same samples (as CLIP ViT-L/14 and Stable Diffusion 1.5 give them) lie in the format of each,
and every loader makes torch batches of what a stage trains on: of one scale, and of six. Lanes and
mosaicml-streaming shuffle; the others are not asked to, which spares them work. `pyarrow, raw`
reads the same columns of the same shards from mapped memory, row group by row group, and makes no
batch. All of them from a warm page cache, in turn, in an order that changes every round; medians.
CPU seconds are those of the whole process tree, so Ray, whose own processes never rest, starts when
the others are through. A rival that is not installed is left out, and said so; see
benchmarks/requirements.txt.

A seek is timed from the manifest's file to the first batch of a far step, with windows as they are
in training on a cluster.

    python benchmarks/lanes.py
    python benchmarks/lanes.py --only 'webdataset|mosaicml'     # without Ray
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from feature_formats import DEPTHS, SHAPES, TEXT, without_torchvision
from measuring import Runs, alternate, medians, processor

from pipeline.progress import quiet_libraries
from pipeline.shards import Manifest, Shard, ShardWriter, layout, row_bytes, tensor_specs
from pipeline.storage import Storage
from pipeline.training.inputs import columns_for
from pipeline.training.lanes import Lanes

MIB = 2**20
RAY = "Ray Data, iter_torch_batches"
FAR = 1_000_000
STAGES = {"stage 1, one scale": DEPTHS[-1:], "stage 2, six scales": DEPTHS}
Batches = Callable[[list[str]], Iterator[dict[str, Any]]]


class Samples:
    """The same rows in the format of every loader, under one folder.

    A loader takes columns and gives an epoch of torch batches.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.storage = args, folder, Storage(folder)
        states, side, pixels = SHAPES[args.size]
        self.tensors = layout(
            "float16", tokens=TEXT, latent=(4, side, side), depths=DEPTHS, states=states,
            pixels=(pixels, pixels, 3),
        )  # fmt: skip
        self.group_bytes = int(args.row_group_mib * MIB)
        self.shard_rows = -(-args.rows // args.shards)
        shards = [self._shard(i, self._rows(i)) for i in range(args.shards)]
        schema = pq.read_schema(folder / shards[0]["path"])
        Manifest(shards, list(DEPTHS), tensor_specs(schema), {}).save(self.storage)
        self.manifest = Manifest.load(self.storage)

    def _rows(self, shard: int) -> dict[str, Any]:
        start = shard * self.shard_rows
        rows = min(self.shard_rows, self.args.rows - start)
        rng = np.random.default_rng(shard)
        arrays = {
            t.name: rng.integers(0, 200, (rows, *t.shape), np.uint8).astype(t.dtype)
            for t in self.tensors
        }
        keys = [f"{start + i:06d}" for i in range(rows)]
        return {"key": keys, "caption": keys, "subjects": [["a fish", "a cup"]] * rows, **arrays}

    def _shard(self, number: int, columns: dict[str, Any]) -> Shard:
        rows, path = len(columns["key"]), f"features/train-{number:05d}.parquet"
        rest = {"url": columns["key"], "aesthetic": [6.5] * rows, "predictor": ["v2"] * rows}
        with self.storage.publish(path) as sink:
            writer = ShardWriter(sink, self.tensors, self.group_bytes)
            writer.write({**columns, **rest})
            writer.close()
        return Shard(
            path=path, split="train", rows=rows, row_groups=writer.row_groups, bytes=sink.bytes,
            sha256=sink.sha256,
        )  # fmt: skip

    def loaders(self) -> dict[str, Batches]:
        """Ours, and the rivals that match `--only` and are installed; Ray Data is the last one."""
        found: dict[str, Batches] = {"pyarrow, raw": self.pyarrow, "lanes": self.lanes}
        for name, prepare in {
            "webdataset": self.webdataset,
            "mosaicml-streaming": self.streaming,
            RAY: self.ray_data,
        }.items():
            if not re.search(self.args.only, name):
                continue
            try:
                found[name] = prepare()
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        return found

    def pyarrow(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """No batches: tables, as large as what was asked for."""
        tensors = [name for name in columns if name in self.manifest.tensors]
        for shard in self.manifest.shards:
            with pq.ParquetFile(self.folder / shard["path"], memory_map=True) as file:
                for index in range(file.num_row_groups):
                    table = file.read_row_group(index, columns=columns)
                    yield {name: table.column(name) for name in tensors}

    def lanes(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        for batch in self._lanes(tuple(columns)).batches(0, self.args.rows // self.args.batch):
            yield _torch(batch.columns)

    @functools.cache  # noqa: B019 (one of these objects)
    def _lanes(self, columns: tuple[str, ...]) -> Lanes:
        return Lanes(
            self.storage, self.manifest, columns, lanes=self.args.lanes,
            global_batch=self.args.batch, shuffle_rows=self.args.window, seed=(0,),
        )  # fmt: skip

    def seek(self, columns: list[str]) -> float:
        """Seconds to the first batch of a far step."""
        began = time.perf_counter()
        lanes = Lanes(
            Storage(self.folder), Manifest.load(self.storage), columns, lanes=self.args.lanes,
            global_batch=self.args.batch, shuffle_rows=512, seed=(0,),
        )  # fmt: skip
        batches = lanes.batches(FAR, FAR + 1)
        _torch(next(batches).columns)
        spent = time.perf_counter() - began
        batches.close()
        return spent

    def ray_data(self) -> Batches:
        import ray
        import ray.data
        from ray.data.extensions import ArrowTensorArray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        folder = self.folder / "ray"
        folder.mkdir()
        per_group = max(1, self.group_bytes // sum(tensor.nbytes for tensor in self.tensors))
        for i in range(self.args.shards):
            columns = self._rows(i)
            arrays = {t.name: ArrowTensorArray.from_numpy(columns[t.name]) for t in self.tensors}
            pq.write_table(
                pa.table(arrays), folder / f"{i}.parquet", row_group_size=per_group,
                compression="NONE", use_dictionary=False,
            )  # fmt: skip

        def read(columns: list[str]) -> Iterator[dict[str, Any]]:
            names = [name for name in columns if name in self.manifest.tensors]
            data = ray.data.read_parquet(str(folder), columns=names)
            yield from data.iter_torch_batches(batch_size=self.args.batch)

        return read

    def webdataset(self) -> Batches:
        import webdataset as wds

        paths = []
        for i in range(self.args.shards):
            columns = self._rows(i)
            paths.append(str(self.folder / f"{i:02d}.tar"))
            with wds.TarWriter(paths[-1]) as tar:
                for row, key in enumerate(columns["key"]):
                    arrays = {f"{t.name}.npy": columns[t.name][row] for t in self.tensors}
                    text = {"txt": key, "json": columns["subjects"][row]}
                    tar.write({"__key__": key, **text, **arrays})

        def read(columns: list[str]) -> Iterator[dict[str, Any]]:
            names = [name for name in columns if name in self.manifest.tensors]
            wanted = {"txt", "json", *(f"{name}.npy" for name in names)}
            data = wds.WebDataset(
                paths,
                shardshuffle=False,
                select_files=lambda name: name.partition(".")[2] in wanted,
            )
            keys = "txt", "json", *(f"{name}.npy" for name in names)
            for batch in data.decode().to_tuple(*keys).batched(self.args.batch):
                yield _torch(dict(zip(("key", "subjects", *names), batch, strict=True)))

        return read

    def streaming(self) -> Batches:
        with without_torchvision():
            from streaming import MDSWriter, StreamingDataset

        out = str(self.folder / "mds")
        kinds = {t.name: f"ndarray:{t.dtype}:{','.join(map(str, t.shape))}" for t in self.tensors}
        with MDSWriter(out=out, columns={"key": "str", **kinds}, size_limit=2**28) as writer:
            for i in range(self.args.shards):
                columns = self._rows(i)
                for row in range(len(columns["key"])):
                    writer.write({name: columns[name][row] for name in ("key", *kinds)})
        size = self.args.batch
        data = StreamingDataset(local=out, batch_size=size, shuffle=True)

        def read(columns: list[str]) -> Iterator[dict[str, Any]]:
            names = ["key", *(name for name in columns if name in kinds)]

            def picked(samples: list[dict[str, Any]]) -> dict[str, Any]:  # a sample is read whole
                return _torch({name: _stacked([s[name] for s in samples]) for name in names})

            yield from torch.utils.data.DataLoader(data, batch_size=size, collate_fn=picked)

        return read


def _torch(columns: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v
        for name, v in columns.items()
    }


def _stacked(values: list[Any]) -> Any:
    return np.stack(values) if isinstance(values[0], np.ndarray) else values


def _consumed(batches: Iterator[dict[str, Any]]) -> int:
    """Bytes of the tensors of all batches."""
    return sum(getattr(v, "nbytes", 0) for batch in batches for v in batch.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a look")
    parser.add_argument("--rows", type=int, default=256, help="samples (default: 256)")
    parser.add_argument("--shards", type=int, default=4, help="files of them (default: 4)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--lanes", type=int, default=4, help="lanes of a worker (default: 4)")
    parser.add_argument("--window", type=int, default=32, help="rows a lane shuffles (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all (default: 5)")
    parser.add_argument("--passes", type=int, default=3, help="epochs a round (default: 3)")
    parser.add_argument("--row-group-mib", type=float, default=64.0, help="(default: 64)")
    parser.add_argument(
        "--only", default="", help="other loaders, a regular expression (default: all)"
    )
    args = parser.parse_args()
    if args.rows % args.batch or args.rows % args.lanes:
        raise SystemExit("--rows must be a multiple of --batch and of --lanes")
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="lanes-bench-") as folder:
        samples = Samples(args, Path(folder))
        loaders = samples.loaders()
        print(
            f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {os.cpu_count()} cores; "
            f"{args.rows} samples in batches of {args.batch}, row groups of "
            f"{args.row_group_mib:g} MiB; {args.rounds} rounds of {args.passes} epochs, medians; "
            f"pyarrow {pa.__version__}, torch {torch.__version__}\n"
        )
        stages = {title: columns_for("float16", depths) for title, depths in STAGES.items()}
        others = {name: loader for name, loader in loaders.items() if name != RAY}
        runs = {title: measure(samples, others, columns) for title, columns in stages.items()}
        if RAY in loaders:
            with a_cluster():
                for title, columns in stages.items():
                    runs[title] |= measure(samples, {RAY: loaders[RAY]}, columns)
        for title, columns in stages.items():
            show(samples, title, columns, runs[title])


@contextlib.contextmanager
def a_cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=max(2, os.cpu_count() or 1), log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def measure(samples: Samples, loaders: dict[str, Batches], columns: list[str]) -> Runs:
    """(wall, CPU) seconds of each loader's epochs, in every round."""
    args, size = samples.args, row_bytes(samples.manifest, columns)
    methods: dict[str, Callable[[], Any]] = {}
    for name, loader in loaders.items():
        if (got := _consumed(loader(columns))) != args.rows * size:
            raise SystemExit(
                f"{name} gave {got} bytes, not {args.rows * size}: nothing was measured"
            )
        methods[name] = lambda loader=loader: [  # type: ignore[misc]
            _consumed(loader(columns)) for _ in range(args.passes)
        ]
    return alternate(methods, args.rounds)


def show(samples: Samples, title: str, columns: list[str], runs: Runs) -> None:
    """One stage: a table of the loaders, and the seek."""
    args, size = samples.args, row_bytes(samples.manifest, columns)
    rows = args.rows * args.passes
    raw_wall, raw_cpu = medians(runs["pyarrow, raw"])
    print(
        f"| {title}: {size:,} bytes a row | rows/s | MB/s | CPU s per GB | rows/s over pyarrow | "
        "per CPU-second over pyarrow |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, own in runs.items():
        wall, cpu = medians(own)
        print(
            f"| {name} | {rows / wall:,.0f} | {rows * size / wall / 1e6:,.0f} "
            f"| {cpu / (rows * size / 1e9):.3f} | {raw_wall / wall:.2f} | {raw_cpu / cpu:.2f} |"
        )
    seeks = [samples.seek(columns) for _ in range(args.rounds)]
    print(f"\nSeek to step {FAR:,}: first batch after {statistics.median(seeks):.3f} s\n")


if __name__ == "__main__":
    main()
