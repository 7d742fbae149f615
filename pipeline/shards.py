"""The feature-shard format: the only file that knows a shard's columns, dtypes and bytes.

A shard is one Parquet file. Scalars are stored as scalars. Every tensor is a `fixed_size_binary`
column of little-endian bytes, with its shape and dtype in the field's metadata (`b"shape"`, JSON;
`b"dtype"`, numpy's name) and one column per CLIP depth, so that a training stage reads only the
depths it needs. Row groups are bounded by bytes; tensors are neither compressed nor
dictionary-encoded, and carry no statistics (a "minimum" would be a whole tensor in the footer).

| column | type | meaning |
|---|---|---|
| key, url, caption | string | as in the images and captions stages |
| aesthetic | float32, may be null | score of the image, computed or from the metadata |
| predictor | string, may be null | which predictor gave the score |
| subjects | list of string | noun phrases of the caption |
| token_ids | int32 [L] | the caption, padded to the text encoder's length |
| latent_mean, latent_logvar | float16 [C, h, w] | of the VAE's posterior, not scaled |

What CLIP's vision tower saw is stored by one of three codecs:

| codec | column | type | meaning |
|---|---|---|---|
| float16 | clip_<depth> | float16 [N_i, d] | hidden_states[depth], no post_layernorm |
| int8 | clip_<depth> | int8 [N_i, d] | the same, in steps of the token's scale |
| | clip_<depth>_scale | float32 [N_i] | the largest magnitude of each token, by 127 |
| pixels | clip_pixels | uint8 [S, S, 3] | the tower's input, resized and cropped, not normalised |

Where the mirror images are stored too, each of these has a twin <column>_flipped, but for token_ids
and clip_pixels, which is mirrored when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.storage import Storage

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 2
FOLDER = "features"
MANIFEST = f"{FOLDER}/manifest.json"
_PAGE_BYTES = 2**20
TOKEN_IDS, LATENT_MEAN, LATENT_LOGVAR = "token_ids", "latent_mean", "latent_logvar"
CLIP_PIXELS = "clip_pixels"
_INT8_STEPS = 127
_LINES = 1000  # of the manifest, written together
SCALARS: tuple[pa.Field, ...] = (
    pa.field("key", pa.string()),
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("aesthetic", pa.float32()),
    pa.field("predictor", pa.string()),
    pa.field("subjects", pa.list_(pa.string())),
)


def clip_column(depth: int) -> str:
    """Column of the vision tower's hidden states at `depth` (0 = the embeddings)."""
    return f"clip_{depth}"


def scale_column(depth: int) -> str:
    """Column of the tokens' scales at `depth`, beside int8 states."""
    return f"{clip_column(depth)}_scale"


def vision_columns(codec: str, depths: Iterable[int]) -> list[str]:
    """The columns that hold these depths, or what they are computed from (codec pixels)."""
    if codec == "pixels":
        return [CLIP_PIXELS]
    names = [clip_column(depth) for depth in depths]
    return names + [scale_column(depth) for depth in depths] if codec == "int8" else names


def flipped_column(name: str) -> str:
    """Column of the same features of the mirrored image."""
    return f"{name}_flipped"


@dataclass(frozen=True)
class Tensor:
    """A tensor column: every row holds one array of this shape and dtype (numpy's name)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as stored: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def field(self) -> pa.Field:
        """The Arrow field, with shape and dtype in its metadata."""
        metadata = {b"shape": json.dumps(list(self.shape)), b"dtype": self.dtype}
        return pa.field(self.name, pa.binary(self.nbytes), nullable=False, metadata=metadata)

    @classmethod
    def from_field(cls, arrow: pa.Field) -> Tensor | None:
        """The tensor that an Arrow field describes; None if it is a scalar column."""
        metadata = arrow.metadata or {}
        if b"shape" not in metadata or b"dtype" not in metadata:
            return None
        shape = tuple(json.loads(metadata[b"shape"]))
        return cls(arrow.name, shape, metadata[b"dtype"].decode())


def tensors_of(schema: pa.Schema) -> list[Tensor]:
    """The tensor columns of a shard's schema, in the file's order."""
    return [tensor for arrow in schema if (tensor := Tensor.from_field(arrow)) is not None]


def tensor_specs(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The tensor columns of a shard's schema as the manifest has them: shape and dtype by name."""
    return {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in tensors_of(schema)}


def layout(
    codec: str,
    *,
    tokens: int,
    latent: tuple[int, ...],
    depths: Sequence[int],
    states: tuple[int, int],
    pixels: tuple[int, int, int],
    flip: bool = False,
) -> list[Tensor]:
    """The tensor columns of a shard.

    Args:
        codec: float16, int8 or pixels.
        tokens: length L of the text encoder's input.
        latent: (C, h, w) of the VAE.
        depths: of the vision tower.
        states: (N_i, d), tokens and width of the vision tower.
        pixels: (S, S, 3), the vision tower's input.
        flip: with the features of the mirrored images.
    """
    columns = [Tensor(name, latent, "float16") for name in (LATENT_MEAN, LATENT_LOGVAR)]
    if codec != "pixels":
        columns += [Tensor(clip_column(depth), states, codec) for depth in depths]
    if codec == "int8":
        columns += [Tensor(scale_column(depth), states[:1], "float32") for depth in depths]
    if flip:
        columns += [replace(column, name=flipped_column(column.name)) for column in columns]
    if codec == "pixels":
        columns.append(Tensor(CLIP_PIXELS, pixels, "uint8"))
    return [Tensor(TOKEN_IDS, (tokens,), "int32"), *columns]


def encode_states(codec: str, states: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states {depth: (B, N_i, d)} float32 as the columns of float16 or int8, on the device
    that they are on.
    """
    import torch

    columns = {}
    for depth, values in states.items():
        if codec == "int8":
            scale = values.abs().amax(-1) / _INT8_STEPS
            steps = values / torch.where(scale > 0, scale, 1).unsqueeze(-1)
            values = steps.round_().to(torch.int8)
            columns[scale_column(depth)] = scale
        else:
            values = values.to(torch.float16)
        columns[clip_column(depth)] = values
    return columns


def decode_states(columns: Mapping[str, Any], depths: Iterable[int]) -> dict[int, Any]:
    """Hidden states {depth: (B, N_i, d)} of columns as they are stored, whatever their codec.

    Takes NumPy arrays, or torch tensors on any device. float16 comes back as it is, int8 as
    float32. The codec pixels holds no states.
    """
    states = {}
    for depth in depths:
        values, scale = columns[clip_column(depth)], columns.get(scale_column(depth))
        states[depth] = values if scale is None else values * scale[..., None]
    return states


def from_bytes(rows: Iterable[bytes], shape: Sequence[int], dtype: str) -> np.ndarray:
    """A tensor column as other readers give it, one `bytes` a row, as an array (rows, *shape).

    `shape` and `dtype` are the manifest's: `from_bytes(frame["clip_24"], **tensors["clip_24"])`.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(b"".join(rows), stored).reshape(-1, *shape)


class ShardWriter:
    """Writes one shard as a stream: holds at most one row group of `row_group_bytes` in memory.

    Where row groups end depends on the row's size alone, not on how rows are handed in, so the
    same rows give the same bytes. A row larger than `row_group_bytes` gets a row group of its own.
    """

    def __init__(self, sink: Any, tensors: Sequence[Tensor], row_group_bytes: int) -> None:
        self.tensors = list(tensors)
        self.schema = pa.schema([*SCALARS, *(tensor.field() for tensor in self.tensors)])
        row_bytes = sum(tensor.nbytes for tensor in self.tensors)
        self.rows_per_group = max(1, row_group_bytes // max(1, row_bytes))
        self.row_groups: list[int] = []
        self._pending: list[pa.Table] = []
        plain = [arrow.name for arrow in SCALARS if not pa.types.is_list(arrow.type)]
        compression = dict.fromkeys((*plain, "subjects.list.element"), "ZSTD")
        self._writer = pq.ParquetWriter(
            sink,
            self.schema,
            compression={**compression, **{tensor.name: "NONE" for tensor in self.tensors}},
            use_dictionary=False,
            write_statistics=plain,
            write_page_checksum=True,
            # Values go to a page in batches of this many; large ones one by one, or a page would
            # grow to the size of the row group, in memory that is copied again and again.
            write_batch_size=max(1, _PAGE_BYTES // max(tensor.nbytes for tensor in self.tensors)),
        )

    def write(self, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Append rows.

        Args:
            columns: every column of the schema; a tensor as an array (rows, *shape), the rest as
                sequences of the same length.

        Raises:
            ValueError: a column is missing or unknown, or a tensor's shape is not the declared one.
        """
        if set(columns) != set(self.schema.names):
            odd = sorted(set(columns) ^ set(self.schema.names))
            raise ValueError(f"shard columns: {', '.join(odd)} missing or unknown")
        arrays = [pa.array(list(columns[arrow.name]), arrow.type) for arrow in SCALARS]
        arrays += [_pack(tensor, np.asarray(columns[tensor.name])) for tensor in self.tensors]
        self._pending.append(pa.Table.from_arrays(arrays, schema=self.schema))
        self._flush(self.rows_per_group)

    def close(self) -> None:
        """Write the last row group and the footer; the sink stays open."""
        self._flush(1)
        self._writer.close()

    def _flush(self, at_least: int) -> None:
        """Write full row groups while `at_least` rows wait."""
        waiting = sum(table.num_rows for table in self._pending)
        if waiting < at_least:
            return
        rows = pa.concat_tables(self._pending)
        while rows.num_rows >= at_least:
            group = rows.slice(0, self.rows_per_group)
            self._writer.write_table(group, row_group_size=self.rows_per_group)
            self.row_groups.append(group.num_rows)
            rows = rows.slice(group.num_rows)
        self._pending = [rows] if rows.num_rows else []


def open_shard(storage: Storage, path: str) -> pq.ParquetFile:
    """Open a shard for reading row groups: a local file is mapped into memory, so that tensors are
    copied once; an object store is asked for few, large ranges.
    """
    return pq.ParquetFile(storage.open_input(path, mapped=True), pre_buffer=not storage.local)


def read_row_group(
    file: pq.ParquetFile, index: int, columns: Iterable[str] | None = None
) -> dict[str, Any]:
    """Read columns of one row group.

    Args:
        file: an open shard.
        index: the row group.
        columns: their names; None = all.

    Returns:
        Tensor columns as read-only arrays (rows, *shape) over Arrow's memory, others as lists.
    """
    names = list(columns) if columns is not None else list(file.schema_arrow.names)
    table = file.read_row_group(index, columns=names)
    return {name: unpack(table.schema.field(name), table.column(name)) for name in names}


def _pack(tensor: Tensor, values: np.ndarray) -> pa.Array:
    if values.shape[1:] != tensor.shape:
        raise ValueError(f"{tensor.name}: rows of shape {values.shape[1:]}, not {tensor.shape}")
    data = np.ascontiguousarray(values, dtype=tensor.numpy_dtype)
    arrow = pa.binary(tensor.nbytes)
    return pa.FixedSizeBinaryArray.from_buffers(arrow, len(data), [None, pa.py_buffer(data)])


def unpack(arrow: pa.Field, column: pa.ChunkedArray) -> Any:
    """A column as pyarrow reads it: a tensor as an array (rows, *shape), others as a list."""
    tensor = Tensor.from_field(arrow)
    if tensor is None:
        return column.to_pylist()
    parts = []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        start = chunk.offset * tensor.nbytes
        values = values[start : start + len(chunk) * tensor.nbytes]
        parts.append(values.view(tensor.numpy_dtype).reshape(len(chunk), *tensor.shape))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, *tensor.shape), tensor.numpy_dtype)


class Shard(TypedDict):
    """One line of the manifest: `path` is relative to the root, `row_groups` are row counts."""

    path: str
    split: str
    rows: int
    row_groups: list[int]
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a sealed set of shards holds: `features/manifest.json`.

    `tensors` maps a column to its shape and dtype; `encoders` maps vision, vae and text to the
    name and the sha256 of the weights that made the columns. `depths` are those that are stored,
    or that training computes from pixels. `codec_error` says what int8 costs, by depth:
    `relative_rms` (root mean square of the error, by that of the states) and `worst_cosine`
    (between a token and what is read back, over all tokens).
    """

    shards: list[Shard]
    depths: list[int]
    tensors: dict[str, dict[str, Any]]
    encoders: dict[str, dict[str, Any]]
    codec: str = "float16"
    codec_error: dict[str, dict[str, float]] = field(default_factory=dict)
    schema_version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def load(cls, storage: Storage) -> Manifest:
        """Read the manifest under `storage`.

        Raises:
            UserError: nothing is sealed there, another version of the format is, or something else.
        """
        where = storage.url(MANIFEST)
        if not storage.exists(MANIFEST):
            raise UserError(f"no sealed features: {where} is missing; run jobs/curate.py first")
        data = storage.read_json(MANIFEST)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema version {version}, this code reads {SCHEMA_VERSION}; "
                "curate it again under another --root (other settings stand in its other stages "
                "too), or use the version that wrote it"
            )
        known = {f.name for f in fields(cls)}
        try:
            manifest = cls(**{name: value for name, value in data.items() if name in known})
            whole = all(Shard.__annotations__.keys() <= shard.keys() for shard in manifest.shards)
        except (TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError(
                f"{where} is not what sealing writes; run jobs/curate.py again, which seals anew"
            )
        return manifest

    def open(self, storage: Storage, path: str) -> pq.ParquetFile:
        """Open a shard that is listed, for reading row groups.

        Raises:
            UserError: its tensors are not those of the manifest.
        """
        file = open_shard(storage, path)
        try:
            self.check_tensors(storage, path, file.schema_arrow)
        except UserError:
            file.close()
            raise
        return file

    def check_tensors(self, storage: Storage, path: str, schema: pa.Schema) -> None:
        """Raises UserError where the tensors of a listed shard are not those of the manifest."""
        found = tensor_specs(schema)
        if found != self.tensors:
            odd = sorted(
                name
                for name in found.keys() | self.tensors.keys()
                if found.get(name) != self.tensors.get(name)
            )
            raise UserError(
                f"{storage.url(path)} is not as {MANIFEST} says ({', '.join(odd[:3])} differ): it "
                "was made again since; run jobs/curate.py to its end, which seals it anew"
            )

    @property
    def flipped(self) -> bool:
        """Whether the features of the mirrored images are stored too."""
        return flipped_column(LATENT_MEAN) in self.tensors

    def save(self, storage: Storage) -> None:
        """Write the manifest, atomically: a shard a line, as there may be half a million."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shards"}
        with storage.publish(MANIFEST) as sink:
            sink.write(b'{"shards": [\n')
            for start in range(0, len(self.shards), _LINES):
                some = self.shards[start : start + _LINES]
                last = start + _LINES >= len(self.shards)
                lines = ",\n".join(json.dumps(shard) for shard in some)
                sink.write(f"{lines}{'' if last else ','}\n".encode())
            sink.write(f"],\n{json.dumps(rest, indent=1)[1:].lstrip()}\n".encode())

    def split(self, name: str) -> list[Shard]:
        """The shards of one split (train or test)."""
        return [shard for shard in self.shards if shard["split"] == name]

    def rows(self, split: str) -> int:
        """Rows in one split."""
        return sum(shard["rows"] for shard in self.split(split))

    def size(self) -> str:
        """How much there is, for people: rows of each split, MiB."""
        rows = {shard["split"]: self.rows(shard["split"]) for shard in self.shards}
        mib = sum(shard["bytes"] for shard in self.shards) / 2**20
        counted = ", ".join(f"{count:,} {split}" for split, count in sorted(rows.items()))
        return f"{counted} rows, {mib:,.1f} MiB"

    def check_encoders(self, encoders: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse to mix encoders.

        Args:
            encoders: role (vision, vae, text) -> identity(name, sha256) of the models in use.

        Raises:
            UserError: some encoder's weights or configs are not those that made the shards.
        """
        for role, identity in encoders.items():
            sealed = self.encoders.get(role, {})
            if sealed.get("sha256") != identity["sha256"]:
                raise UserError(
                    f"{role} encoder {identity['name']} is not the one the shards were made with "
                    f"({sealed.get('name', 'none')}; weights or configs differ): use that one, or "
                    "curate again with this one"
                )


def row_bytes(manifest: Manifest, columns: Iterable[str]) -> int:
    """Bytes of one row of these columns, its tensors alone."""
    specs = (manifest.tensors[name] for name in columns if name in manifest.tensors)
    return sum(Tensor("", tuple(spec["shape"]), spec["dtype"]).nbytes for spec in specs)
