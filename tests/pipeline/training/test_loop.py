"""The loop: gradients over workers, exact resume, the same chance for every world."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import models
from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.training import loop as loop_module
from pipeline.training.checkpoint import Checkpoints, Snapshot
from pipeline.training.inputs import TextEncodings
from pipeline.training.loop import StageLoop
from pipeline.training.record import PROGRESS
from pipeline.training.stage import Frozen, Stage, World, learning_rate
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from tests.stage_loops import interrupt

STEPS = 6


def config(root: Path, **fields: Any) -> TrainConfig:
    given = {
        "root": str(root),
        "global_batch": 8,
        "lanes": 4,
        "shuffle_rows": 16,
        "heads": 2,
        "head_dim": 8,
        "log_steps": 2,
        "validate_steps": 3,
        "validate_rows": 10,
        "checkpoint_steps": 2,
        "sample_steps": 0,
        "drop_prompt": 0.2,
        "drop_query": 0.2,
        "queries": 2,
    }
    return TrainConfig(**{**given, **fields})


def made(
    cfg: TrainConfig, folder: Path, world: World | None = None, steps: int = STEPS, lr: float = 1e-2
) -> StageLoop:
    """A stage of all scales on the tiny models."""
    world = world or World()
    storage = Storage(cfg.root)
    manifest = Manifest.load(storage)
    sd = str(folder / "sd")
    frozen = Frozen(
        models.load_unet(sd),
        models.load_text_encoder(sd),
        models.load_tokenizer(sd),
        models.load_scheduler(sd),
        0.7,
        load_vae=partial(models.load_vae, sd),
    ).to(world.device)
    depths = tuple(manifest.depths)
    shape = SSRConfig.from_models(
        models.load_vision(str(folder / "clip")).config,
        frozen.text_encoder.config,
        frozen.unet,
        depths=depths,
        heads=cfg.heads,
        head_dim=cfg.head_dim,
    )
    torch.manual_seed(cfg.seed)
    adapter = SSRAdapter(shape)
    adapter.init_from_unet(frozen.unet)
    stage = Stage("multi_scale", 1, depths, OptimConfig(steps=steps, lr=lr, warmup_steps=2))
    return StageLoop(cfg, stage, world, frozen, adapter, storage, manifest)


def weights(loop: StageLoop) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loop.learner.parameters.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def metrics(root: Path) -> list[dict[str, Any]]:
    path = root / "train" / "multi_scale" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resume_is_bit_for_bit(root: Path, tmp_path: Path, tiny_models: Path, ema: float) -> None:
    """A run stopped between two checkpoints, and gone on with by a new process's objects."""
    cfg = config(root, ema_decay=ema)
    whole = made(cfg, tiny_models)
    start = weights(whole)
    whole.run()
    assert whole.step == STEPS and not same(start, weights(whole))
    assert all(not torch.equal(start[name], value) for name, value in weights(whole).items())
    records = metrics(root)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 3, 6]
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert list((root / "train" / "tensorboard").iterdir())

    for file in (root / "train").rglob("*"):
        if file.is_file():
            file.unlink()
    half = made(cfg, tiny_models)
    interrupt(half, 5)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    assert Checkpoints(Storage(root).sub("train/multi_scale")).newest() == 4
    rest = made(cfg, tiny_models)
    torch.manual_seed(123)
    rest.run()
    assert same(weights(whole), weights(rest))
    assert same(whole.learner.ema, rest.learner.ema)
    again = metrics(root)
    timings = {"samples_per_s", "data_wait"}
    assert [{k: v for k, v in r.items() if k not in timings} for r in again] == [
        {k: v for k, v in r.items() if k not in timings} for r in records
    ]

    done = made(cfg, tiny_models)
    figures = done.run()
    assert same(weights(whole), weights(done)) and figures["step"] == STEPS
    assert metrics(root) == again and figures["loss"] == records[-2]["loss"]


def test_a_slow_store_stalls_no_step_and_gets_the_step_it_was_given(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = made(config(root, ema_decay=0.9, keep_checkpoints=9), tiny_models)
    step, save, answers = loop._take, Checkpoints.save, threading.Event()
    then: dict[int, Any] = {}

    def slow(self: Checkpoints, snapshot: Any) -> str:
        assert answers.wait(60)
        return save(self, snapshot)

    def trained(inputs: Any) -> None:
        step(inputs)
        then[loop.step] = weights(loop), {k: v.clone() for k, v in loop.learner.ema.items()}
        if loop.step == 4:
            assert loop.checkpoints.steps() == []
            answers.set()

    monkeypatch.setattr(Checkpoints, "save", slow)
    loop._take = trained  # type: ignore[method-assign]
    loop.run()
    assert loop.checkpoints.steps() == [2, 4, 6]
    for at in (2, 4, 6):
        snapshot = loop.checkpoints.load(at)
        assert same(snapshot.trainables, then[at][0]) and same(snapshot.ema, then[at][1])


def test_what_a_checkpoint_fails_of_ends_the_run(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, save = made(config(root), tiny_models), Checkpoints.save

    def full(self: Checkpoints, snapshot: Any) -> str:
        if snapshot.step == 4:
            raise UserError("the disk is full; free some of it")
        return save(self, snapshot)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        loop.run()
    assert loop.checkpoints.steps() == [2]
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


def _worker(rank: int, size: int, root: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=size)
    # parts of the share of each, which differ in size
    cfg = config(Path(root), micro_batch=3 if size == 2 else None)
    loop = made(cfg, Path(folder), World(rank, size))
    seen = _gradients(loop)
    if rank == 0:
        torch.save(seen, f"{out}/gradients.pt")
    loop.run()
    if rank == 0:
        torch.save(weights(loop), f"{out}/weights.pt")
    # DDP's reducer must not be the last owner of the group: its destructor waits, holding the GIL,
    # for a thread that wants the GIL
    del loop
    gc.collect()
    dist.destroy_process_group()


def _gradients(loop: StageLoop) -> dict[str, torch.Tensor]:
    """Gradients of the first step's loss, before any of it is applied."""
    batch = next(loop.lanes.batches(0, 1, loop.world.rank, loop.world.size))
    loop.learner.backward(loop.prepare(batch))
    found = {
        name: p.grad.clone() for name, p in loop.learner.parameters.items() if p.grad is not None
    }
    loop.learner.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_of_many_workers_is_that_of_one(
    root: Path, tmp_path: Path, tiny_models: Path, size: int
) -> None:
    one = made(config(root), tiny_models)
    alone = _gradients(one)
    assert alone.keys() == one.learner.parameters.keys()
    for fields in ({"micro_batch": 3}, {"gradient_checkpointing": True}):
        parts = _gradients(made(config(root, **fields), tiny_models))
        for name, gradient in alone.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    arguments = (size, str(root), str(tiny_models), str(tmp_path))
    mp.start_processes(_worker, arguments, size, start_method="forkserver")
    together = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        assert gradient.abs().max() > 0, name
        scale = gradient.abs().max().item()
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    # and so the runs agree to float noise: records of one step differ in the last digits only
    both = metrics(root)
    for file in (root / "train").rglob("*"):
        if file.is_file():
            file.unlink()
    one.run()
    for together, alone in zip(both, metrics(root), strict=True):
        timings = dict.fromkeys(("samples_per_s", "data_wait"), 0.0)
        assert together | timings == pytest.approx(alone | timings, rel=1e-3)


def test_chance_is_the_same_for_every_world(root: Path, tiny_models: Path) -> None:
    chances = {"drop_prompt": 0.3, "drop_query": 0.3, "drop_article": 0.5, "queries": 2}
    chances |= {"drop_subject": 0.2, "drop_both": 0.2}
    loop = made(config(root, **chances), tiny_models)
    whole = [loop.prepare(batch) for batch in loop.lanes.batches(0, 3)]
    shares = [[loop.prepare(b) for b in loop.lanes.batches(0, 3, rank, 4)] for rank in range(4)]
    for step, inputs in enumerate(whole):
        parts = [share[step] for share in shares]
        assert inputs.keys == [key for part in parts for key in part.keys]
        for name, tensor in inputs.tensors().items():
            assert torch.equal(tensor, torch.cat([part.tensors()[name] for part in parts])), name
    assert not torch.equal(whole[0].noise, whole[1].noise)
    told = [row for inputs in whole for row in inputs.query_ids.tolist()]
    queries = {tuple(query) for row in told for query in row}
    empty = tuple(loop.frozen.tokenizer("", padding="max_length")["input_ids"])
    assert empty in queries and 6 < len(queries) <= 11  # five classes, with an article or without
    kinds = {
        (tuple(prompt) == empty, not keep)
        for inputs in whole
        for prompt, keep in zip(
            inputs.prompt_ids.tolist(), inputs.keep_subject.tolist(), strict=True
        )
    }
    assert len(kinds) == 4  # prompt alone, subject alone, both, neither
    for inputs in whole:
        dropped = [[tuple(query) == empty for query in row] for row in inputs.query_ids.tolist()]
        assert inputs.named.tolist() == [[not drop for drop in row] for row in dropped]
        assert all(len(set(row)) == 1 for row in dropped)  # a row's queries are dropped together


def test_the_queries_of_a_row_are_its_subjects(root: Path, tiny_models: Path) -> None:
    loop = made(config(root, drop_query=0.0), tiny_models)
    batch = next(iter(loop.lanes.batches(0, 1)))
    told = [["a fish"], ["a fish", "a cup"], ["a fish", "a cup", "a star"], []]
    batch.columns["subjects"] = [told[row % 4] for row in range(batch.rows)]
    batch.columns["caption"] = ["a tree"] * batch.rows
    decode = loop.frozen.tokenizer.decode
    for row, ids in enumerate(loop.prepare(batch).query_ids):
        queries = [decode(query, skip_special_tokens=True).strip() for query in ids]
        subjects = told[row % 4] or ["a tree"]
        assert len(set(queries)) == min(2, len(subjects)), "no repeats while there are others"
        assert set(queries) <= set(subjects)


def test_losses_are_told_apart_by_timestep(root: Path, tiny_models: Path) -> None:
    loop = made(config(root, log_steps=3), tiny_models)
    step, drawn = loop._take, []

    def seen(inputs: Any) -> None:
        drawn.extend(inputs.timesteps.tolist())
        step(inputs)

    loop._take = seen  # type: ignore[method-assign]
    loop.run()
    logged = [r for r in metrics(root) if "loss" in r]
    names = [f"ldm_t{n}00-{n}99" for n in range(10)]
    for record, start in zip(logged, (0, 24), strict=True):
        rows = np.bincount(np.array(drawn[start : start + 24]) // 100, minlength=10)
        there = {name for name, n in zip(names, rows, strict=True) if n}
        assert {key for key in record if key.startswith("ldm_")} == there
        means = [record.get(name, 0.0) for name in names]
        assert np.dot(means, rows) / 24 == pytest.approx(record["ldm"], rel=1e-5)


def test_validation_is_the_same_in_every_run(root: Path, tiny_models: Path) -> None:
    """Rows, timesteps, noise and queries, whatever the seed, the world and the number of rows."""
    alone = made(config(root), tiny_models)
    ours = {k: row for inputs in alone._held_out() for k, row in by_row(inputs).items()}
    other = made(config(root, seed=5, drop_prompt=1.0, validate_rows=12), tiny_models)
    for rank in range(2):
        other.world = World(rank, 2)
        theirs = {k: row for inputs in other._held_out() for k, row in by_row(inputs).items()}
        both = [key for key in theirs if key in ours]
        assert both == list(ours)[6 * rank : 6 * rank + 6] and len(theirs) == 6
        assert all(same(ours[key], theirs[key]) for key in both)
    parts = {int(row["timesteps"]) // 100 for row in ours.values()}
    assert len(ours) == 10 and len(parts) >= 9
    alone.run()
    told = [record for record in metrics(root) if "validation_ldm" in record]
    by_part = {int(key[16:19]) // 100 for key in told[0] if key.startswith("validation_ldm_t")}
    assert by_part == parts and [set(record) for record in told] == [set(told[0])] * 3


def by_row(inputs: Any) -> dict[str, dict[str, torch.Tensor]]:
    tensors = {**inputs.tensors(), **inputs.features}
    return {key: {k: v[i] for k, v in tensors.items()} for i, key in enumerate(inputs.keys)}


def poison(loop: StageLoop, steps: set[int]) -> list[str]:
    """Make row 1 of these steps (counted from 0) no number; returns the keys of those rows."""
    step, keys = loop._take, []

    def poisoned(inputs: Any) -> None:
        if loop.step in steps:
            inputs.noise[1] = np.nan
            keys.append(inputs.keys[1])
        step(inputs)

    loop._take = poisoned  # type: ignore[method-assign]
    return keys


def nonfinite(root: Path) -> list[dict[str, Any]]:
    path = root / "train" / "multi_scale" / "nonfinite.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_diverging_is_one_line_and_leaves_the_last_good_checkpoint(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is still on its way as the step is looked at."""
    save = Checkpoints.save

    def slowly(self: Checkpoints, snapshot: Snapshot) -> None:
        time.sleep(1)
        save(self, snapshot)

    monkeypatch.setattr(Checkpoints, "save", slowly)
    loop = made(config(root), tiny_models)
    keys = poison(loop, {3})
    said = r"multi_scale diverged before step 4 .*step 2 is saved.*: step 4 is not a number"
    with pytest.raises(UserError, match=said) as caught:
        loop.run()
    assert keys[0] in str(caught.value) and "\n" not in str(caught.value)
    assert Checkpoints(Storage(root).sub("train/multi_scale")).newest() == 2
    assert nonfinite(root) == [{"step": 4, "keys": keys}]
    told = Storage(root).read_json(PROGRESS)
    assert (told["step"], told["checkpoint"], told["nonfinite"]) == (4, 2, 1)


def test_a_step_that_is_not_a_number_is_not_taken(
    root: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = made(config(root, nonfinite="skip", ema_decay=0.9, keep_checkpoints=9), tiny_models)
    keys = poison(loop, {2, 4})
    loop.run()
    assert loop.step == STEPS
    assert nonfinite(root) == [{"step": s, "keys": [k]} for s, k in zip((3, 5), keys, strict=True)]
    two, four = loop.checkpoints.load(2), loop.checkpoints.load(4)
    taken = {float(v) for name, v in four.optimizer.items() if name.endswith("/step")}
    assert taken == {3.0} and not same(two.trainables, four.trainables)
    logged = {r["step"]: r for r in metrics(root) if "loss" in r}
    assert [logged[step].get("skipped") for step in (2, 4, 6)] == [None, 1, 1]
    assert all(math.isfinite(v) for r in metrics(root) for v in r.values())
    told = Storage(root).read_json(PROGRESS)
    # a thread saves while the loop goes on: the newest that it had finished by then
    assert told["nonfinite"] == 2 and told["checkpoint"] in (2, 4, STEPS)
    assert "1 step(s) not taken, the first is 3: rows" in capsys.readouterr().out


def test_a_run_that_skips_every_step_stops(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = made(config(root, nonfinite="skip"), tiny_models)
    poison(loop, {2, 3})
    monkeypatch.setattr(loop_module, "_FRUITLESS", 2)
    with pytest.raises(UserError, match="none of the last 2 is a number"):
        loop.run()


def test_a_text_is_encoded_alike_in_any_company(tiny_models: Path) -> None:
    encoder = models.load_text_encoder(str(tiny_models / "sd"))
    tokenizer = models.load_tokenizer(str(tiny_models / "sd"))
    ids = torch.tensor(
        tokenizer(["a fish", "a cup on sand", "a fish"], padding="max_length")["input_ids"]
    )
    texts = TextEncodings(encoder)
    together = texts(ids)
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], TextEncodings(encoder)(ids[1:2]))
    torch.testing.assert_close(together, encoder(ids).last_hidden_state)


def test_learning_rate() -> None:
    optim = OptimConfig(steps=10, lr=1.0, warmup_steps=2, schedule="cosine")
    rates = [learning_rate(optim, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert learning_rate(OptimConfig(steps=10, lr=0.3), 9) == 0.3
