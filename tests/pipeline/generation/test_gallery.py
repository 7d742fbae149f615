"""Pictures are kept batch by batch, whole, and none is drawn twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.generation import png
from pipeline.generation.batches import in_batches
from pipeline.generation.gallery import Gallery
from pipeline.generation.recipe import Recipe, Reference, rebuild
from pipeline.progress import Progress
from pipeline.storage import Storage

CUP = Reference(Image.new("RGB", (8, 8), "red"), query="cup")


class Painter:
    """Draws one colour a seed, and remembers the batches."""

    def __init__(self, most: int = 99) -> None:
        self.batches: list[list[Recipe]] = []
        self.most = most

    def __call__(
        self, recipes: Sequence[Recipe], on_step: Callable[[int], None]
    ) -> list[Image.Image]:
        if len(self.batches) == self.most:
            raise KeyboardInterrupt
        self.batches.append(list(recipes))
        for step in range(recipes[0].steps):
            on_step(step + 1)
        return [Image.new("RGB", (4, 4), (recipe.seed, 0, 0)) for recipe in recipes]


def wanted() -> list[tuple[str, Recipe]]:
    subjects = [(), (CUP,)] * 3
    return [
        (f"picture-{seed}", Recipe("a cup", subjects=some, seed=seed, steps=2))
        for seed, some in enumerate(subjects)
    ]


def test_alike_pictures_are_drawn_together_and_kept_whole(tmp_path: Path) -> None:
    painter, gallery = Painter(), Gallery(Storage(tmp_path), {"model": "1"})
    found = gallery.pictures(wanted(), painter, 2, Progress(terminal=False))
    assert [[r.seed for r in batch] for batch in painter.batches] == [[0, 2], [4], [1, 3], [5]]
    assert {name: p.getpixel((0, 0)) for name, p in found.items()} == {
        f"picture-{seed}": (seed, 0, 0) for seed in range(6)
    }
    data = (tmp_path / "generate" / "picture-3.png").read_bytes()
    said = png.made_by(data)
    assert said and said["model"] == "1"
    again = rebuild(said["recipe"], png.sources(data))
    assert again.describe() == wanted()[3][1].describe()


def test_what_was_kept_before_a_stop_is_not_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = Gallery(Storage(tmp_path), {"model": "1"})
    with pytest.raises(KeyboardInterrupt):
        gallery.pictures(wanted(), Painter(most=2), 2, Progress(terminal=False))
    assert len(list((tmp_path / "generate").iterdir())) == 3
    painter = Painter()
    gallery.pictures(wanted(), painter, 2, Progress(terminal=False))
    assert [[r.seed for r in batch] for batch in painter.batches] == [[1, 3], [5]]
    said = capsys.readouterr().out
    assert "steps: 6 of 12 are there already" in said and "pictures 6 of 6" in said
    nothing = Painter()
    gallery.pictures(wanted(), nothing, 2, Progress(terminal=False))
    assert not nothing.batches


def test_other_models_and_other_recipes_are_drawn_anew(tmp_path: Path) -> None:
    first, *_ = asked = wanted()[:2]
    for model in ("1", "2"):
        painter = Painter()
        gallery = Gallery(Storage(tmp_path), {"model": model})
        gallery.pictures(asked, painter, 8, Progress(terminal=False))
        assert len(painter.batches) == 2
    changed = (first[0], replace(first[1], negative_prompt="blue"))
    painter = Painter()
    gallery.pictures([changed, asked[1]], painter, 8, Progress(terminal=False))
    assert [[r.negative_prompt for r in batch] for batch in painter.batches] == [["blue"]]


def test_batches_give_pictures_in_the_order_they_were_wanted() -> None:
    seen = []

    def draw(some: Sequence[int]) -> list[Image.Image]:
        seen.append(list(some))
        return [Image.new("L", (1, 1), n) for n in some]

    drawn = in_batches([5, 2, 7, 4, 9], 2, draw, alike=lambda n: n % 2)
    assert [picture.getpixel((0, 0)) for picture in drawn] == [5, 2, 7, 4, 9]
    assert seen == [[5, 7], [9], [2, 4]]
