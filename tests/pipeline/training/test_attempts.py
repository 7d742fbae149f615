"""Attempts at a stage, as they are told while they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.config import TrainConfig
from pipeline.storage import Storage
from pipeline.training.attempts import Attempt, about
from pipeline.training.stage import World
from tests.pipeline.training.test_loop import config, made
from tests.stage_loops import interrupt


def attempts(root: Path) -> list[dict[str, Any]]:
    folder = root / "train" / "multi_scale" / "attempts"
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_a_run_that_was_interrupted_has_two(root: Path, tiny_models: Path) -> None:
    half = made(config(root), tiny_models)
    interrupt(half, 5)
    try:
        half.run()
    except KeyboardInterrupt:
        made(config(root, gpu_hour_price=2.0), tiny_models).run()
    first, second = attempts(root)
    assert [first["start"], first["step"]] == [0, 4] and second["step"] == 6
    assert second["start"] == 4 and second["seconds"] > 0 and second["started"]
    assert second["workers"] == 1 and second["kind"] == "cpu"
    # some builds name themselves (+cu130) in one of the two alone
    assert second["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert second["settings"]["gpu_hour_price"] == 2.0


def test_numbers_go_on(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for _ in range(2):
        attempt = Attempt(storage, "semantic", 0, about(TrainConfig(), World()))
        attempt.save(3)
        attempt.save(7)
    assert attempt.number == 2
    files = storage.list("train/semantic/attempts")
    assert files == [f"train/semantic/attempts/000{n}.json" for n in (1, 2)]
    assert storage.read_json(files[0])["step"] == 7
