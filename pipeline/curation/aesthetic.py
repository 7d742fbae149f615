"""Images -> aesthetic scores of the images themselves, before the dear stage of captioning.

LAION's improved predictor (V2, sac+logos+ava1-l14-linearMSE) is a stack of linear layers without
activations on the L2-normalised image embedding of CLIP ViT-L/14, so it is one dot product:
score = w . x + b. Weights of any such stack will do, for any CLIP with a projection.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline import models
from pipeline.config import ModelsConfig, ScoresConfig
from pipeline.curation.filtering.conditions import SCORE_EDGES
from pipeline.curation.images import ahead, decode_image, read_images
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.units import Tally
from ssr_model.vision import clip_crop, clip_input

PUBLISHED_MD5 = "b1047fd767a00134b8fd6529bf19521a"
SCHEMA = pa.schema([("key", pa.string()), ("aesthetic", pa.float32()), ("predictor", pa.string())])
_LAYER = re.compile(r"^layers\.(\d+)\.(weight|bias)$")


def read_weights(path: str, md5: str | None = None) -> dict[str, torch.Tensor]:
    """A predictor's state dict, from a .pth or .safetensors file of known content.

    Args:
        path: local, s3:// or gs://.
        md5: what the file must have; None = the published file's, for a .pth.

    Raises:
        UserError: no such file, another MD5, or no state dict.
    """
    storage, name = Storage.for_path(path)
    if not storage.exists(name):
        raise UserError(f"scores.weights {path}: no such file; give the predictor's .pth")
    data = storage.read_bytes(name)
    safe = PurePath(path).suffix == ".safetensors"
    wanted = md5 or (None if safe else PUBLISHED_MD5)
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if wanted is not None and found != wanted.lower():
        raise UserError(
            f"scores.weights {path}: MD5 is {found}, not {wanted}: fetch the file again, or name "
            "its MD5 with --scores.md5 if these weights are meant"
        )
    try:
        if safe:
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return dict(state)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError,
            TypeError, EOFError) as error:  # fmt: skip
        line = " ".join(str(error).split())[:160]
        raise UserError(
            f"scores.weights {path} holds no weights that can be read: {line}"
        ) from None


def fold(state: Mapping[str, torch.Tensor], width: int) -> tuple[torch.Tensor, float]:
    """A stack of linear layers as one: (w, b), float64 (width,) and a number.

    Args:
        state: `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,), in the order of i.
        width: of the embedding that the first layer takes.

    Raises:
        UserError: other names, or shapes that do not follow from one another, from `width` to one.
    """
    odd = [name for name in state if not _LAYER.match(name)]
    numbers = sorted({int(found[1]) for name in state if (found := _LAYER.match(name))})
    names = {f"layers.{i}.{part}" for i in numbers for part in ("weight", "bias")}
    if odd or not numbers or names != set(state):
        raise UserError(
            f"scores.weights are not those of a predictor (layers.<i>.weight and .bias): "
            f"{', '.join(sorted(odd or names ^ set(state))) or 'no layer'} is odd"
        )
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for i in numbers:
        own, own_bias = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        if own.ndim != 2 or own.shape[1] != len(bias) or own_bias.shape != own.shape[:1]:
            what = "the CLIP's projection" if i == numbers[0] else "the layer before it"
            raise UserError(
                f"scores.weights: layer {i} takes {tuple(own.shape)[-1]} values, but {what} gives "
                f"{len(bias)}; use the CLIP that the predictor was trained on"
            )
        weight, bias = own @ weight, own @ bias + own_bias
    if len(bias) != 1:
        raise UserError(f"scores.weights give {len(bias)} values an image; a score is one")
    return weight[0], float(bias[0])


def _sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Of the layers as they are stored: neither of the file's kind, nor of any arithmetic, whose
    last bits are each machine's own.
    """
    digest = hashlib.sha256()
    for name in sorted(state, key=_place):
        values = state[name].detach().to(torch.float32).contiguous().numpy().astype("<f4")
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _place(name: str) -> tuple[int, str]:
    found = _LAYER.match(name)
    return (int(found[1]) if found else 0, name)


class Scorer:
    """CLIP's image embedding and the folded predictor, on one device."""

    def __init__(self, cfg: ScoresConfig, names: ModelsConfig, device: str) -> None:
        self.device = models.device(device)
        self.processor = models.load_image_processor(names.vision, revision=names.revision)
        self.clip = models.load_image_embedder(names.vision, revision=names.revision)
        state = read_weights(str(cfg.weights), cfg.md5)
        weight, self.bias = fold(state, self.clip.config.projection_dim)
        self.clip.to(self.device)
        self.weight = weight.to(self.device, torch.float32)

    def crop(self, data: bytes | None) -> np.ndarray | None:
        """What CLIP sees of an encoded image, uint8 (S, S, 3); None where it does not decode."""
        image = decode_image(data)
        return None if image is None else clip_crop(self.processor, image)

    @torch.inference_mode()
    def __call__(self, crops: list[np.ndarray]) -> np.ndarray:
        """Scores, float32 (B,)."""
        pixels = torch.from_numpy(np.stack(crops)).to(self.device)
        embeds = self.clip(clip_input(self.processor, pixels)).image_embeds
        embeds = torch.nn.functional.normalize(embeds.float(), dim=-1)
        return (embeds @ self.weight + self.bias).cpu().numpy()


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
        state = read_weights(str(self.cfg.weights), self.cfg.md5)
        fold(state, config.projection_dim)  # says here what it would refuse in every worker
        return {
            "vision": models.identity(self.names.vision, "", self.names.revision),
            "weights": _sha256(state),
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
