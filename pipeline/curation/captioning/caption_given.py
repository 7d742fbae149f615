"""Images -> captions that came with them: the folder's, or the web's alt text. No model."""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curation.captioning.caption import SCHEMA, caption_row
from pipeline.curation.captioning.phrases import RULES
from pipeline.curation.captioning.wording import Wording
from pipeline.curation.images import kept_keys
from pipeline.curation.seal import SCORED
from pipeline.storage import Storage
from pipeline.units import Tally

_MADE_BY = {"backend": "given", "model": "", "prompt": "", "seed": 0}


class GivenCaptionStage:
    """images/<unit>.parquet -> captions/<unit>.parquet: the text beside an image is its caption,
    in its own words; without a letter or digit in it the image is dropped (`empty_caption`).
    """

    name = "captions"

    def __init__(self, source: str = "images") -> None:
        self.source = source
        scored = {} if source == "images" else {SCORED: True}
        self.settings: dict[str, Any] = {"backend": "given", "phrases": RULES, **scored}

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        with storage.open_input(f"images/{unit}.parquet") as file:
            rows = pq.read_table(file, columns=["key", "alt_text"]).to_pylist()
        if self.source != "images":
            wanted = kept_keys(storage, f"{self.source}/{unit}.parquet")
            rows = [row for row in rows if row["key"] in wanted]
        made, wording = [], Wording()
        for row in rows:
            text = " ".join((row["alt_text"] or "").split())
            if any(character.isalnum() for character in text):
                made.append(caption_row(row, [text], _MADE_BY))
                wording.add(made[-1]["caption"], made[-1]["subjects"])
        pq.write_table(pa.Table.from_pylist(made, schema=SCHEMA), sink, compression="zstd")
        lost = len(rows) - len(made)
        dropped = {"empty_caption": lost} if lost else {}
        return Tally(len(rows), len(made), dropped=dropped, extra=wording.extra())
