"""Results of an evaluation: one row a picture, in one Parquet file that says what its columns mean.

The file lies at evaluation/<bench>/scores.parquet. Its columns are method, key, reference, prompt,
seed, asked, and then a float64 for each measure, null where it was not measured. Its metadata `ssr`
is JSON: {"bench": {...}, "measures": [{...}], "methods": {name: {...}}}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.evaluation import bootstrap
from pipeline.evaluation.bootstrap import Floats, Interval, Spread
from pipeline.storage import Storage

Better = Literal["higher", "lower"]

METADATA = b"ssr"
COLUMNS = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("asked", pa.string()),
    ]
)
"""The columns before the measures."""

# Of a file that somebody else may have written: far above any bench, far below what harms.
_MOST_VALUES, _MOST_MEASURES, _MOST_METHODS = 20_000_000, 100, 1000
_MOST_BYTES, _MOST_TEXT = 512 << 20, 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Measure:
    """A column of scores."""

    name: str
    """"clip_t": the column."""
    title: str
    """What tables call it: "CLIP-T"."""
    better: Better
    digits: int = 3
    """Decimal places that tables show."""
    backbone: str | None = None
    """What it looked with, with the hash of its weights; None = nothing. Scores of other backbones
    are other measures, whatever their names."""

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.better == "higher" else -1


@dataclass(frozen=True)
class MethodInfo:
    """What is told of a method beside its scores."""

    title: str
    native: bool
    """False = its pictures were read from a folder."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Results:
    """Scores of all methods on one bench.

    Raises UserError, in one line, where the parts do not fit together: columns of another name or
    type, a picture twice, a method that is not told of, a value that is infinite.
    """

    rows: pa.Table
    """COLUMNS, then a float64 column for each measure, in their order."""
    bench: Mapping[str, Any]
    """The bench's settings."""
    measures: tuple[Measure, ...]
    methods: Mapping[str, MethodInfo]
    """By name, in the order of tables."""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, Any]],
        bench: Mapping[str, Any],
        measures: Sequence[Measure],
        methods: Mapping[str, MethodInfo],
    ) -> Results:
        """From one mapping a picture; what it lacks was not measured, what else it has is left out.
        Truth values become 0 and 1.
        """
        columns: dict[str, list[Any]] = {
            name: [row.get(name) for row in rows] for name in COLUMNS.names
        }
        for measure in measures:
            values = (row.get(measure.name) for row in rows)
            numbers = (None if value is None else float(value) for value in values)
            columns[measure.name] = [None if v is None or math.isnan(v) else v for v in numbers]
        table = pa.Table.from_pydict(columns, _schema(measures))
        return cls(table, dict(bench), tuple(measures), dict(methods))

    # --- files ---

    def write(self, storage: Storage, path: str) -> None:
        told = {
            "bench": dict(self.bench),
            "measures": [asdict(measure) for measure in self.measures],
            "methods": {name: asdict(method) for name, method in self.methods.items()},
        }
        metadata = {METADATA: json.dumps(told, default=str).encode()}
        with storage.publish(path) as sink:
            pq.write_table(self.rows.replace_schema_metadata(metadata), sink)

    @classmethod
    def read(cls, storage: Storage, path: str) -> Results:
        """A file that `write` made; anything else ends in a UserError that names it."""
        where = storage.url(path)
        if not storage.is_file(path):
            raise UserError(f"there is no {where}; run python jobs/evaluate.py there first")
        if (size := storage.size(path)) > _MOST_BYTES:
            raise UserError(f"{where} has {size:,} bytes; results have at most {_MOST_BYTES:,}")
        try:
            with storage.open_input(path) as source:
                return _read(source)
        except UserError as error:
            raise UserError(f"{where}: {error}; it is not what jobs/evaluate.py writes") from None
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            line = " ".join(str(error).split())[:120]
            raise UserError(f"{where} is no readable Parquet file of results ({line})") from None

    # --- figures ---

    def of_method(self, method: str) -> pa.Table:
        """Its rows."""
        if method not in self.methods:
            there = ", ".join(self.methods)
            raise UserError(f"there is no method {method!r} in the results; there are: {there}")
        return self.rows.filter(pc.equal(self.rows["method"], method))

    def values(self, method: str) -> tuple[Floats, np.ndarray]:
        """Its scores (pictures, measures), NaN = not measured, and references (pictures,)."""
        rows = self.of_method(method)
        return matrix(rows, self.measures), names(rows["reference"])

    def means(
        self, method: str, resamples: int = bootstrap.RESAMPLES, seed: int = 0
    ) -> dict[str, Interval]:
        """Mean and interval of each measure over its pictures, drawn by reference."""
        found = bootstrap.intervals(*self.values(method), resamples, seed)
        return {measure.name: of for measure, of in zip(self.measures, found, strict=True)}

    def means_over_seeds(
        self, methods: Sequence[str], resamples: int = bootstrap.RESAMPLES, seed: int = 0
    ) -> dict[str, Spread]:
        """The same of an arm whose training seeds are `methods`: see bootstrap.over_seeds."""
        found = bootstrap.over_seeds([self.values(m) for m in methods], resamples, seed)
        return {measure.name: of for measure, of in zip(self.measures, found, strict=True)}


def matrix(rows: pa.Table, measures: Sequence[Measure]) -> Floats:
    """Scores (rows, measures), NaN = not measured."""
    columns = [rows[measure.name].to_numpy().astype(np.float64) for measure in measures]
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


def names(column: pa.ChunkedArray) -> np.ndarray:
    """A column of strings as an array of them."""
    # as objects: of NumPy's strings each takes as much as the longest
    return np.array(column.to_pylist(), dtype=object)


# --- checks -----------------------------------------------------------------------------

_TEXTS = [field.name for field in COLUMNS if field.type == pa.string()]


def _schema(measures: Sequence[Measure]) -> pa.Schema:
    return pa.schema([*COLUMNS, *(pa.field(m.name, pa.float64()) for m in measures)])


def _read(source: pa.NativeFile) -> Results:
    file = pq.ParquetFile(source)
    footer = file.metadata
    if footer.num_rows * footer.num_columns > _MOST_VALUES:
        raise UserError(f"it has {footer.num_rows:,} rows of {footer.num_columns:,} columns")
    size = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    if size > _MOST_BYTES:
        raise UserError(f"it unpacks to {size:,} bytes, more than {_MOST_BYTES:,}")
    told = _told((footer.metadata or {}).get(METADATA))
    measures = tuple(_measure(item) for item in _part(told, "measures", list))
    methods = {name: _method(item) for name, item in _part(told, "methods", dict).items()}
    _check_names(measures, methods)
    expected = _schema(measures)
    _check_columns(_plain(file.schema_arrow), expected)  # all of it before a value is read
    rows = _spelt(pq.ParquetFile(source, metadata=footer, read_dictionary=_TEXTS).read())
    rows.validate(full=True)  # strings that are none
    return Results(rows.cast(expected), _part(told, "bench", dict), measures, methods)


def _told(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise UserError("it has no metadata `ssr`")
    told = json.loads(data)
    if not isinstance(told, dict):
        raise UserError("its metadata `ssr` is no JSON object")
    return told


def _part(told: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(found := told.get(name), kind):
        raise UserError(f"its metadata `ssr` has no {name}")
    return found


def _measure(item: Any) -> Measure:
    return _built(Measure, item, {
        "name": lambda v: isinstance(v, str),
        "title": _is_title,
        "better": lambda v: v in get_args(Better),
        "digits": lambda v: type(v) is int and 0 <= v <= 9,
        "backbone": lambda v: v is None or _is_title(v),
    })  # fmt: skip


def _method(item: Any) -> MethodInfo:
    return _built(MethodInfo, item, {
        "title": _is_title,
        "native": lambda v: isinstance(v, bool),
        "settings": lambda v: isinstance(v, dict),
    })  # fmt: skip


def _built(cls: type, item: Any, checks: Mapping[str, Callable[[Any], bool]]) -> Any:
    if not isinstance(item, dict):
        raise UserError(f"a {cls.__name__} in its metadata is no JSON object")
    given = {name: item.get(name) for name in checks}
    for name, is_sound in checks.items():
        if not is_sound(given[name]):
            raise UserError(f"a {cls.__name__} in its metadata has {name} {given[name]!r:.60}")
    return cls(**given)


def _is_title(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with strings in place of dictionaries of strings."""

    def plain(kind: pa.DataType) -> pa.DataType:
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    return pa.schema([pa.field(field.name, plain(field.type)) for field in schema])


def _spelt(rows: pa.Table) -> pa.Table:
    """Dictionaries of strings as strings: a long one that every row names would fill the memory."""
    for i, field in enumerate(rows.schema):
        if not pa.types.is_dictionary(field.type):
            continue
        column, size = rows.column(i), 0
        for chunk in column.chunks:
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
            size += pc.sum(lengths.cast(pa.int64())).as_py() or 0
        if size > _MOST_TEXT:
            raise UserError(f"column {field.name} unpacks to {size:,} bytes of text")
        rows = rows.set_column(i, field.name, column.cast(pa.string()))
    return rows


def _check_names(measures: Sequence[Measure], methods: Mapping[str, MethodInfo]) -> None:
    if len(measures) > _MOST_MEASURES or len(methods) > _MOST_METHODS:
        raise UserError(f"{len(measures)} measures of {len(methods)} methods are too many")
    columns = [*COLUMNS.names, *(measure.name for measure in measures)]
    for kind, given in (("measure", columns), ("method", list(methods))):
        for name in given:
            if not _NAME.fullmatch(name) or given.count(name) > 1:
                raise UserError(f"{name!r:.60} cannot name a {kind}, or does so twice")


def _check(results: Results) -> None:
    measures, methods, rows = results.measures, results.methods, results.rows
    _check_names(measures, methods)
    _check_columns(rows.schema, _schema(measures))
    for field in COLUMNS:
        if not field.nullable and rows[field.name].null_count:
            raise UserError(f"column {field.name} lacks values")
    for method in pc.unique(rows["method"]).to_pylist():
        if method not in methods:
            raise UserError(f"nothing is told of method {method!r:.60}")
    pictures = rows.select(["method", "key"])
    if len(pictures.group_by(["method", "key"]).aggregate([])) < len(rows):
        raise UserError("a picture is there twice (the same method and key)")
    for measure in measures:
        if np.isinf(matrix(rows, [measure])).any():
            raise UserError(f"column {measure.name} holds an infinite value")


def _check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    if found.names != expected.names:
        odd = [n for n in found.names if n not in expected.names]
        lacking = [n for n in expected.names if n not in found.names]
        if lacking:
            raise UserError(f"it lacks column {lacking[0]}")
        if odd:
            raise UserError(f"it has an unknown column {odd[0]!r:.60}")
        raise UserError("its columns are in another order, or there twice")
    for field in expected:
        if found.field(field.name).type != field.type:
            kind = " ".join(str(found.field(field.name).type).split())
            raise UserError(f"column {field.name} is {kind:.60}, not {field.type}")
