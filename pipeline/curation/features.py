"""Images and captions -> feature shards: one pass over the images fills every column."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import models
from pipeline.config import FeaturesConfig, ModelsConfig
from pipeline.curation.images import ahead, read_images
from pipeline.errors import UserError
from pipeline.shards import (
    LATENT_LOGVAR,
    LATENT_MEAN,
    SCHEMA_VERSION,
    TOKEN_IDS,
    ShardWriter,
    Tensor,
    clip_column,
)
from pipeline.storage import Storage
from pipeline.units import Tally
from ssr_model.config import depths_for
from ssr_model.vision import vision_features

MIB = 2**20


@dataclass
class Prepared:
    """A batch as the models take it: rows that have image and caption, in the file's order."""

    rows: list[dict[str, Any]]
    clip_pixels: torch.Tensor
    vae_pixels: torch.Tensor
    token_ids: np.ndarray
    failed: dict[str, int]


class Encoders:
    """CLIP's vision tower, the VAE and the tokenizer, loaded once per worker, at the first use."""

    def __init__(self, cfg: FeaturesConfig, names: ModelsConfig, device: str) -> None:
        base, vision, revision = names.base, names.vision, names.revision
        self.device = models.device(device)
        self.tokenizer = models.load_tokenizer(base, revision=revision)
        self.processor = models.load_image_processor(vision, revision=revision)
        self.vae = models.load_vae(base, revision=revision).to(self.device).eval()
        self.vision = models.load_vision(vision, revision=revision).to(self.device).eval()
        config = self.vision.config
        try:
            self.depths = depths_for(config.num_hidden_layers, cfg.scales)
        except ValueError as error:
            raise UserError(f"features.scales is {cfg.scales}, for {vision}: {error}") from error
        self.clip_shape = ((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def tensors(self, image_size: int) -> list[Tensor]:
        """Columns of a shard of square images of `image_size` pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(
                f"download.image_size {image_size} is not a multiple of {factor}, by which the VAE "
                "shrinks; choose a multiple"
            )
        side = image_size // factor
        latent = (self.vae.config.latent_channels, side, side)
        return [
            Tensor(TOKEN_IDS, (self.tokenizer.model_max_length,), "int32"),
            Tensor(LATENT_MEAN, latent, "float16"),
            Tensor(LATENT_LOGVAR, latent, "float16"),
            *(Tensor(clip_column(depth), self.clip_shape, "float16") for depth in self.depths),
        ]

    def pixels(self, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's input (B, 3, S, S), normalised, and the VAE's (B, 3, H, W) in [-1, 1]."""
        clip = self.processor(images=images, return_tensors="pt")["pixel_values"]
        raw = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return clip, raw.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)

    def token_ids(self, captions: list[str]) -> np.ndarray:
        """Captions as the text encoder reads them: int32 (B, L), padded and cut to L."""
        tokenizer = self.tokenizer
        batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
        return np.asarray(batch["input_ids"], dtype=np.int32)

    @torch.inference_mode()
    def __call__(self, batch: Prepared) -> dict[str, np.ndarray]:
        """Every float column of the batch, float16, on the host."""
        clip = batch.clip_pixels.to(self.device, self.vision.dtype)
        posterior = self.vae.encode(batch.vae_pixels.to(self.device, self.vae.dtype)).latent_dist
        columns = {LATENT_MEAN: posterior.mean, LATENT_LOGVAR: posterior.logvar}
        for depth, states in vision_features(self.vision, clip, self.depths).items():
            columns[clip_column(depth)] = states
        return {name: value.to(torch.float16).cpu().numpy() for name, value in columns.items()}


class FeaturesStage:
    """captions/<unit>.parquet and images/<unit>.parquet -> features/<unit>.parquet.

    An image of another size than `image_size` fails (`wrong_size`), and one whose features leave
    float16's range fails (`not_finite`): neither can reach a batch of training.
    """

    name = "features"
    source = "captions"

    def __init__(
        self, cfg: FeaturesConfig, names: ModelsConfig, image_size: int, device: str = "auto"
    ) -> None:
        self.cfg, self.names, self.image_size, self.device = cfg, names, image_size, device

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes a shard; the batch size is left out, since it shapes nothing."""
        names = self.names
        identity = functools.partial(models.identity, revision=names.revision)
        return {
            "schema_version": SCHEMA_VERSION,
            "codec": self.cfg.codec,
            "scales": self.cfg.scales,
            "row_group_mib": self.cfg.row_group_mib,
            "image_size": self.image_size,
            "vision": identity(names.vision, ""),
            "vae": identity(names.base, "vae"),
            "text": identity(names.base, "text_encoder"),
        }

    def open(self) -> None:
        self._encoders  # noqa: B018 (loads)

    @functools.cached_property
    def _encoders(self) -> Encoders:
        return Encoders(self.cfg, self.names, self.device)

    def __call__(self, unit: str, storage: Storage, sink: BinaryIO) -> Tally:
        encoders = self._encoders
        tensors = encoders.tensors(self.image_size)
        writer = ShardWriter(sink, tensors, int(self.cfg.row_group_mib * MIB))
        captions = _captions(storage, f"{self.source}/{unit}.parquet")
        tally = Tally(rows_in=len(captions), kept=0)
        for batch in ahead(lambda: self._prepare(storage, unit, captions)):
            _add(tally.failed, batch.failed)
            if batch.rows:
                tally.kept += self._write(writer, batch, tally.failed)
        writer.close()
        # A caption whose image is gone from the images file: another run's leftovers.
        _add(tally.failed, {"no_image": tally.rows_in - tally.kept - sum(tally.failed.values())})
        tally.extra.update(row_groups=writer.row_groups, depths=list(encoders.depths))
        return tally

    def _prepare(
        self, storage: Storage, unit: str, captions: dict[str, dict[str, Any]]
    ) -> Iterator[Prepared]:
        """Decode, join with the captions by key, and preprocess; runs in a thread of its own."""
        encoders, square = self._encoders, (self.image_size, self.image_size)
        path = f"images/{unit}.parquet"
        for batch in read_images(storage, path, ["key", "url"], self.cfg.batch_size):
            rows, images = [], []
            failed: dict[str, int] = {}
            for row, image in zip(batch.rows, batch.images, strict=True):
                if row["key"] not in captions:
                    continue  # the caption stage left it out, and counted it
                if image.size != square:
                    failed["wrong_size"] = failed.get("wrong_size", 0) + 1
                    continue
                rows.append({**row, **captions[row["key"]]})
                images.append(image)
            if not images:
                yield Prepared([], torch.empty(0), torch.empty(0), np.empty(0), failed)
                continue
            clip, vae = encoders.pixels(images)
            ids = encoders.token_ids([row["caption"] for row in rows])
            yield Prepared(rows, clip, vae, ids, failed)

    def _write(self, writer: ShardWriter, batch: Prepared, failed: dict[str, int]) -> int:
        """Encode and write a batch; returns the rows kept."""
        columns: dict[str, Any] = {TOKEN_IDS: batch.token_ids, **self._encoders(batch)}
        finite = np.ones(len(batch.rows), dtype=bool)
        for name, values in columns.items():
            if name != TOKEN_IDS:
                finite &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            _add(failed, {"not_finite": int((~finite).sum())})
            columns = {name: values[finite] for name, values in columns.items()}
        rows = [row for row, good in zip(batch.rows, finite, strict=True) if good]
        for name in ("key", "url", "caption", "subjects"):
            columns[name] = [row[name] for row in rows]
        writer.write(columns)
        return len(rows)


def _captions(storage: Storage, path: str) -> dict[str, dict[str, Any]]:
    """key -> caption and subjects of a captions file."""
    with storage.open_input(path) as file:
        table = pq.read_table(file, columns=["key", "caption", "subjects"])
    captions = {row["key"]: row for row in table.to_pylist()}
    if len(captions) != table.num_rows:
        raise UserError(f"{storage.url(path)} repeats a key; run with --redo captions")
    return captions


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for reason, rows in more.items():
        if rows:
            total[reason] = total.get(reason, 0) + rows
