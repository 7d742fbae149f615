"""The mini DINO: its training's parts, and the shipped one as a backbone of metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.miniworld import world
from pipeline.miniworld.foundation import dino, identities
from pipeline.miniworld.foundation.clip import normalised
from ssr_model.metrics import DinoBackbone, Sample, load_dino, measure

RED = (222, 32, 36)


@pytest.mark.parametrize(("area", "side"), [(dino.GLOBAL_AREA, 32), (dino.LOCAL_AREA, 16)])
def test_crops_keep_the_hue(area: tuple[float, float], side: int) -> None:
    plain = normalised(np.full((20, 32, 32, 3), RED, np.uint8))
    seen = dino.crops(plain, area, side, np.random.default_rng(0))
    assert seen.shape == (20, 3, side, side)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (dino.MEAN, dino.STD))
    light = (seen * std + mean) * 255 / torch.tensor(RED).view(3, 1, 1)
    assert torch.allclose(light, light[:, :1, :1, :1].expand_as(light), atol=1e-4)
    assert 0.84 < light.min() < 0.9 and 1.1 < light.max() < 1.16


def test_crops_are_pieces_of_their_pictures_and_some_of_them_mirrored() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 32)[None, None, :, None], (40, 32, 32, 3))
    seen = dino.crops(normalised(ramp.astype(np.uint8)), (0.25, 0.25), 16, np.random.default_rng(0))
    rise = seen[:, 0, 8, -1] - seen[:, 0, 8, 0]
    whole = 1 / 0.3
    assert torch.allclose(rise.abs() / whole, torch.tensor(0.5), atol=0.15)  # half of its width
    assert 8 < (rise < 0).sum() < 32


def test_balanced_answers_mean_every_prototype_equally_often() -> None:
    torch.manual_seed(0)
    lopsided = torch.randn(64, 8) + torch.arange(8.0)  # to most the last one is the nearest
    shares = dino.balanced(dino.TEACHER_TEMPERATURE * lopsided)
    assert torch.allclose(shares.sum(dim=1), torch.ones(64))
    assert torch.allclose(shares.sum(dim=0), torch.full((8,), 8.0), rtol=0.1)
    assert lopsided.softmax(dim=1).sum(dim=0).max() > 24


def test_the_teacher_follows_and_learns_nothing_itself() -> None:
    torch.manual_seed(dino.SEED)
    both = dino.Distillation()
    images = torch.randn(4, 3, 32, 32)
    both.loss([images, images.flip(-1)], [images[..., :16, :16]]).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in both.teacher.parameters())
    learns = {name for name, p in both.student.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in both.student.named_parameters()}
    with torch.no_grad():
        both.student.prototypes.add_(1.0)
    before = both.teacher.prototypes.clone()
    both.follow(0.9)
    assert torch.allclose(both.teacher.prototypes, before + 0.1, atol=1e-6)


def test_triplets_differ_in_identity_alone() -> None:
    for known in identities.triplets(60):
        first, same, other = (s.subjects[0] for s in (known.first, known.same, known.other))
        assert first.cls == same.cls == other.cls
        assert first.identity == same.identity
        looks = {(s.identity.main, s.identity.second, s.identity.texture) for s in (first, other)}
        assert len(looks) == 2
        assert known.same.ground == known.other.ground != known.first.ground
        assert len({(s.cx, s.cy, s.size) for s in (first, same, other)}) == 3
        for spec in (first, same, other):
            hx, hy = spec.half_extent
            assert hx - 1e-9 <= spec.cx <= 1 - hx + 1e-9 and hy - 1e-9 <= spec.cy <= 1 - hy + 1e-9
    assert identities.triplets(60)[:5] == identities.triplets(5)


def test_near_misses_differ_in_texture_alone() -> None:
    for known in identities.near_misses(identities.triplets(20)):
        first, other = known.first.subjects[0], known.other.subjects[0]
        assert first.identity.texture != other.identity.texture
        assert replace(other.identity, texture=first.identity.texture) == first.identity
        assert first.cls == other.cls and known.same.ground == known.other.ground


def test_accuracy_is_half_by_chance_and_one_by_knowledge() -> None:
    known = identities.triplets(20)
    scenes = [scene for t in known for scene in (t.first, t.same, t.other)]
    table = {world.render(s).tobytes(): s.subjects[0].identity for s in scenes}
    order = list(dict.fromkeys(table.values()))

    def knows(pictures: list[Image.Image]) -> torch.Tensor:
        places = [order.index(table[np.asarray(p).tobytes()]) for p in pictures]
        return torch.eye(len(order))[places]

    assert identities.accuracy(knows, known, None) == 1.0  # type: ignore[arg-type]
    assert identities.accuracy(lambda p: torch.ones(len(p), 1), known, None) == 0.5


@pytest.fixture(scope="module")
def shipped() -> DinoBackbone:
    return load_dino(models.resolve("miniworld:dino"), name="miniworld:dino")


def test_a_picture_is_itself_to_the_shipped_one(shipped: DinoBackbone) -> None:
    pictures = [Image.fromarray(world.render(world.scene(seed, "val"))) for seed in range(8)]
    samples = [Sample(picture, references=[picture]) for picture in pictures]
    found = measure(["dino"], samples, {"dino": shipped})["dino"]
    assert found.values == pytest.approx(np.ones(8), abs=1e-6)
    assert found.backbone["name"] == "miniworld:dino"
    vectors = shipped.images(pictures)
    assert (vectors @ vectors.T - torch.eye(8)).max() < 0.99  # no two of them alike


def test_the_shipped_one_tells_identities_apart(shipped: DinoBackbone) -> None:
    known = identities.triplets(50)
    assert identities.accuracy(shipped.images, known, None) > 0.75
    for asked in (known, identities.near_misses(known)):
        assert identities.accuracy(shipped.images, asked, shipped.blank) > 0.9


def test_it_is_small(shipped: DinoBackbone) -> None:
    folder = Path(models.resolve("miniworld:dino"))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2.5e6
    assert 0.3e6 < sum(p.numel() for p in shipped.model.parameters()) < 1e6
