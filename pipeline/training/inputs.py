"""From rows to what a step needs: everything that chance decides, and the text's encodings.

Chance is keyed by (seed, step, row of the global batch), so noise, timesteps, dropping and the
drawn query are the same whatever the number of workers, and after any restart.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.shards import (
    LATENT_LOGVAR,
    LATENT_MEAN,
    TOKEN_IDS,
    Manifest,
    vision_columns,
)
from pipeline.shards_reader import Stacks
from pipeline.storage import Storage
from pipeline.training.lanes import Batch
from pipeline.training.row_groups import Replaced, RowGroup, RowGroups, gather
from ssr_model.training_step import Dropping

# Validation's own seed: its draws are the same in every run, whatever the run's seed.
_VALIDATION = 0x5EED
_MAX_CACHED_QUERIES = 100_000
_ARTICLE = re.compile(r"^(an?|the)\s+(?=\S)", re.IGNORECASE)


def columns_for(codec: str, depths: Sequence[int]) -> list[str]:
    """The columns that a stage with these scales reads of shards of this codec."""
    text = ["key", "caption", "subjects", TOKEN_IDS]
    return [*text, LATENT_MEAN, LATENT_LOGVAR, *vision_columns(codec, depths)]


@dataclass
class Inputs:
    """A worker's share of one step, on the host or on a device. B rows."""

    step: int
    keys: list[str]
    """Keys of the rows, B."""
    latent_mean: Tensor
    """(B, C, h, w), as stored: not scaled."""
    latent_logvar: Tensor
    """(B, C, h, w)."""
    latent_noise: Tensor
    """(B, C, h, w) float32, for the draw from the VAE's posterior."""
    noise: Tensor
    """(B, C, h, w) float32, what diffusion adds."""
    timesteps: Tensor
    """(B,) int64."""
    prompt_ids: Tensor
    """(B, L) int64."""
    query_ids: Tensor
    """(B, S, L) int64, S queries per row."""
    named: Tensor
    """(B, S) bool: the query has words."""
    keep_subject: Tensor
    """(B,) bool: false where the subject is left out."""
    features: dict[str, Tensor]
    """Vision columns, as stored: decoding is cheaper on the device, and so is the way there."""
    replaced: int = 0
    """Rows that stand in for those of a damaged row group."""

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def pin(self) -> Inputs:
        """The same in page-locked memory, from which copies to a device run in the background."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Inputs:
        """The same on the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Inputs:
        """Rows start, ..., stop - 1 alone."""
        part = self._map(lambda tensor: tensor[start:stop])
        part.keys = self.keys[start:stop]
        return part

    def _map(self, move: Any) -> Inputs:
        moved = {name: move(tensor) for name, tensor in self.tensors().items()}
        features = {name: move(tensor) for name, tensor in self.features.items()}
        return replace(self, features=features, **moved)


class Preparer:
    """Turns batches of rows into inputs; it runs in the read-ahead thread.

    Args:
        tokenizer: the text encoder's.
        depths: the stage's scales.
        codec: how the shards hold them.
        timesteps: number of diffusion timesteps of the base model.
        seed: any number of non-negative integers: the run's seed and the stage's number.
        dropping: of prompt and subject.
        drop_query: probability of the empty text instead of a row's queries.
        drop_article: probability that a query's leading article goes.
        query: draw the queries from the caption's subjects, or take the caption.
        queries: how many a row has; subjects repeat where a caption names fewer.
        pin: make page-locked tensors.
    """

    def __init__(
        self,
        tokenizer: Any,
        depths: Sequence[int],
        timesteps: int,
        seed: Sequence[int],
        *,
        codec: str = "float16",
        dropping: Dropping | None = None,
        drop_query: float = 0.0,
        drop_article: float = 0.0,
        query: str = "subject",
        queries: int = 1,
        pin: bool = False,
    ) -> None:
        self.tokenizer, self.timesteps = tokenizer, timesteps
        self.columns = columns_for(codec, depths)
        self._vision = vision_columns(codec, depths)
        self.seed, self.pin = tuple(seed), pin
        self.dropping = dropping or Dropping()
        self.drop_query, self.drop_article = drop_query, drop_article
        self.query, self.queries = query, queries
        self._ids: dict[str, np.ndarray] = {}
        self._empty = self._tokenize("")

    def __call__(self, batch: Batch) -> Inputs:
        """The training inputs of one batch."""
        shape = batch.columns[LATENT_MEAN].shape[1:]
        prompt_ids = batch.columns[TOKEN_IDS].astype(np.int64)
        timesteps = np.empty(batch.rows, np.int64)
        latent_noise = np.empty((batch.rows, *shape), np.float32)
        noise = np.empty_like(latent_noise)
        keep_subject = np.ones(batch.rows, bool)
        queries: list[str] = []
        for i in range(batch.rows):
            rng = np.random.default_rng((*self.seed, batch.step, batch.first + i))
            drop, drop_query = rng.random(2)
            timesteps[i] = rng.integers(self.timesteps)
            rng.standard_normal(dtype=np.float32, out=latent_noise[i])
            rng.standard_normal(dtype=np.float32, out=noise[i])
            no_prompt, no_subject = self.dropping(drop)
            if no_prompt:
                prompt_ids[i] = self._empty
            keep_subject[i] = not no_subject
            told = self._queries(batch, i, rng)
            queries += [""] * self.queries if drop_query < self.drop_query else told
        draws = timesteps, latent_noise, noise
        return self._inputs(batch, prompt_ids, queries, keep_subject, *draws)

    def validation(self, batch: Batch, numbers: Sequence[int]) -> Inputs:
        """Inputs with fixed draws: row i of `batch` is row numbers[i] of the split.

        Timesteps are spread evenly over the rows, nothing is dropped, the queries are the first
        subjects.
        """
        shape = batch.columns[LATENT_MEAN].shape[1:]
        noises = np.empty((2, batch.rows, *shape), np.float32)
        rows = np.asarray(numbers)
        for i, row in enumerate(rows):
            rng = np.random.default_rng((_VALIDATION, int(row)))
            rng.standard_normal(dtype=np.float32, out=noises[0, i])
            rng.standard_normal(dtype=np.float32, out=noises[1, i])
        # neighbours get far timesteps: a golden-ratio walk covers the range for any count
        spread = (rows * 0.6180339887498949 + 0.5) % 1.0
        timesteps = np.minimum((spread * self.timesteps).astype(np.int64), self.timesteps - 1)
        queries = [query for i in range(batch.rows) for query in self._queries(batch, i)]
        prompt_ids = batch.columns[TOKEN_IDS].astype(np.int64)
        everyone = np.ones(batch.rows, bool)
        return self._inputs(batch, prompt_ids, queries, everyone, timesteps, *noises)

    def _queries(self, batch: Batch, row: int, rng: np.random.Generator | None = None) -> list[str]:
        """Subject phrases, drawn without repeats while there are any; the caption where asked for,
        or where no subject was found. Without a generator the first ones, as they stand.
        """
        told = [str(subject) for subject in batch.columns["subjects"][row]]
        if self.query == "caption" or not told:
            told = [str(batch.columns["caption"][row])]
        if rng is not None:
            told = [told[i] for i in rng.permutation(len(told))]
        told = [told[i % len(told)] for i in range(self.queries)]
        if rng is not None:
            shorter = rng.random(self.queries) < self.drop_article
            told = [_ARTICLE.sub("", t) if s else t for t, s in zip(told, shorter, strict=True)]
        return told

    def forget(self) -> None:
        """Begin a cache of its own, after a copy: another thread may use the other one."""
        self._ids = {}

    def _tokenize(self, text: str) -> np.ndarray:
        """Token ids (L,) int64, padded and cut to the text encoder's length."""
        if text not in self._ids:
            if len(self._ids) >= _MAX_CACHED_QUERIES:
                self._ids.clear()
            ids = self.tokenizer(
                text,
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
            )
            self._ids[text] = np.asarray(ids["input_ids"], dtype=np.int64)
        return self._ids[text]

    def _inputs(
        self,
        batch: Batch,
        prompt_ids: np.ndarray,
        queries: list[str],
        keep_subject: np.ndarray,
        timesteps: np.ndarray,
        latent_noise: np.ndarray,
        noise: np.ndarray,
    ) -> Inputs:
        columns = batch.columns
        inputs = Inputs(
            step=batch.step,
            keys=list(columns["key"]),
            latent_mean=torch.from_numpy(columns[LATENT_MEAN]),
            latent_logvar=torch.from_numpy(columns[LATENT_LOGVAR]),
            latent_noise=torch.from_numpy(latent_noise),
            noise=torch.from_numpy(noise),
            timesteps=torch.from_numpy(timesteps),
            prompt_ids=torch.from_numpy(prompt_ids),
            query_ids=torch.from_numpy(
                np.stack([self._tokenize(query) for query in queries]).reshape(
                    batch.rows, self.queries, -1
                )
            ),
            named=torch.tensor([bool(query) for query in queries]).view(batch.rows, -1),
            keep_subject=torch.from_numpy(keep_subject),
            features={name: torch.from_numpy(columns[name]) for name in self._vision},
            replaced=batch.replaced,
        )
        return inputs.pin() if self.pin else inputs


def validation_batches(
    storage: Storage,
    manifest: Manifest,
    prepare: Preparer,
    *,
    rows: int,
    batch_rows: int,
    rank: int = 0,
    world: int = 1,
    corrupt: Literal["stop", "skip"] = "stop",
    verify: bool = False,
) -> list[Inputs]:
    """One worker's share of the first `rows` rows of the test split, with fixed draws; those of a
    damaged row group are left out where `corrupt` is skip.
    """
    total = min(rows, manifest.rows("test"))
    mine = range(rank * total // world, (rank + 1) * total // world)  # few row groups each
    source = RowGroups(
        storage, manifest, prepare.columns, split="test", corrupt=corrupt, verify=verify
    )
    taken: list[tuple[int, RowGroup, int]] = []
    at = 0
    for index, size in enumerate(source.sizes):
        inside = [row for row in mine if at <= row < at + size]
        if inside:
            with contextlib.suppress(Replaced):
                group = source.read(index)
                taken += [(row, group, row - at) for row in inside]
        at += size
    batches = []
    for start in range(0, len(taken), batch_rows):
        part = taken[start : start + batch_rows]
        columns = gather(prepare.columns, [(group, row) for _, group, row in part], Stacks())
        batch = Batch(step=0, first=start, columns=columns)
        batches.append(prepare.validation(batch, [row for row, _, _ in part]))
    return batches


class TextEncodings:
    """Last hidden states of the frozen text encoder, by token ids.

    On a CPU each text is encoded by itself and kept: few distinct texts make up a small run, and
    an encoding must not depend on which texts share its batch, or a resumed run, whose cache is
    empty, would differ in the last bit. On an accelerator, whose big models see a caption once, a
    batch is encoded as a whole.

    Args:
        encoder: CLIPTextModel.
        keep_bytes: bound of the cache, bytes.
    """

    def __init__(self, encoder: torch.nn.Module, keep_bytes: int = 256 * 2**20) -> None:
        self.encoder, self.keep_bytes = encoder, keep_bytes
        self.device = next(encoder.parameters()).device
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """(B, L) int64 token ids -> (B, L, D)."""
        if self.device.type != "cpu":
            return self._encode(ids)
        return torch.cat([self._one(row) for row in ids])

    def _one(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._encode(ids[None])
            while len(self._kept) * found.nbytes > self.keep_bytes:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found

    def _encode(self, ids: Tensor) -> Tensor:
        return self.encoder(ids.to(self.device)).last_hidden_state  # type: ignore[no-any-return]
