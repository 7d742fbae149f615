"""The subject branch of one layer, on random shapes, against plain einsum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ssr_model.branch import SubjectBranch
from ssr_model.subject import Subject

LAYER = "up_blocks.0.attn2.processor"
IMAGE = np.zeros((1, 1, 3), np.uint8)


def deal(pair: Any, rows: list[list[Subject]]) -> SubjectBranch:
    """A branch of one layer with these keys and values, each (M, T, hidden)."""
    return SubjectBranch.deal({LAYER: lambda _: pair}, pair[0], rows)


def subject(**fields: object) -> Subject:
    return Subject(IMAGE, query="fish", **fields)  # type: ignore[arg-type]


def reference(
    query: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    rows: list[list[Subject]],
    shares: list[torch.Tensor],
    progress: float,
) -> torch.Tensor:
    """query (n * g, heads, N, d); the pairs, shares (N,) and subjects in one order; float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    group, start = len(query) // len(rows), 0
    for i, row in enumerate(rows):
        acting = []
        for j in range(start, start + len(row)):
            s = row[j - start]
            scale = s.scale_at([LAYER])[LAYER] * s.factor_at(progress)
            if scale != 0:
                acting.append((j, scale))
        start += len(row)
        for b in range(i * group, (i + 1) * group):
            for h in range(query.shape[1]):
                q = query[b, h].double()
                columns = slice(h * q.shape[1], (h + 1) * q.shape[1])
                weights, values, largest = [], [], torch.zeros(len(q), dtype=torch.float64)
                for j, scale in acting:
                    k, v = (t[j, :, columns].double() for t in pairs)
                    e = torch.einsum("nd,td->nt", q, k).div(math.sqrt(q.shape[1])).exp()
                    weights.append(e * shares[j].double()[:, None])
                    values.append(v * scale)
                    largest = torch.maximum(largest, shares[j].double())
                if acting:
                    a = torch.cat(weights, dim=1)
                    a = a / a.sum(1, keepdim=True).clamp(min=1e-300)
                    out[b, h] = torch.einsum("nt,td->nd", a, torch.cat(values)) * largest[:, None]
    return out


@pytest.mark.parametrize("seed", range(40))
def test_random_subjects_tokens_and_batches(seed: int) -> None:
    """Any number of prompts, subjects, samples, tokens, heads; scales, regions, schedules."""
    rng = np.random.default_rng(seed)
    prompts, group, tokens, heads, width = (int(rng.integers(1, 4)) for _ in range(5))
    counts = [int(n) for n in rng.integers(0, 4, prompts)]
    counts[rng.integers(prompts)] += 1  # somebody has one
    grid = (4, 6)
    confined, progress = seed % 2, float(rng.choice([0.0, 0.3, 1.0]))
    rows: list[list[Subject]] = []
    shares = []
    for count in counts:
        rows.append([])
        for _ in range(count):
            region = None
            if confined and rng.random() < 0.8:
                region = rng.choice([0.0, 0.5, 1.0], grid, p=[0.5, 0.2, 0.3])
                region[0, 0] = 1.0
            scale = float(rng.choice([0.0, 0.5, 1.0, -1.0]))
            one = subject(
                scale=scale if rng.random() < 0.5 else {"up_blocks": scale},
                region=None if region is None else region.repeat(2, 0).repeat(2, 1),
                schedule=None if rng.random() < 0.5 else list(rng.choice([0.0, 0.7, 1.0], 3)),
            )
            rows[-1].append(one)
            shares.append(torch.ones(24) if region is None else torch.from_numpy(region).flatten())
    torch.manual_seed(seed)
    pairs = tuple(torch.randn(sum(counts), tokens, heads * width) for _ in range(2))
    query = torch.randn(prompts * group, heads, 24, width) * 2
    branch = deal(pairs, rows)
    if branch.scheduled:
        branch.at(1 - progress)  # what is kept of another step must not stay
        branch.attend(LAYER, query, (8, 12))
        branch.at(progress)
    elif progress:
        progress = 0.0
    for _ in range(2):  # and the second time, from what was kept
        found = branch.attend(LAYER, query, (8, 12))
        expected = reference(query, pairs, rows, shares, progress)  # type: ignore[arg-type]
        found = torch.zeros_like(query) if found is None else found
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_nothing_is_added_outside_a_region() -> None:
    pair = (torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    region = np.zeros((8, 8), bool)
    region[:, :4] = True
    branch = deal(pair, [[subject(region=region)]])
    out = branch.attend(LAYER, torch.randn(1, 2, 16, 2), (8, 8))
    assert out is not None
    halves = out.unflatten(2, (4, 4))
    assert (halves[:, :, :, 2:] == 0).all() and (halves[:, :, :, :2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regions_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    pair = (torch.randn(2, 3, 4) * 30, torch.randn(2, 3, 4))
    left, right = np.zeros((4, 4)), np.zeros((4, 4))
    left[:, :1], right[:, 3:] = 1, 1
    branch = deal(pair, [[subject(region=left), subject(region=right)]])
    query = (torch.randn(1, 2, 16, 2) * 30).to(dtype)
    out = branch.to(query.device, dtype).attend(LAYER, query, (4, 4))
    assert out is not None and out.isfinite().all()
    alone = deal(tuple(t[:1] for t in pair), [[subject()]])
    expected = alone.to(query.device, dtype).attend(LAYER, query)
    assert expected is not None
    torch.testing.assert_close(
        out.unflatten(2, (4, 4))[:, :, :, 0], expected.unflatten(2, (4, 4))[:, :, :, 0]
    )


def test_a_latent_that_the_layer_is_no_halving_of() -> None:
    pair = (torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    branch = deal(pair, [[subject(region=np.ones((2, 2)))]])
    for latent in ((9, 5), (18, 10)):  # 5 x 3, rounded up
        assert branch.attend(LAYER, torch.randn(1, 2, 15, 2), latent) is not None
    with pytest.raises(ValueError, match="no halving of the 8 x 8 latent"):
        branch.attend(LAYER, torch.randn(1, 2, 15, 2), (8, 8))
