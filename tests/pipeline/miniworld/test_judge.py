"""The judge's measures, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.miniworld import world
from pipeline.miniworld.judge import Judge, named_colours, palette_distance


def test_a_judge_is_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    judge.save(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    again = Judge.load(tmp_path)
    assert torch.allclose(again(images), judge(images), atol=2e-2)  # stored in half precision
    assert again.segment(images).shape == (3, 32, 32)
    assert again.present(images).shape == (3, len(world.CLASSES))


def test_a_judge_of_other_classes_is_refused(tmp_path: Path) -> None:
    Judge().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["classes"][0] = "zebra"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other classes"):
        Judge.load(tmp_path)


def test_palette_distance_is_to_the_nearest_colour() -> None:
    red, blue = world.COLOURS["red"], world.COLOURS["blue"]
    pixels = np.array([red, blue, red], np.float32)
    assert palette_distance(pixels, (red, blue)) == 0
    assert palette_distance(
        pixels[:1] + np.array([3, 4, 0], np.float32), (red, blue)
    ) == pytest.approx(5)
    assert palette_distance(pixels[:0], (red, blue)) == float("inf")


def test_named_colours_need_a_share_of_the_pixels() -> None:
    red, blue = world.COLOURS["red"], world.COLOURS["blue"]
    pixels = np.array([red] * 95 + [blue] * 5, np.float32)
    assert named_colours(pixels) == {"red"}
    assert named_colours(pixels, share=0.04) == {"red", "blue"}
    assert named_colours(pixels[:0]) == set()
