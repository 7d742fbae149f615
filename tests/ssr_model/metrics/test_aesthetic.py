"""The folded predictor, its file, and the score as a metric."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssr_model.metrics import AestheticPredictor, AestheticScorer, ClipBackbone, Sample
from ssr_model.metrics.aesthetic import PUBLISHED_MD5, aesthetic, fold
from tests.aesthetic_weights import WIDTH, layer_by_layer, state
from tests.ssr_model.metrics.pictures import drawing


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.pth"
    torch.save(state(), path)
    return path


def test_folding_is_the_layers_one_by_one() -> None:
    weight, bias = fold(state(), WIDTH)
    embeds = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    folded = (embeds @ weight + bias).float()
    torch.testing.assert_close(folded, layer_by_layer(embeds.float()), rtol=1e-4, atol=1e-3)


def test_the_embeddings_length_does_not_count() -> None:
    predictor = AestheticPredictor(state(), WIDTH)
    embeds = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = layer_by_layer(embeds / embeds.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(predictor(embeds), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(predictor(embeds * 20), predictor(embeds))


def test_the_metric(clip: ClipBackbone, weights: Path) -> None:
    """Pinned, and the layers one by one on the normalised image embedding."""
    scorer = AestheticScorer.load(weights, clip, md5(weights))
    pictures = [drawing("green", "red")[0], drawing("purple", "orange", size=(40, 40))[0]]
    scores = aesthetic([Sample(picture) for picture in pictures], scorer)
    expected = layer_by_layer(clip.images(pictures)).numpy()
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(scores.values, [-214.3986, -156.4600], rtol=1e-3)
    assert scores.backbone == {
        **clip.describe(),
        "kind": "aesthetic",
        "predictor": AestheticPredictor(state(), WIDTH).sha256,
    }
    assert aesthetic([], scorer).values.shape == (0,)


def test_only_the_published_file_is_taken_unless_told(
    weights: Path, clip: ClipBackbone, tmp_path: Path
) -> None:
    found = md5(weights)
    with pytest.raises(ValueError, match=f"MD5 is {found}, not {PUBLISHED_MD5}") as error:
        AestheticScorer.load(weights, clip)
    assert str(weights) in str(error.value)
    told = AestheticPredictor.load(weights, WIDTH, found.upper())
    safe = tmp_path / "predictor.safetensors"
    save_file(state(), safe)
    # the same numbers in another file are the same predictor
    assert AestheticPredictor.load(safe, WIDTH).sha256 == told.sha256
    with pytest.raises(ValueError, match="MD5"):
        AestheticPredictor.load(safe, WIDTH, PUBLISHED_MD5)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_files_that_are_no_weights_are_one_line_and_execute_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"layers.0.weight": Evil()}, path)
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:40])
    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    for name in ("evil.pth", "cut.pth", "cut.safetensors"):
        file = tmp_path / name
        with pytest.raises(ValueError, match="no weights that can be read") as caught:
            AestheticPredictor.load(file, WIDTH, md5(file))
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no such file"):
        AestheticPredictor.load(tmp_path / "absent.pth", WIDTH)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (state({0: (8, WIDTH + 1), 2: (1, 8)}), r"layer 0 takes 33 values, .* projection gives 32"),
        (state({0: (8, WIDTH), 2: (1, 9)}), r"layer 2 takes 9 values, .* before it gives 8"),
        (state({0: (8, WIDTH), 2: (2, 8)}), "give 2 values an image"),
        ({"fc.weight": torch.ones(1, WIDTH)}, r"fc\.weight is odd"),
        ({"layers.0.weight": torch.ones(1, WIDTH)}, r"layers\.0\.bias is odd"),
        ({}, "no layer is odd"),
    ],
)
def test_weights_of_another_shape_are_refused(given: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fold(given, WIDTH)
