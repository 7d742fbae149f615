"""What steps tell: by part of the timesteps, without those that were not taken."""

import math

import pytest
import torch

from pipeline.training.figures import BINS, Sums, bin_means, bin_names, by_timestep
from pipeline.training.stage import World


def test_every_timestep_is_in_the_part_that_its_name_says() -> None:
    for total in (1000, 64, 10):
        names = bin_names(total)
        edges = [tuple(map(int, name.removeprefix("t").split("-"))) for name in names]
        assert edges[0][0] == 0 and edges[-1][1] == total - 1 and len(set(names)) == BINS
        every = torch.arange(total)
        sums, rows = by_timestep(every.double(), every, total)
        for (first, last), value, n in zip(edges, sums.tolist(), rows.tolist(), strict=True):
            assert value == sum(range(first, last + 1)) and n == last - first + 1


def test_a_row_that_is_not_a_number_spoils_its_own_part_alone() -> None:
    sums, rows = by_timestep(torch.tensor([1.0, math.inf, 3.0]), torch.tensor([0, 500, 999]), 1000)
    assert sums[0] == 1 and sums[9] == 3 and sums[5] == math.inf and rows.sum() == 3
    means = bin_means(sums.tolist(), rows.tolist(), 1000, "ldm")
    assert means == {"ldm_t000-099": 1.0, "ldm_t500-599": math.inf, "ldm_t900-999": 3.0}


def test_steps_that_were_not_taken_do_not_count() -> None:
    sums = Sums(1000, torch.device("cpu"))
    bins = by_timestep(torch.tensor([2.0]), torch.tensor([42]), 1000)
    sums.add(torch.tensor(True), torch.tensor([2.0, 2.0, 0.5, 1.0]), bins)
    sums.add(torch.tensor(False), torch.full((4,), math.nan), bins * math.nan)
    sums.add(torch.tensor(True), torch.tensor([4.0, 4.0, 0.5, 3.0]), 2 * bins)
    figures, skipped, also = sums.means(World(), 2.0)
    assert skipped == 1 and also == 2
    assert figures == pytest.approx(
        {"loss": 3, "ldm": 3, "reg": 0.5, "grad_norm": 2, "ldm_t000-099": 2}
    )
    sums.add(torch.tensor(False), torch.zeros(4), bins)
    assert sums.means(World()) == ({}, 1, 0)
