"""Images -> captions: BLIP-2 describes every image anew; the subjects it names stand beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import CaptionConfig, ModelsConfig
from pipeline.curation.captioning import lavis_environment
from pipeline.curation.captioning.caption_lavis import LavisCaptioner
from pipeline.curation.captioning.caption_transformers import TransformersCaptioner
from pipeline.curation.captioning.decoding import mended
from pipeline.curation.captioning.phrases import RULES, noun_phrases
from pipeline.curation.captioning.wording import Wording
from pipeline.curation.images import ahead, kept_keys, read_images
from pipeline.curation.seal import SCORED
from pipeline.storage import Storage
from pipeline.units import Tally

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("subjects", pa.list_(pa.string())),
        ("alt_text", pa.string()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
    ]
)


class Captioner(Protocol):
    """Describes images. Cheap to build: weights are loaded by `open()`, in the worker."""

    @property
    def model(self) -> str:
        """The model's name, as a row tells it."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes a caption, as JSON: the weights' hash, prompt, decoding."""
        ...

    def open(self) -> None:
        """Load the weights."""
        ...

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[list[str]]:
        """`captions_per_image` texts of each image, likeliest first; empty where the model had
        nothing to say. A text depends on its image and key, not on the images beside it.
        """
        ...


BACKENDS: dict[str, Callable[[CaptionConfig, ModelsConfig, str], Captioner]] = {
    "transformers": TransformersCaptioner,
    "lavis": LavisCaptioner,
}


def interpreter(cfg: CaptionConfig) -> str | None:
    """Python that the stage's workers run in; None = the driver's own.

    Raises UserError if the environment of the `lavis` backend is not fit for it.
    """
    if cfg.backend != "lavis":
        return None
    return lavis_environment.check(cfg.lavis_python, cfg.lavis_model, cfg.lavis_type)


class CaptionStage:
    """images/<unit>.parquet -> captions/<unit>.parquet.

    Images that do not decode fail (`undecodable`). Of an image's captions those that describe
    nothing are left out; without any left, it is dropped for the first one's reason
    (`empty_caption`, `repeated_word`). `captions` are distinct, `caption` is the first of them,
    and `subjects` those of all. A caption in which no subject is found is its own subject, so that
    `subjects` is never empty. With `source` "scores" only the images that it kept are captioned.
    """

    name = "captions"

    def __init__(
        self,
        cfg: CaptionConfig,
        names: ModelsConfig,
        device: str = "auto",
        source: str = "images",
    ) -> None:
        self.cfg, self.source = cfg, source
        self.captioner = BACKENDS[cfg.backend](cfg, names, device)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All of the captioner's; the batch size is not among them, since it changes no caption."""
        scored = {} if self.source == "images" else {SCORED: True}
        return {**self.captioner.settings, "phrases": RULES, **scored}

    def open(self) -> None:
        self.captioner.open()

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        path, columns, size = f"images/{unit}.parquet", ["key", "alt_text"], self.cfg.batch_size
        wanted = None
        if self.source != "images":
            wanted = kept_keys(storage, f"{self.source}/{unit}.parquet")
        made_by = {
            "backend": self.cfg.backend,
            "model": self.captioner.model,
            "prompt": self.cfg.prompt,
            "seed": self.cfg.seed,
        }
        tally, wording = Tally(rows_in=0, kept=0), Wording()
        with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
            for batch in ahead(lambda: read_images(storage, path, columns, size, keys=wanted)):
                keys = [row["key"] for row in batch.rows]
                made = self.captioner(batch.images, keys) if keys else []
                rows = []
                for row, texts in zip(batch.rows, made, strict=True):
                    captions, reason = _distinct(texts)
                    if captions:
                        rows.append(caption_row(row, captions, made_by))
                    else:
                        _count(tally.dropped, reason, 1)
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                for row in rows:
                    wording.add(row["caption"], row["subjects"])
                tally.rows_in += len(batch.rows) + batch.undecodable
                tally.kept += len(rows)
                _count(tally.failed, "undecodable", batch.undecodable)
        tally.extra |= wording.extra()
        return tally


def caption_row(
    row: Mapping[str, Any], captions: list[str], made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of captions: `row` has key and alt_text, `made_by` backend, model, prompt and seed."""
    subjects = [phrase for caption in captions for phrase in noun_phrases(caption)]
    return {
        **row,
        "caption": captions[0],
        "captions": captions,
        "subjects": list(dict.fromkeys(subjects)) or captions[:1],
        **made_by,
    }


def _distinct(texts: Sequence[str]) -> tuple[list[str], str]:
    """The captions among `texts`, and the reason why the first of the others is none."""
    judged = [mended(text) for text in texts]
    captions = list(dict.fromkeys(caption for caption, _ in judged if caption))
    return captions, next((reason for _, reason in judged if reason), "")


def _count(reasons: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        reasons[reason] = reasons.get(reason, 0) + rows
