"""Scenes: a function of split and seed, with exact masks, palettes and captions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.miniworld import world


def test_the_same_seed_is_the_same_scene_and_picture() -> None:
    first, again = world.scene(7, "train"), world.scene(7, "train")
    assert first == again
    assert np.array_equal(world.render(first), world.render(again))
    assert world.scene(8, "train") != first


def test_the_splits_share_no_scene() -> None:
    scenes = [world.scene(seed, split) for split in world.SPLITS for seed in range(300)]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_subjects_differ_in_class_and_colours_and_do_not_overlap(count: int) -> None:
    for seed in range(60):
        scene = world.scene(seed, "bench", count)
        assert len({s.cls for s in scene.subjects}) == count
        colours = [c for s in scene.subjects for c in (s.identity.main, s.identity.second)]
        assert len(set(colours)) == 2 * count
        masks = world.masks(scene, (64, 64))
        assert masks.shape == (count, 64, 64)
        assert masks.sum(axis=0).max() == 1
        assert masks.any(axis=(1, 2)).all()


def test_pixels_inside_a_mask_have_the_subjects_colours() -> None:
    near = []
    for seed in range(40):
        scene = world.scene(seed, "train", 2)
        picture, masks = world.render(scene, (128, 128)), world.masks(scene, (128, 128))
        for spec, mask in zip(scene.subjects, masks, strict=True):
            gaps = picture[mask].astype(float)[:, None] - np.array(spec.palette)[None]
            near.append((np.abs(gaps).max(axis=-1).min(axis=1) <= 2).mean())
    assert min(near) > 0.7  # the rest is anti-aliased edges
    assert np.mean(near) > 0.9


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (50, 130)])
def test_a_picture_of_any_shape_holds_the_scene_in_its_centre_square(size: tuple[int, int]) -> None:
    scene = world.scene(3, "train", 1)
    width, height = size
    picture, mask = world.render(scene, size), world.masks(scene, size)[0]
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    square = mask[top : top + side, left : left + side]
    assert square.sum() == mask.sum() > 0


def test_plain_captions_name_classes_and_ground_and_no_appearance() -> None:
    looks = {*world.COLOURS, *world.TEXTURES}
    for seed in range(50):
        scene = world.scene(seed, "val")
        words = world.caption(scene).replace(",", " ").split()
        assert not looks & set(words)
        assert words[-1] == scene.ground
        assert {s.cls for s in scene.subjects} == set(words) & set(world.CLASSES)


def test_attribute_captions_name_every_colour() -> None:
    scene = world.scene(5, "foundation", 2)
    words = set(world.caption(scene, True).replace(",", " ").split())
    for spec in scene.subjects:
        assert {spec.identity.main, spec.identity.second, spec.cls} <= words
        assert ("striped" in world.phrase(spec, True)) == (spec.identity.texture == "striped")


def test_every_class_and_ground_occurs_about_equally_often() -> None:
    scenes = [world.scene(seed, "train") for seed in range(1500)]
    for names, seen in (
        (world.CLASSES, [s.cls for scene in scenes for s in scene.subjects]),
        (tuple(world.GROUNDS), [scene.ground for scene in scenes]),
    ):
        shares = np.array([seen.count(name) for name in names]) / len(seen)
        assert shares.min() > 0.7 / len(names)
        assert shares.max() < 1.4 / len(names)
