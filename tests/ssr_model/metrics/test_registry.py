"""The registry, and measuring by several metrics at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from ssr_model.metrics import (
    METRICS,
    AestheticPredictor,
    AestheticScorer,
    ClipBackbone,
    DinoBackbone,
    Embeddings,
    MaskedSubject,
    Sample,
    load_clip,
    measure,
)
from ssr_model.metrics.registry import Look
from ssr_model.metrics.samples import Need
from tests.ssr_model.metrics.pictures import drawing

CUP, MASK = drawing("green", "red")
OTHER, _ = drawing("blue", "red")
SAMPLES = [
    Sample(
        picture,
        text="a cup",
        others=["a fish"],
        references=[CUP, OTHER],
        subjects=[MaskedSubject("cup", [(CUP, MASK)], MASK)],
    )
    for picture in (CUP, OTHER, CUP.copy())
]


@pytest.fixture(scope="module")
def looks(clip: ClipBackbone, dino: DinoBackbone) -> dict[Look, Any]:
    layer = {"layers.0.weight": torch.linspace(-1, 1, 32)[None], "layers.0.bias": torch.ones(1)}
    scorer = AestheticScorer(clip, AestheticPredictor(layer, clip.width))
    return {"clip": clip, "dino": dino, "aesthetic": scorer}


def test_every_definition_is_whole() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name and metric.title and metric.formula and metric.source
        assert metric.low < metric.high and metric.backbone in get_args(Look)
        assert metric.needs <= set(get_args(Need))
    assert [n for n, m in METRICS.items() if m.better == "lower"] == ["clip_es"]
    assert [n for n, m in METRICS.items() if m.needs_masks] == ["dino_m"]


def test_all_at_once_are_each_alone(looks: Any) -> None:
    together = measure(list(METRICS), SAMPLES, looks)
    assert list(together) == list(METRICS)
    for name, metric in METRICS.items():
        alone = metric.compute(SAMPLES, looks[metric.backbone])
        np.testing.assert_allclose(together[name].values, alone.values, atol=1e-5)
        assert together[name].backbone["name"] == ("dino" if metric.backbone == "dino" else "clip")
        assert together[name].metric == name
    assert "predictor" in together["aesthetic"].backbone


def test_a_metric_needs_no_more_than_it_says(looks: Any) -> None:
    for name, metric in METRICS.items():
        bare = [Sample(CUP, **{need: getattr(SAMPLES[0], need) for need in metric.needs})]
        found = measure([name], bare, {metric.backbone: looks[metric.backbone]})[name]
        assert np.isfinite(found.values).all()
        for need in metric.needs:
            with pytest.raises(ValueError, match=f"which {metric.title} needs"):
                measure([name], [Sample(CUP)], looks)
            assert need in get_args(Need)


def test_each_picture_and_text_is_embedded_once(
    tiny_models: Path, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that are equal are the same, whichever object they are."""
    counts = {"images": 0, "texts": 0}
    for kind in counts:
        embed = getattr(ClipBackbone, kind)

        def counted(self: Any, items: Any, embed: Any = embed, kind: str = kind) -> Any:
            counts[kind] += len(items)
            return embed(self, items)

        monkeypatch.setattr(ClipBackbone, kind, counted)
    names = ["clip_t", "clip_i", "clip_es", "aesthetic"]
    measure(names, SAMPLES, looks)
    assert counts == {"images": 2, "texts": 2}
    # another backbone, even of the same weights, looks itself
    scorer = AestheticScorer(load_clip(str(tiny_models / "clip")), looks["aesthetic"].predictor)
    measure(names, SAMPLES, {**looks, "aesthetic": scorer})
    assert counts == {"images": 6, "texts": 4}


def test_the_same_bytes_in_another_shape_are_another_picture(dino: DinoBackbone) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    tall = wide.reshape(60, 20, 3)
    found = Embeddings().images(dino, [wide, tall, wide])
    torch.testing.assert_close(found, dino.images([wide, tall, wide]), atol=1e-5, rtol=0)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_what_is_asked_wrongly_is_one_line(looks: Any) -> None:
    for names, given, match in (
        (["clip_x"], looks, "no metric is called 'clip_x'; did you mean 'clip_"),
        (["fid"], looks, "no metric is called 'fid'; there are clip_t, clip_i"),
        (["dino"], {"clip": looks["clip"]}, "DINO looks with a backbone of kind 'dino'"),
        (["dino"], {"dino": looks["clip"]}, "DINO looks with a backbone of kind 'dino'"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            measure(names, SAMPLES, given)
        assert "\n" not in str(error.value)
    for single in ({"others": "a fish"}, {"references": CUP}, {"subjects": SAMPLES[0].subjects[0]}):
        with pytest.raises(ValueError, match=r"a sample's \w+ must be a list, even of one"):
            Sample(CUP, **single)
