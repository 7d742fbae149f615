"""Images and captions -> feature shards: one pass over the images fills every column.

Three threads share the work of a unit: one reads, decodes and resizes ahead (in a pool), one
computes, and the stage's own thread fetches from the device and writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline import models
from pipeline.config import FeaturesConfig, ModelsConfig
from pipeline.curation.fidelity import Fidelity, row_errors
from pipeline.curation.images import ahead, decode_image, read_images
from pipeline.errors import UserError
from pipeline.shards import (
    CLIP_PIXELS,
    LATENT_LOGVAR,
    LATENT_MEAN,
    SCHEMA_VERSION,
    TOKEN_IDS,
    ShardWriter,
    Tensor,
    encode_states,
    flipped_column,
    layout,
)
from pipeline.storage import Storage
from pipeline.units import Tally
from ssr_model.config import depths_for
from ssr_model.vision import clip_crop, clip_input, vision_features

MIB = 2**20
_JOINED = ("caption", "subjects")
_SCORED = ("aesthetic", "predictor")


@dataclass
class Views:
    """An image as its encoders take it: uint8 (S, S, 3) for CLIP, (H, W, 3) for the VAE."""

    clip: np.ndarray
    vae: np.ndarray


@dataclass
class Prepared:
    """A batch as the models take it: rows that have image and caption, in the file's order."""

    rows: list[dict[str, Any]]
    clip_pixels: torch.Tensor
    vae_pixels: torch.Tensor
    token_ids: np.ndarray
    failed: dict[str, int]


@dataclass
class Encoded:
    """A batch as the shard takes it, still on the device, where work on it may be under way.

    `finite` (B,) tells the rows that can be stored; `errors` is `row_errors`, for lossy codecs.
    """

    batch: Prepared
    columns: dict[str, torch.Tensor]
    finite: torch.Tensor
    errors: dict[int, torch.Tensor]


class Encoders:
    """CLIP's vision tower, the VAE and the tokenizer, loaded once per worker, at the first use."""

    def __init__(self, cfg: FeaturesConfig, names: ModelsConfig, device: str) -> None:
        base, vision, revision = names.base, names.vision, names.revision
        self.codec, self.flip, self.device = cfg.codec, cfg.flip, models.device(device)
        self.tokenizer = models.load_tokenizer(base, revision=revision)
        self.processor = models.load_image_processor(vision, revision=revision)
        self.vae = models.load_vae(base, revision=revision).to(self.device).eval()
        self.vision = models.load_vision(vision, revision=revision).to(self.device).eval()
        config = self.vision.config
        try:
            self.depths = depths_for(config.num_hidden_layers, cfg.scales)
        except ValueError as error:
            raise UserError(f"features.scales is {cfg.scales}, for {vision}: {error}") from error

    def tensors(self, image_size: int) -> list[Tensor]:
        """Columns of a shard of square images of `image_size` pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(
                f"download.image_size {image_size} is not a multiple of {factor}, by which the VAE "
                "shrinks; choose a multiple"
            )
        side, clip = image_size // factor, self.vision.config
        return layout(
            self.codec,
            tokens=self.tokenizer.model_max_length,
            latent=(self.vae.config.latent_channels, side, side),
            depths=self.depths,
            states=((clip.image_size // clip.patch_size) ** 2 + 1, clip.hidden_size),
            pixels=(clip.image_size, clip.image_size, clip.num_channels),
            flip=self.flip,
        )

    def views(self, data: bytes | None, size: tuple[int, int]) -> Views | str | None:
        """An encoded image as the encoders take it; the cause where it is of another size than
        (width, height), None where it does not decode.
        """
        image = decode_image(data)
        if image is None:
            return None
        if image.size != size:
            return "wrong_size"
        return Views(clip_crop(self.processor, image), np.asarray(image))

    def prepare(
        self, rows: list[dict[str, Any]], views: list[Views], failed: dict[str, int]
    ) -> Prepared:
        """Batches for the models; token ids are int32 (B, L), padded and cut to L."""
        captions = [row["caption"] for row in rows]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")[
            "input_ids"
        ]
        clip = torch.from_numpy(np.stack([view.clip for view in views]))
        vae = torch.from_numpy(np.stack([view.vae for view in views]))
        if self.device.type != "cpu":  # so that the copy to the device waits for nothing
            clip, vae = clip.pin_memory(), vae.pin_memory()
        return Prepared(rows, clip, vae, np.asarray(ids, dtype=np.int32), failed)

    @torch.inference_mode()
    def __call__(self, batch: Prepared) -> Encoded:
        """Every column of the batch but the scalars and the token ids."""
        vae = batch.vae_pixels.to(self.device, non_blocking=True)
        vae = vae.permute(0, 3, 1, 2).to(
            self.vae.dtype
        )  # in channels_last, as convolutions like it
        vae = vae.div_(127.5).sub_(1.0)
        columns, errors = self._latents(vae), dict[int, torch.Tensor]()
        if self.flip:
            columns |= _flipped(self._latents(vae.flip(-1)))
        if self.codec == "pixels":
            columns[CLIP_PIXELS] = batch.clip_pixels
        else:
            clip = clip_input(self.processor, batch.clip_pixels.to(self.device, non_blocking=True))
            states = self._states(clip)
            stored = encode_states(self.codec, states)
            columns |= stored
            errors = row_errors(states, stored) if self.codec == "int8" else {}
            if self.flip:
                columns |= _flipped(encode_states(self.codec, self._states(clip.flip(-1))))
        floats = [column for column in columns.values() if column.is_floating_point()]
        finite = torch.stack([column.isfinite().flatten(1).all(1) for column in floats]).all(0)
        return Encoded(batch, columns, finite, errors)

    def _latents(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(images).latent_dist
        return {
            LATENT_MEAN: posterior.mean.to(torch.float16),
            LATENT_LOGVAR: posterior.logvar.to(torch.float16),
        }

    def _states(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        return vision_features(self.vision, images.to(self.vision.dtype), self.depths)


def _flipped(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {flipped_column(name): values for name, values in columns.items()}


class FeaturesStage:
    """captions/<unit>.parquet and images/<unit>.parquet -> features/<unit>.parquet.

    An image of another size than `image_size` fails (`wrong_size`), and one whose features leave
    float16's range fails (`not_finite`): neither can reach a batch of training.

    Args:
        scored: the scores of the stage "scores" go into the shard, not those of the metadata.
    """

    name = "features"
    source = "captions"

    def __init__(
        self,
        cfg: FeaturesConfig,
        names: ModelsConfig,
        image_size: int,
        device: str = "auto",
        scored: bool = False,
    ) -> None:
        self.cfg, self.names, self.image_size, self.device = cfg, names, image_size, device
        self.scored = scored

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
            **({"flip": True} if self.cfg.flip else {}),  # roots without it are as they were
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
        encoders, fidelity = self._encoders, Fidelity()
        tensors = encoders.tensors(self.image_size)
        writer = ShardWriter(sink, tensors, int(self.cfg.row_group_mib * MIB))
        told = self._told(storage, unit)
        tally = Tally(rows_in=len(told), kept=0)
        for encoded in ahead(lambda: self._encode(storage, unit, told)):
            _add(tally.failed, encoded.batch.failed)
            if encoded.batch.rows:
                tally.kept += _write(writer, encoded, fidelity, tally.failed)
        writer.close()
        # A caption whose image is gone from the images file: another run's leftovers.
        _add(tally.failed, {"no_image": tally.rows_in - tally.kept - sum(tally.failed.values())})
        tally.extra.update(row_groups=writer.row_groups, depths=list(encoders.depths))
        if fidelity.rows:
            tally.extra["codec_error"] = fidelity.figures()
        return tally

    def _told(self, storage: Storage, unit: str) -> dict[str, dict[str, Any]]:
        """key -> what stages before this one told of the image: caption, subjects, score."""
        told = _by_key(storage, f"captions/{unit}.parquet", _JOINED)
        if self.scored:
            scores = _by_key(storage, f"scores/{unit}.parquet", _SCORED)
            told = {key: {**row, **scores[key]} for key, row in told.items()}
        return told

    def _encode(
        self, storage: Storage, unit: str, told: dict[str, dict[str, Any]]
    ) -> Iterator[Encoded]:
        nothing = torch.empty(0)
        for batch in ahead(lambda: self._prepare(storage, unit, told)):
            if batch.rows:
                yield self._encoders(batch)
            else:
                yield Encoded(batch, {}, nothing, {})

    def _prepare(
        self, storage: Storage, unit: str, told: dict[str, dict[str, Any]]
    ) -> Iterator[Prepared]:
        """Read, decode and resize the images that are told of."""
        encoders = self._encoders
        decode = functools.partial(encoders.views, size=(self.image_size, self.image_size))
        batches = read_images(
            storage,
            f"images/{unit}.parquet",
            ["key", "url", *_SCORED],
            self.cfg.batch_size,
            keys=told,
            decode=decode,
            threads=self.cfg.threads,
        )
        for batch in batches:
            rows, views = [], []
            failed: dict[str, int] = {}
            for row, view in zip(batch.rows, batch.images, strict=True):
                if isinstance(view, Views):
                    rows.append({**row, **told[row["key"]]})
                    views.append(view)
                else:
                    _add(failed, {view: 1})
            if rows:
                yield encoders.prepare(rows, views, failed)
            else:
                yield Prepared([], torch.empty(0), torch.empty(0), np.empty(0), failed)


def _write(
    writer: ShardWriter, encoded: Encoded, fidelity: Fidelity, failed: dict[str, int]
) -> int:
    """Fetch a batch from the device and write it; returns the rows kept."""
    batch, finite = encoded.batch, encoded.finite.cpu().numpy()
    columns: dict[str, Any] = {
        name: tensor.cpu().numpy() for name, tensor in encoded.columns.items()
    }
    columns[TOKEN_IDS] = batch.token_ids
    errors = {depth: values.cpu().numpy() for depth, values in encoded.errors.items()}
    rows = batch.rows
    if not finite.all():
        _add(failed, {"not_finite": int((~finite).sum())})
        columns = {name: values[finite] for name, values in columns.items()}
        errors = {depth: values[finite] for depth, values in errors.items()}
        rows = [row for row, good in zip(rows, finite, strict=True) if good]
    for name in ("key", "url", *_JOINED, *_SCORED):
        columns[name] = [row[name] for row in rows]
    fidelity.add(errors)
    writer.write(columns)
    return len(rows)


def _by_key(storage: Storage, path: str, columns: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """key -> the row's columns."""
    with storage.open_input(path) as file:
        table = pq.read_table(file, columns=["key", *columns])
    rows = {row.pop("key"): row for row in table.to_pylist()}
    if len(rows) != table.num_rows:
        stage = path.partition("/")[0]
        raise UserError(f"{storage.url(path)} repeats a key; run with --redo {stage}")
    return rows


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for reason, rows in more.items():
        if rows:
            total[reason] = total.get(reason, 0) + rows
