"""The same rows of features in every format that `features.py read` compares."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.progress import quiet_libraries
from pipeline.shards import (
    ShardWriter,
    clip_column,
    decode_states,
    encode_states,
    layout,
    open_shard,
    read_row_group,
    vision_columns,
)
from pipeline.storage import Storage

DEPTHS = (4, 8, 12, 16, 20, 24)
SHAPES = {  # tokens and width of CLIP, side of the latent and of CLIP's input
    "full": ((257, 1024), 64, 224),  # CLIP ViT-L/14, Stable Diffusion 1.5 at 512 pixels
    "small": ((17, 32), 8, 16),  # to see that it runs
}
TEXT = 77
MIB = 2**20
Reader = Callable[[tuple[int, ...]], int]


class Formats:
    """The same rows in every format under one folder, and how each is read.

    Every reader takes depths and returns the bytes of the tensors that were asked for.
    """

    def __init__(self, folder: Path, rows: int, size: str, row_group_mib: float) -> None:
        self.folder, self.rows = folder, rows
        self.storage = Storage(folder)
        states, side, pixels = SHAPES[size]
        self.layouts = {
            codec: layout(
                codec, tokens=TEXT, latent=(4, side, side), depths=DEPTHS, states=states,
                pixels=(pixels, pixels, 3),
            )
            for codec in ("float16", "int8", "pixels")
        }  # fmt: skip
        self.group_bytes = int(row_group_mib * MIB)
        rng = np.random.default_rng(0)
        drawn = {d: torch.from_numpy(rng.normal(size=(rows, *states))).float() for d in DEPTHS}
        self.columns: dict[str, dict[str, np.ndarray]] = {}
        for codec, tensors in self.layouts.items():
            self.columns[codec] = {
                t.name: rng.integers(0, 200, (rows, *t.shape)).astype(t.dtype) for t in tensors
            }
            if codec != "pixels":
                encoded = encode_states(codec, drawn)
                self.columns[codec] |= {name: value.numpy() for name, value in encoded.items()}
            self._write_shard(codec)
        self.plain = self.columns["float16"]
        self.rows_per_group = max(
            1, self.group_bytes // sum(v[0].nbytes for v in self.plain.values())
        )

    def _write_shard(self, codec: str) -> None:
        text = ["x"] * self.rows
        scalars: dict[str, Any] = dict.fromkeys(("key", "url", "caption", "predictor"), text)
        scalars |= {"aesthetic": [6.5] * self.rows, "subjects": [text[:1]] * self.rows}
        with self.storage.publish(f"{codec}.parquet") as sink:
            writer = ShardWriter(sink, self.layouts[codec], self.group_bytes)
            writer.write({**scalars, **self.columns[codec]})
            writer.close()

    def names(self, depths: tuple[int, ...]) -> list[str]:
        """All tensors, or those of the depths."""
        every = depths == DEPTHS
        return list(self.plain) if every else [clip_column(depth) for depth in depths]

    def readers(self, only: str) -> dict[str, Reader]:
        """pyarrow, ours, and the rivals that match; one that is not here is said on stderr."""
        found: dict[str, Reader] = {
            "pyarrow, raw": self.pyarrow,
            "shards": self.shards,
        }
        for name, prepare in {
            "Ray Data, tensor columns": self.ray_data,
            "webdataset": self.webdataset,
            "mosaicml-streaming": self.streaming,
        }.items():
            if not re.search(only, name):
                continue
            try:
                found[name] = prepare()
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        return found

    def shards(self, depths: tuple[int, ...], codec: str = "float16") -> int:
        """Ours: arrays by row group. int8 is decoded."""
        names = self.names(depths) if codec == "float16" else vision_columns(codec, depths)
        with open_shard(self.storage, f"{codec}.parquet") as file:
            # no row group outlives its turn, here as in the other readers: memory is used again
            return sum(
                _bytes(read_row_group(file, index, names), codec, depths)
                for index in range(file.num_row_groups)
            )

    def pyarrow(self, depths: tuple[int, ...]) -> int:
        """The same bytes, by pyarrow alone: a memory-mapped file, row group by row group."""
        names = self.names(depths)
        with pq.ParquetFile(self.folder / "float16.parquet", memory_map=True) as file:
            for index in range(file.num_row_groups):
                file.read_row_group(index, columns=names)
        return self.bytes(depths)

    def ray_data(self) -> Reader:
        import ray
        import ray.data
        from ray.data.extensions import ArrowTensorArray

        quiet_libraries()
        ray.init(num_cpus=max(2, os.cpu_count() or 1), log_to_driver=False, logging_level="ERROR")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        arrays = {name: ArrowTensorArray.from_numpy(value) for name, value in self.plain.items()}
        path = self.folder / "ray" / "a.parquet"
        path.parent.mkdir()
        pq.write_table(
            pa.table(arrays), path, row_group_size=self.rows_per_group, compression="NONE",
            use_dictionary=False,
        )  # fmt: skip

        def read(depths: tuple[int, ...]) -> int:
            data = ray.data.read_parquet(str(path)).select_columns(self.names(depths))
            batches = data.iter_batches(batch_size=None, batch_format="numpy")
            return sum(value.nbytes for batch in batches for value in batch.values())

        return read

    def webdataset(self) -> Reader:
        import webdataset as wds

        path = str(self.folder / "a.tar")
        with wds.TarWriter(path) as tar:
            for i in range(self.rows):
                arrays = {f"{name}.npy": value[i] for name, value in self.plain.items()}
                tar.write({"__key__": f"{i:06d}", **arrays})

        def read(depths: tuple[int, ...]) -> int:
            wanted = {f"{name}.npy" for name in self.names(depths)}
            data = wds.WebDataset(
                path, shardshuffle=False, select_files=lambda name: name.partition(".")[2] in wanted
            ).decode()
            arrays = (value for sample in data for value in sample.values())
            return sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))

        return read

    def streaming(self) -> Reader:
        with without_torchvision():
            from streaming import MDSWriter, StreamingDataset

        out = str(self.folder / "mds")
        columns = {
            name: f"ndarray:{value.dtype}:{','.join(map(str, value.shape[1:]))}"
            for name, value in self.plain.items()
        }
        with MDSWriter(out=out, columns=columns, size_limit=2**28) as writer:
            for i in range(self.rows):
                writer.write({name: value[i] for name, value in self.plain.items()})
        data = StreamingDataset(local=out, batch_size=1, shuffle=False)

        def read(depths: tuple[int, ...]) -> int:
            names = self.names(depths)  # a sample is read whole
            samples = (data[i] for i in range(self.rows))
            return sum(sample[name].nbytes for sample in samples for name in names)

        return read

    def bytes(self, depths: tuple[int, ...]) -> int:
        """Of the tensors that are asked for."""
        return sum(self.plain[name].nbytes for name in self.names(depths))


def _bytes(columns: dict[str, Any], codec: str, depths: tuple[int, ...]) -> int:
    if codec == "int8":
        return sum(decode_states(columns, [depth])[depth].nbytes for depth in depths)
    return sum(values.nbytes for values in columns.values())


@contextmanager
def without_torchvision() -> Iterator[None]:
    """mosaicml-streaming imports torchvision for data sets that are not used here; beside a torch
    without CUDA the one on PyPI breaks transformers, so an empty one stands in meanwhile.
    """
    import transformers.utils.import_utils as there

    there.is_torchvision_available()  # its answer is kept: it must not see the stand-in
    names = [f"torchvision{part}" for part in ("", ".datasets", ".transforms")]
    names.append("torchvision.transforms.functional")
    made = [name for name in names if name not in sys.modules]
    for name in made:
        module: Any = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.VisionDataset, module.to_tensor = object, None
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
