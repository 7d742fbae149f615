"""What the subject cross-attention attends to: keys and values of subjects, and how they act.

A subject acts at a layer (its scale there), at a step (its schedule) and at a place of the picture
(its region). One softmax runs over the tokens of all subjects (the paper: "concatenated"); the
values carry the scales. A subject without weight is left out of the softmax too, so that it does
not dilute the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ssr_model.aligner import split_heads
from ssr_model.images import as_region
from ssr_model.subject import Subject

Grid = tuple[int, int]
"""Rows and columns of latent positions."""


@dataclass
class SubjectBranch:
    """Keys and values of the subjects of n prompts, ready for every layer."""

    keys: dict[str, Tensor]
    """{processor name: (n, S * T, hidden)}: S subjects of T tokens, shorter rows padded."""
    values: dict[str, Tensor]
    """{processor name: (n, S * T, hidden)}, subject scales multiplied in; zeros where padded."""
    rows: Sequence[Sequence[Subject]] = ()
    """The subjects of each prompt; none (in training) = every token acts, everywhere."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """{processor name: (n, S) on the CPU}, zeros where padded."""
    _factors: Tensor | None = None
    """The schedules' factors at this step, (n, S) on the CPU; None = ones."""
    _scheduled: dict[str, Tensor] = field(default_factory=dict)
    """Values at this step."""
    _masks: dict[object, Tensor] = field(default_factory=dict)
    """Masks, biases and strengths, by who acts."""

    @classmethod
    def deal(
        cls,
        layers: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]],
        tokens: Tensor,
        rows: Sequence[Sequence[Subject]],
    ) -> SubjectBranch:
        """Keys and values of M subjects, dealt to their prompts: the first row's come first.

        layers: {processor name: K_S, V_S}; tokens: (M, T, D). A prompt's subjects are concatenated
        over tokens. Layer by layer, so that nothing is there twice.
        """
        counts = [len(row) for row in rows]
        most, even = max(counts), len(set(counts)) == 1
        index = torch.full((len(rows), most), len(tokens))  # padding points at a row of zeros
        start = 0
        for row, count in enumerate(counts):
            index[row, :count] = torch.arange(start, start + count)
            start += count
        places = index.flatten().to(tokens.device)

        def dealt(tensor: Tensor) -> Tensor:
            if not even:
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])[places]
            return tensor.unflatten(0, (len(rows), most)).flatten(1, 2)

        at = [subject.scale_at(layers) for row in rows for subject in row]
        branch = cls({}, {}, rows)
        for name, layer in layers.items():
            key, value = layer(tokens)
            scale = torch.tensor([each[name] for each in at])
            branch.keys[name] = dealt(key)
            branch.values[name] = dealt(value * scale.to(value)[:, None, None])
            branch.scales[name] = torch.cat([scale, torch.zeros(1)])[index]
        return branch

    @property
    def scheduled(self) -> bool:
        """Whether the weight of a subject changes over the steps."""
        return any(subject.schedule is not None for row in self.rows for subject in row)

    @property
    def confined(self) -> bool:
        """Whether a subject has a region."""
        return any(subject.region is not None for row in self.rows for subject in row)

    def to(self, device: torch.device, dtype: torch.dtype) -> SubjectBranch:
        """Move the keys and values, in place; what is there already stays."""
        for tensors in (self.keys, self.values):
            for name, tensor in tensors.items():
                if tensor.device != device or tensor.dtype != dtype:
                    tensors[name] = tensor.to(device, dtype)
                    self._scheduled.clear()
        return self

    def at(self, progress: float) -> None:
        """Go to a step of the denoising: 0 is the first (noisiest), 1 the last."""
        width = max(len(row) for row in self.rows)
        factors = torch.zeros(len(self.rows), width)
        for i, row in enumerate(self.rows):
            for j, subject in enumerate(row):
                factors[i, j] = subject.factor_at(progress)
        if self._factors is None or not torch.equal(factors, self._factors):
            self._factors = factors
            self._scheduled.clear()

    def attend(self, name: str, query: Tensor, latent: Grid | None = None) -> Tensor | None:
        """lambda Attn(Q, K_S, V_S) at one layer; None where nothing acts.

        query: (n * g, heads, N, d), the g samples (images per prompt, video frames) of each of the
        n prompts side by side. They share keys and values, so they are folded into one long query
        instead of repeating the keys. latent: rows and columns of the U-Net's input, needed for
        regions. Returns the query's shape.
        """
        key, value = self.keys[name], self.values[name]
        n, tokens = key.shape[0], query.shape[2]
        group = query.shape[0] // n
        mask = strength = None
        if self.rows:
            weight = self.scales[name]
            if self._factors is not None:
                weight = weight * self._factors
                value = self._scheduled_value(name)
            acting = weight != 0
            if not acting.any():
                return None
            if self.confined:
                if latent is None:
                    raise ValueError("a region needs the U-Net's input to be laid over.")
                grid = _grid(latent, tokens)
                mask, strength = self._confinement(acting, grid, key.shape[1], query)
                mask = None if mask is None else mask.repeat(1, 1, group, 1)
            elif not acting.all():
                mask = self._left_out(acting, key.shape[1], query.device)
        if group > 1:
            query = query.unflatten(0, (n, group)).transpose(1, 2).flatten(2, 3)
        heads = query.shape[1]
        key = split_heads(key.to(query.dtype), heads)
        value = split_heads(value.to(query.dtype), heads)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if strength is not None:
            out = out * strength.repeat(1, 1, group, 1)
        if group > 1:
            out = out.unflatten(2, (group, tokens)).transpose(1, 2).flatten(0, 1)
        return out

    # --- who acts, and where: made once, and kept ---------------------------------------

    def _scheduled_value(self, name: str) -> Tensor:
        if name not in self._scheduled:
            assert self._factors is not None
            value, factors = self.values[name], self._factors
            factors = factors.to(value.device, value.dtype)
            split = value.unflatten(1, (factors.shape[1], -1))
            self._scheduled[name] = (split * factors[..., None, None]).flatten(1, 2)
        return self._scheduled[name]

    def _left_out(self, acting: Tensor, tokens: int, device: torch.device) -> Tensor:
        """(n, 1, 1, S * T) bool: true at tokens that act. Where a prompt has none all are true:
        their values are zero, and a softmax over nothing would be NaN.
        """
        key = ("left out", device, *acting.flatten().tolist())
        if key not in self._masks:
            mask = acting | ~acting.any(dim=1, keepdim=True)
            mask = mask.repeat_interleave(tokens // acting.shape[1], dim=1)
            self._masks[key] = mask[:, None, None, :].to(device)
        return self._masks[key]

    def _confinement(
        self, acting: Tensor, grid: Grid, tokens: int, query: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """What regions add to the logits, (n, 1, N, S * T), and the strength there, (n, 1, N, 1).

        With m_s(p) the share of position p that lies in the region of subject s, the softmax is
        weighted by m (log m is added), and its result by the largest m there: one subject alone
        fades with its m, nothing is added where no subject may act, and m = 1 changes nothing.
        Where all subjects share their m nothing is added to the logits: None.
        """
        key = ("bias", grid, query.device, query.dtype, *acting.flatten().tolist())
        if ("strength", *key) not in self._masks:
            share = torch.zeros(*acting.shape, grid[0] * grid[1])
            for i, row in enumerate(self.rows):
                for j, subject in enumerate(row):
                    if acting[i, j]:
                        share[i, j] = as_region(subject.region, grid).flatten()
            strength = share.amax(dim=1)  # (n, N)
            self._masks["strength", *key] = strength[:, None, :, None].to(query)
            if not acting.all() or bool((share != strength[:, None]).any()):
                lowest = torch.finfo(query.dtype).min
                bias = torch.where(share > 0, share.clamp(min=1e-6).log(), lowest)
                bias = torch.where(strength[:, None] > 0, bias, 0.0)  # no softmax over nothing
                bias = bias.transpose(1, 2).repeat_interleave(tokens // acting.shape[1], dim=2)
                self._masks[key] = bias[:, None].to(query.device, query.dtype)
        return self._masks.get(key), self._masks["strength", *key]


def _grid(latent: Grid, tokens: int) -> Grid:
    """The grid of a layer of `tokens` positions: the U-Net halves the latent, rounding up."""
    rows, columns = latent
    while rows * columns > tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != tokens:
        raise ValueError(
            f"a layer of {tokens} positions is no halving of the {latent[0]} x {latent[1]} latent: "
            "regions cannot be laid over this U-Net."
        )
    return rows, columns
