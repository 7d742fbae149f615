"""Sealed feature shards for other programs: which files they are, and arrays of what was read.

DuckDB, pandas, polars, pyarrow and `datasets` read the files themselves; they give a tensor as
bytes, and the manifest says of which shape and dtype. Neither torch nor Ray is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.shards import SCALARS, Manifest, Tensor, from_bytes, read_row_group, unpack
from pipeline.storage import Storage


class FeatureShards:
    """The features that are sealed under a root.

    Args:
        root: of a curation: a folder, s3:// or gs://.

    Raises:
        UserError: nothing is sealed there.
    """

    def __init__(self, root: str | Path) -> None:
        self.storage = Storage(root)
        self.manifest = Manifest.load(self.storage)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Shape and dtype of each tensor column."""
        return {
            name: Tensor(name, tuple(spec["shape"]), spec["dtype"])
            for name, spec in self.manifest.tensors.items()
        }

    @property
    def columns(self) -> list[str]:
        """Names of all columns: scalars, then tensors."""
        return [*(field.name for field in SCALARS), *self.tensors]

    def files(self, split: str = "train") -> list[str]:
        """Paths, or addresses, of the shards of a split, in the manifest's order."""
        return [self.storage.url(shard["path"]) for shard in self.manifest.split(split)]

    def arrays(self, read: Any) -> dict[str, Any]:
        """What another program read, with tensors as arrays.

        Args:
            read: an Arrow table, batch or reader (DuckDB's `arrow`), a frame of pandas or polars,
                what DuckDB's `fetchnumpy` gives, or any mapping of columns; of as many rows and
                columns as it likes.

        Returns:
            Its columns: a tensor as an array (rows, *shape) in its stored dtype, the rest as lists.

        Raises:
            UserError: a tensor's bytes are not of the size that the manifest says, or `read` is
                none of these: a query that has not been run, say.
        """
        return {name: self._column(name, values) for name, values in _columns(read)}

    def row(self, read: Mapping[str, Any]) -> dict[str, Any]:
        """One row as another program read it, with tensors as arrays of their shape; for
        `Dataset.map`, say.
        """
        columns = self.arrays({name: [value] for name, value in read.items()})
        return {name: values[0] for name, values in columns.items()}

    def dataset(self, split: str = "train", columns: Sequence[str] | None = None) -> Any:
        """The rows of a split as a `datasets.IterableDataset` that reads while it goes.

        Tensors of two to five dimensions have the features Array2D to Array5D, in the stored dtype;
        those of one are lists. It has as many shards as there are files, so that the workers of a
        DataLoader share them.

        Args:
            columns: those that are read; None = all.

        Raises:
            UserError: there is no such column, the split is empty, or `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError:
            raise UserError("the package datasets is missing: pip install datasets") from None
        wanted = self.columns if columns is None else list(columns)
        if unknown := [name for name in wanted if name not in self.columns]:
            there = ", ".join(self.columns)
            raise UserError(f"features have no column {unknown[0]!r}; there are: {there}")
        paths = [shard["path"] for shard in self.manifest.split(split)]
        if not paths:
            raise UserError(f"{self.storage.url()}: no rows in the split {split!r}; try train")
        kinds = {field.name: field.type for field in SCALARS}
        features = {
            name: _tensor_feature(self.tensors[name])
            if name in self.tensors
            else datasets.features.features.generate_from_arrow_type(kinds[name])
            for name in wanted
        }
        return datasets.IterableDataset.from_generator(
            self._rows,
            features=datasets.Features(features),
            gen_kwargs={"paths": paths, "columns": tuple(wanted)},
        )

    def _rows(self, paths: list[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for path in paths:
            with self.manifest.open(self.storage, path) as file:
                for index in range(file.num_row_groups):
                    group = read_row_group(file, index, columns)
                    for row in range(file.metadata.row_group(index).num_rows):
                        yield {name: group[name][row] for name in columns}

    def _column(self, name: str, values: Any) -> Any:
        tensor = self.tensors.get(name)
        if isinstance(values, pa.ChunkedArray):
            if tensor is not None and values.type == pa.binary(tensor.nbytes):
                return unpack(tensor.field(), values)
            values = values.to_pylist()
        if tensor is None:
            return values.tolist() if isinstance(values, np.ndarray) else list(values)
        rows = list(values)
        if odd := {0 if row is None else len(row) for row in rows} - {tensor.nbytes}:
            raise UserError(
                f"{name}: a row of {min(odd)} bytes, and {tensor.nbytes} by {self.storage.url()}; "
                "read it from that root"
            )
        return from_bytes(rows, tensor.shape, tensor.dtype)


def _columns(read: Any) -> list[tuple[str, Any]]:
    if isinstance(read, pa.RecordBatchReader):
        read = read.read_all()
    if isinstance(read, pa.RecordBatch):
        read = pa.Table.from_batches([read])
    if isinstance(read, pa.Table):
        return list(zip(read.column_names, read.columns, strict=True))
    if isinstance(read, Mapping):
        return list(read.items())
    if hasattr(read, "to_numpy") and hasattr(read, "columns"):  # a frame of pandas or polars
        return [(name, read[name]) for name in read.columns]
    raise UserError(
        f"a {type(read).__name__} holds no columns that have been read; give a table of Arrow, "
        "pandas or polars (of a query: collect(), fetchnumpy() or arrow()), or a dict of columns"
    )


def _tensor_feature(tensor: Tensor) -> Any:
    import datasets

    if len(tensor.shape) == 1:
        return datasets.List(datasets.Value(tensor.dtype), tensor.shape[0])
    return getattr(datasets, f"Array{len(tensor.shape)}D")(tensor.shape, tensor.dtype)
