"""The runner on methods whose pictures are known: an oracle draws the asked subject, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation import benches, runner
from pipeline.evaluation.benches import Request
from pipeline.evaluation.runner import Condition, SelectionStage
from pipeline.miniworld import world
from pipeline.progress import Progress
from pipeline.storage import Storage


class Oracle:
    """Draws the reference's subject `offset` places after the asked one, on grey ground."""

    def __init__(self, offset: int) -> None:
        self.name, self.offset, self.calls = f"oracle-{offset}", offset, 0

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image]:
        self.calls += 1
        drawn = []
        for request in requests:
            (chosen,) = request.selections
            subjects = chosen.reference.subjects
            mask = subjects[(chosen.target + self.offset) % len(subjects)].mask
            pixels = np.where(mask[..., None], np.asarray(chosen.reference.image), 128)
            drawn.append(Image.fromarray(pixels.astype(np.uint8)))
        return drawn


class KnowingJudge:
    """Finds a class by comparing with the bench's own masks."""

    def __init__(self, bench: Sequence[benches.Reference]) -> None:
        self.bench = bench

    def segment(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        out = torch.zeros(len(pixels), *pixels.shape[1:3], dtype=torch.int64)
        for i, image in enumerate(pixels):
            for reference in self.bench:
                original = np.asarray(reference.image)
                for subject in reference.subjects:
                    if (image[subject.mask] == original[subject.mask]).all():
                        label = world.CLASSES.index(subject.name) + 1
                        out[i][torch.from_numpy(subject.mask)] = label
        return out

    def present(self, images: torch.Tensor) -> torch.Tensor:
        labels = self.segment(images)
        return torch.stack(
            [(labels == i + 1).flatten(1).any(1) for i in range(len(world.CLASSES))], dim=1
        )


@pytest.fixture
def bench() -> list[benches.Reference]:
    return benches.mini_bench(5, 32)


def looks_at_a(bench: Sequence[benches.Reference]):
    def attention(image: Image.Image, queries: Sequence[str]) -> np.ndarray:
        (reference,) = [r for r in bench if r.image is image]
        return np.stack([reference.subjects[0].mask.astype(np.float32) for _ in queries])

    return attention


def make(bench, methods, **settings) -> tuple[SelectionStage, list[Condition]]:
    conditions = [
        Condition(f"{method.name}-{'ab'[target]}", f"{method.name} {target}", method, target, True)
        for method in methods
        for target in (0, 1)
    ]
    judge = KnowingJudge(bench)
    stage = SelectionStage(bench, conditions, judge, looks_at_a(bench), 2, 0, settings)
    return stage, conditions


def test_known_pictures_get_known_scores(bench, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    stage, conditions = make(bench, [Oracle(0), Oracle(1)])
    rows = runner.run(stage, storage, Progress(terminal=False))
    assert len(rows) == 5 * 4
    summary = runner.tabulate(rows, conditions)
    right, wrong = summary["oracle-0 0"], summary["oracle-1 0"]
    for key in ("target_present", "other_absent", "nearer", "selected"):
        assert right[key] == 1.0 and wrong[key] == 0.0
    assert right["distance_target"] < 20 < right["distance_other"]
    assert wrong["distance_target"] is None
    assert (right["peak_target"], right["peak_other"]) == (1.0, 0.0)
    swapped = summary["oracle-0 1"]
    assert (swapped["peak_target"], swapped["peak_other"]) == (0.0, 1.0)
    assert swapped["selected"] == 1.0
    seeds = {row["key"]: row["seed"] for row in rows}
    assert len(set(seeds.values())) == 5 and all(seeds[row["key"]] == row["seed"] for row in rows)
    assert runner.picture(bench, rows, conditions).width > 5 * 160


def test_finished_units_are_not_drawn_again(bench, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    first = Oracle(0)
    before = runner.run(make(bench, [first])[0], storage, Progress(terminal=False))
    assert first.calls == 6, "two conditions, three batches"
    storage.delete("evaluation/samples/_done/oracle-0-a-00002-00004.json")
    again = Oracle(0)
    after = runner.run(make(bench, [again])[0], storage, Progress(terminal=False))
    assert again.calls == 1 and after == before


def test_a_bench_may_grow_and_shrink(bench, tmp_path: Path) -> None:
    """Batches of two: three references end in half a batch, which is no part of a longer bench."""
    storage = Storage(tmp_path)
    calls = []
    for references in (3, 5, 3, 2):
        drawn = Oracle(0)
        stage, conditions = make(bench[:references], [drawn])
        rows = runner.run(stage, storage, Progress(terminal=False))
        assert len(rows) == 2 * references
        assert {row["key"] for row in rows} == {r.key for r in bench[:references]}
        assert runner.picture(bench[:references], rows, conditions).height > 0
        calls.append(drawn.calls)
    assert calls == [4, 4, 0, 0]


def test_samples_of_other_settings_are_made_again(bench, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    runner.run(make(bench, [Oracle(0)], guidance=7.5)[0], storage, Progress(terminal=False))
    again = Oracle(0)
    runner.run(make(bench, [again], guidance=2.0)[0], storage, Progress(terminal=False))
    assert again.calls == 6
