"""Images -> aesthetic scores of the images themselves, before the dear stage of captioning.

The predictor is LAION's V2, or any of its kind: see ssr_model/metrics/aesthetic.py.
"""

from __future__ import annotations

import functools
import math
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import models
from pipeline.config import ModelsConfig, ScoresConfig
from pipeline.curation.filtering.conditions import SCORE_EDGES
from pipeline.curation.images import ahead, decode_image, read_images
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally
from ssr_model.metrics.aesthetic import AestheticPredictor, AnotherFileError, read_state
from ssr_model.vision import clip_crop, clip_input

SCHEMA = pa.schema([("key", pa.string()), ("aesthetic", pa.float32()), ("predictor", pa.string())])


def load_predictor(path: str, width: int, md5: str | None = None) -> AestheticPredictor:
    """The predictor of a .pth or .safetensors file, for embeddings of `width` values.

    Args:
        path: local, s3:// or gs://.
        md5: what the file must have; None = the published file's, for a .pth.

    Raises:
        UserError: no such file, another MD5, no state dict, or not that of such a predictor.
    """
    storage, name = Storage.for_path(path)
    if not storage.exists(name):
        raise UserError(f"scores.weights {path}: no such file; give the predictor's .pth")
    safe = PurePath(path).suffix == ".safetensors"
    where = f"scores.weights {path}"
    try:
        return AestheticPredictor(read_state(storage.read_bytes(name), safe, md5), width)
    except AnotherFileError as error:
        raise UserError(f"{where}: {error}; name its MD5 with --scores.md5") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


class Scorer:
    """CLIP's image embedding and the folded predictor, on one device."""

    def __init__(self, cfg: ScoresConfig, names: ModelsConfig, device: str) -> None:
        self.device = models.device(device)
        self.processor = models.load_image_processor(names.vision, revision=names.revision)
        self.clip = models.load_image_embedder(names.vision, revision=names.revision)
        width = self.clip.config.projection_dim
        self.predictor = load_predictor(str(cfg.weights), width, cfg.md5).to(self.device)
        self.clip.to(self.device)

    def crop(self, data: bytes | None) -> np.ndarray | None:
        """What CLIP sees of an encoded image, uint8 (S, S, 3); None where it does not decode."""
        image = decode_image(data)
        return None if image is None else clip_crop(self.processor, image)

    @torch.inference_mode()
    def __call__(self, crops: list[np.ndarray]) -> np.ndarray:
        """Scores, float32 (B,)."""
        pixels = torch.from_numpy(np.stack(crops)).to(self.device)
        embeds = self.clip(clip_input(self.processor, pixels)).image_embeds
        return self.predictor(embeds).cpu().numpy()


class ScoresStage:
    """images/<unit>.parquet -> scores/<unit>.parquet: keys and scores of what is above the bound.

    Images that do not decode fail (`undecodable`), those whose score is no number too
    (`not_finite`); those at or below the bound are dropped (`low_aesthetic`).
    """

    name = "scores"
    source = "images"

    def __init__(self, cfg: ScoresConfig, names: ModelsConfig, device: str = "auto") -> None:
        self.cfg, self.names, self.device = cfg, names, device

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes the scores, the predictor's weights among it."""
        config = models.load_image_embedder_config(self.names.vision, self.names.revision)
        # says here what it would refuse in every worker
        predictor = load_predictor(str(self.cfg.weights), config.projection_dim, self.cfg.md5)
        return {
            "vision": models.identity(self.names.vision, "", self.names.revision),
            "weights": predictor.sha256,
            "predictor": self.cfg.predictor,
            "min_aesthetic": self.cfg.min_aesthetic,
        }

    def open(self) -> None:
        self._scorer  # noqa: B018 (loads)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.cfg, self.names, self.device)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        scorer, cfg = self._scorer, self.cfg
        tally = Tally(rows_in=0, kept=0)
        batches = functools.partial(
            read_images, storage, f"images/{unit}.parquet", ["key"], cfg.batch_size,
            decode=scorer.crop, threads=cfg.threads,
        )  # fmt: skip
        counts = {"undecodable": 0, "not_finite": 0, "low_aesthetic": 0}
        histogram = np.zeros(len(SCORE_EDGES) - 1, np.int64)
        with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
            for batch in ahead(batches):
                scores = scorer(batch.images) if batch.images else np.empty(0, np.float32)
                kept = [
                    {"key": row["key"], "aesthetic": score, "predictor": cfg.predictor}
                    for row, score in zip(batch.rows, scores.tolist(), strict=True)
                    if math.isfinite(score) and score > cfg.min_aesthetic
                ]
                writer.write_table(pa.Table.from_pylist(kept, schema=SCHEMA))
                odd = int((~np.isfinite(scores)).sum())
                histogram += _bins(scores[np.isfinite(scores)])
                tally.rows_in += len(batch.rows) + batch.undecodable
                tally.kept += len(kept)
                counts["undecodable"] += batch.undecodable
                counts["not_finite"] += odd
                counts["low_aesthetic"] += len(batch.rows) - len(kept) - odd
        tally.dropped = {name: counts[name] for name in ("low_aesthetic",) if counts[name]}
        tally.failed = {
            name: counts[name] for name in ("undecodable", "not_finite") if counts[name]
        }
        tally.extra["scores"] = {"edges": SCORE_EDGES, "rows": histogram.tolist()}
        return tally


def _bins(scores: np.ndarray) -> np.ndarray:
    """Scores in each bin of SCORE_EDGES; what is outside counts in the first or last."""
    return np.histogram(np.clip(scores, SCORE_EDGES[0], SCORE_EDGES[-1]), SCORE_EDGES)[0]
