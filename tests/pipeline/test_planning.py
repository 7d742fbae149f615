"""The plan of a run: the counted costs, what limits it, what it says of that."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PlanConfig, TrainConfig, parse
from pipeline.errors import UserError
from pipeline.planning import (
    ALIGNER,
    CLIP,
    TEXT,
    TRAINABLES,
    VAE,
    columns,
    plan,
    row_bytes,
    step_gflop,
    table,
    warnings,
)

ROOT = Path(__file__).parents[2]


def stages(**settings: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in plan(PlanConfig(**settings)).stages}


def test_bytes_are_those_of_the_format() -> None:
    """Token ids (308) on top of what the documentation of the codecs says."""
    said = {"float16": 3_223_552, "int8": 1_650_712, "pixels": 216_064}
    for codec, size in said.items():
        assert row_bytes(codec, 6, 6) == size + 308
        assert sum(column.nbytes for column in columns(codec, 6)) == size + 308
    assert row_bytes("float16", 1, 6) == 591_872 + 308
    assert row_bytes("int8", 1, 6) == 65_536 + 257 * (1024 + 4) + 308
    assert row_bytes("pixels", 1, 6) == row_bytes("pixels", 6, 6)
    flipped = sum(column.nbytes for column in columns("float16", 6, flip=True))
    assert flipped == 2 * 3_223_552 + 308


def test_operations_are_the_counted_ones() -> None:
    texts = 2 * TEXT
    assert step_gflop("float16", 1) == pytest.approx(1688 + ALIGNER + texts)
    assert step_gflop("float16", 6) == pytest.approx(1785 + ALIGNER + texts)
    assert step_gflop("pixels", 6) - step_gflop("float16", 6) == CLIP
    assert step_gflop("int8", 6, queries=3) - step_gflop("int8", 6) == pytest.approx(2 * TEXT)
    # at 400 TFLOP/s the known 223 samples/s of a GPU, 129 with the encoders online
    of_step = step_gflop("float16", 6) - texts
    assert 400e3 / of_step == pytest.approx(223, abs=0.5)
    assert 400e3 / (of_step + VAE + CLIP + texts) == pytest.approx(129, abs=0.5)


def test_the_papers_run_on_its_own_cluster() -> None:
    """0.87 days at 400 TFLOP/s without the texts, 1.53 with every encoder online."""
    made = plan(PlanConfig(peak_tflops=1000.0, utilisation=0.4))
    hours = [stage.hours for stage in made.stages]
    assert sum(hours) / 24 == pytest.approx(0.87, rel=0.02)
    online = sum(stage.online_hours for stage in made.stages) / 8
    assert (sum(hours) + online) / 24 == pytest.approx(1.53, rel=0.01)
    assert made.stored_bytes == 10_000_000 * 3_223_860
    assert made.caption_hours == pytest.approx(28, abs=0.5)
    assert made.feature_hours == pytest.approx(36, abs=0.5)
    assert warnings(made) == []


def test_the_slowest_sets_the_pace() -> None:
    free = stages()["multi_scale"]
    assert (free.limit, free.store) == ("GPU", math.inf)
    starved = stages(network_gbit=10.0)["multi_scale"]
    assert starved.limit == "network"
    assert starved.rate == pytest.approx(10e9 / 8 / 3_223_860)
    assert starved.gpu_hours / free.gpu_hours == pytest.approx(free.rate / starved.rate)
    store = stages(store_gbit=10.0)["multi_scale"]
    assert (store.limit, store.rate) == ("store", starved.rate)
    # two nodes share the rows, and exchange half of what each has, twice
    two = stages(network_gbit=10.0, gpus=16)["multi_scale"]
    assert two.gradient_bytes == 4 * TRAINABLES / 128
    assert two.rate == pytest.approx(10e9 / 8 / (3_223_860 / 2 + two.gradient_bytes))


def test_what_is_short_is_said_with_what_mends_it() -> None:
    def said(**settings: Any) -> str:
        return "\n".join(warnings(plan(PlanConfig(**settings))))

    assert said() == ""
    assert "multi_scale: the network keeps the GPUs at 56%" in said(network_gbit=25.0)
    assert "--codec int8 frees them" in said(network_gbit=25.0)
    assert "semantic: the store keeps" in said(store_gbit=5.0)
    assert "--codec pixels frees them" in said(store_gbit=5.0)
    assert "use fewer GPUs" in said(store_gbit=1.0, codec="pixels")
    many = said(gpus=64, network_gbit=25.0)
    assert "a larger global_batch exchanges gradients less often" in many
    assert "2 samples a GPU and step" in many
    assert "lanes hold up to 211 GiB on a node of 128; lower" in said(node_memory_gib=128.0)


def test_the_table() -> None:
    text = table(plan(PlanConfig(gpu_hour_price=2.0, tb_month_price=10.0)))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert {"captions", "features", "semantic", "multi_scale"} <= rows.keys()
    assert rows["multi_scale"][1:3] == ["12,800,000", "3,223,860"]
    assert "32.2 TB to store" in text and "a month of the shards: 322" in text
    assert "never" not in text
    one = table(plan(PlanConfig(semantic_steps=0)))
    assert "semantic" not in one and "GPU hours at" not in one


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus": 3}, "3 gpus must divide 64 lanes"),
        ({"utilisation": 0.0}, r"plan.utilisation is 0.0; it must lie in \(0, 1\]"),
        ({"network_gbit": 0.0}, "plan.network_gbit is 0.0; it must be more than 0"),
        ({"images": 0}, "plan.images is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PlanConfig(**settings)


def test_the_preset_plans_what_it_trains() -> None:
    cfg, train = parse(PlanConfig, [], "sd15-h800"), parse(TrainConfig, [], "sd15-h800")
    assert (cfg.semantic_steps, cfg.multi_scale_steps) == (
        train.semantic.steps,
        train.multi_scale.steps,
    )
    assert (cfg.global_batch, cfg.lanes, cfg.shuffle_rows, cfg.gpus, cfg.queries) == (
        train.global_batch,
        train.lanes,
        train.shuffle_rows,
        train.workers,
        train.queries,
    )


def test_the_job() -> None:
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/plan.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = ran("--gpus", "32", "--codec=int8")
    assert done.returncode == 0 and "32 h800 on 4 nodes" in done.stdout, done.stderr
    refused = ran("--gpus", "5")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "error: 5 gpus must divide 64 lanes, and those the global_batch 128; change one"
    ]
    assert "An assumption" in ran("--help").stdout
