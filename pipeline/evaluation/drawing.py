"""Pictures of one method for the requests of a bench: a stage of units, the first of two.

A unit is a span of requests, `{first}-{one after the last}`: a longer bench makes only what it
adds, and a last span that was short before is another unit. Its Parquet holds the pictures, so that
every figure of a table can be traced to one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request
from pipeline.evaluation.methods import Drawn, Method
from pipeline.generation import png
from pipeline.generation.references import open_picture
from pipeline.storage import Storage
from pipeline.units import Tally

ASKED = (
    pa.field("key", pa.string()),
    pa.field("reference", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("asked", pa.string()),
    pa.field("about", pa.string()),
)
"""What units say of each request: key, reference, prompt and seed are its own, `asked` names its
subjects, `about` is JSON."""

SCHEMA = pa.schema(
    [
        *ASKED,
        pa.field("image", pa.binary()),
        pa.field("attention", pa.list_(pa.list_(pa.float32()))),
        pa.field("seen", pa.list_(pa.float64())),
    ]
)
"""image: a PNG; attention: where the method looked in the reference, rows of patches, null where it
does not point; seen: the part of the reference that attention covers, fractions, null = all."""


def spans(bench: Bench, pictures: int, learns: bool) -> list[tuple[int, int]]:
    """The units of a method on a bench: whole references, of about so many pictures; of a method
    that learns each reference, one of them.
    """
    if learns:
        return list(bench.references())
    found: list[tuple[int, int]] = []
    for start, stop in bench.references():
        if found and stop - found[-1][0] <= pictures:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def unit_name(start: int, stop: int) -> str:
    return f"{start:06d}-{stop:06d}"


def requests_of(bench: Bench, unit: str) -> list[Request]:
    start, _, stop = unit.partition("-")
    return bench.requests(int(start), int(stop))


class PicturesStage:
    """Draws a unit's requests by one method (a Stage of pipeline/units.py)."""

    source = None

    def __init__(self, bench: Bench, method: Method, folder: str) -> None:
        self.name = f"{folder}/pictures/{method.name}"
        self.settings: dict[str, Any] = {"bench": bench.settings, **method.settings}
        self._bench, self._method = bench, method

    def open(self) -> None:
        self._method.open()

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        requests = requests_of(self._bench, unit)
        rows = [row(request, drawn) for request, drawn in self._drawn(requests)]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
        return Tally(rows_in=len(rows), kept=len(rows))

    def _drawn(self, requests: list[Request]) -> Iterator[tuple[Request, Drawn]]:
        """Pictures of another tool are of any size: they are in memory one by one."""
        for some in [requests] if self._method.native else [[each] for each in requests]:
            yield from zip(some, self._method(some), strict=True)


def row(request: Request, drawn: Drawn) -> dict[str, Any]:
    """A row of SCHEMA."""
    return {
        "key": request.key,
        "reference": request.reference.key,
        "prompt": request.prompt,
        "seed": request.seed,
        "asked": ", ".join(selection.subject.name for selection in request.selections),
        "about": json.dumps(dict(request.about), sort_keys=True),
        "image": png.encode(drawn.image, quick=True),
        "attention": None if drawn.attention is None else drawn.attention.tolist(),
        "seen": None if drawn.seen is None else list(drawn.seen),
    }


def read_pictures(
    storage: Storage,
    folder: str,
    method: str,
    unit: str,
    columns: Sequence[str] = tuple(SCHEMA.names),
    keys: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a unit that was drawn, or these columns of those with these keys."""
    path = f"{folder}/pictures/{method}/{unit}.parquet"
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file)
        if parquet.schema_arrow.names != SCHEMA.names:
            raise UserError(
                f"{storage.url(path)} has other columns than pictures have; delete its folder and "
                "run again"
            )
        table = parquet.read(columns=list(columns))
    if keys is not None:
        table = table.filter(pc.is_in(table["key"], pa.array(sorted(keys), pa.string())))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def picture_of(row: Mapping[str, Any]) -> Image.Image:
    """The picture of a row of SCHEMA, RGB."""
    return open_picture(f"the picture of {row['key']}", io.BytesIO(row["image"])).convert("RGB")
