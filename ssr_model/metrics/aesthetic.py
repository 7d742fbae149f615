"""LAION's aesthetic predictor V2 (sac+logos+ava1-l14-linearMSE), folded to one dot product.

It is a stack of linear layers without activations (768-1024-128-64-16-1) on the L2-normalised image
embedding of CLIP ViT-L/14: score = w . x + b. Weights of any such stack will do, for any CLIP with
a projection.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from ssr_model.metrics.backbones import ClipBackbone
from ssr_model.metrics.embeddings import Embeddings
from ssr_model.metrics.samples import Sample, Scores

PUBLISHED_MD5 = "b1047fd767a00134b8fd6529bf19521a"
_LAYER = re.compile(r"^layers\.(\d+)\.(weight|bias)$")


class AnotherFileError(ValueError):
    """The file is not the one that was asked for, by its MD5."""


class AestheticPredictor:
    """Image embeddings -> scores, about 1 to 10, higher is better; not bounded."""

    def __init__(self, state: Mapping[str, Tensor], width: int) -> None:
        """The predictor of a state dict, for embeddings of `width` values.

        Raises ValueError where they do not belong together; see `fold`.
        """
        weight, self.bias = fold(state, width)
        self.weight = weight.float()
        self.sha256 = fingerprint(state)

    @classmethod
    def load(cls, path: str | Path, width: int, md5: str | None = None) -> Self:
        """From a local .pth or .safetensors file; ValueError where it is no such predictor.

        md5: what the file must have; None = the published file's, for a .pth.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"{path}: no such file; give the predictor's .pth or .safetensors.")
        try:
            return cls(read_state(file.read_bytes(), file.suffix == ".safetensors", md5), width)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        self.weight = self.weight.to(device)
        return self

    def __call__(self, embeds: Tensor) -> Tensor:
        """Scores (B,) float32 of image embeddings (B, width) of any length but zero."""
        unit = torch.nn.functional.normalize(embeds.float(), dim=-1)
        return unit @ self.weight.to(unit.device) + self.bias


class AestheticScorer:
    """A CLIP, and the predictor that was trained on its image embeddings."""

    def __init__(self, clip: ClipBackbone, predictor: AestheticPredictor) -> None:
        self.clip, self.predictor = clip, predictor

    @classmethod
    def load(cls, weights: str | Path, clip: ClipBackbone, md5: str | None = None) -> Self:
        """With the predictor of a local file; see `AestheticPredictor.load`."""
        return cls(clip, AestheticPredictor.load(weights, clip.width, md5))

    def describe(self) -> dict[str, Any]:
        """What shapes the scores, as JSON."""
        return {**self.clip.describe(), "kind": "aesthetic", "predictor": self.predictor.sha256}


def aesthetic(
    samples: Sequence[Sample], scorer: AestheticScorer, seen: Embeddings | None = None
) -> Scores:
    """w . x + b of the normalised image embedding x; about 1 to 10, higher = liked better.

    It sees the picture alone: neither text nor reference.
    """
    seen = seen or Embeddings()
    embeds = seen.images(scorer.clip, [sample.image for sample in samples])
    parts = [[score] for score in scorer.predictor(embeds).tolist()]
    return Scores.of("aesthetic", parts, scorer.describe())


def read_state(data: bytes, safe: bool, md5: str | None = None) -> dict[str, Tensor]:
    """A predictor's state dict, from the bytes of a .pth or (`safe`) .safetensors file.

    md5: what the bytes must have; None = the published file's, for a .pth. No pickle is executed;
    another MD5, or bytes that are no state dict, are a ValueError.
    """
    wanted = md5 or (None if safe else PUBLISHED_MD5)
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if wanted is not None and found != wanted.lower():
        raise AnotherFileError(
            f"MD5 is {found}, not {wanted}: fetch the file again, unless these weights are meant"
        )
    try:
        if safe:
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return dict(state)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError,
            TypeError, EOFError) as error:  # fmt: skip
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"it holds no weights that can be read: {line}") from None


def fold(state: Mapping[str, Tensor], width: int) -> tuple[Tensor, float]:
    """A stack of linear layers as one: (w, b), float64 (width,) and a number.

    state: `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,), in the order of i.
    width: of the embedding that the first layer takes.
    Other names, or shapes that do not follow from one another, from `width` to one, are a
    ValueError.
    """
    odd = [name for name in state if not _LAYER.match(name)]
    numbers = sorted({int(found[1]) for name in state if (found := _LAYER.match(name))})
    names = {f"layers.{i}.{part}" for i in numbers for part in ("weight", "bias")}
    if odd or not numbers or names != set(state):
        wrong = sorted(odd or names ^ set(state)) or ["no layer"]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            "the weights are not those of a predictor (layers.<i>.weight and .bias): "
            f"{wrong[0]:.80}{more} is odd"
        )
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for i in numbers:
        own, own_bias = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        if own.ndim != 2 or own.shape[1] != len(bias) or own_bias.shape != own.shape[:1]:
            what = "the CLIP's projection" if i == numbers[0] else "the layer before it"
            raise ValueError(
                f"layer {i} takes {tuple(own.shape)[-1]} values, but {what} gives {len(bias)}; use "
                "the CLIP that the predictor was trained on"
            )
        weight, bias = own @ weight, own @ bias + own_bias
    if len(bias) != 1:
        raise ValueError(f"the weights give {len(bias)} values an image; a score is one")
    return weight[0], float(bias[0])


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of the layers as they are stored: neither of the file's kind, nor of any arithmetic,
    whose last bits are each machine's own.
    """
    digest = hashlib.sha256()
    for name in sorted(state, key=_place):
        values = state[name].detach().to(torch.float32).contiguous().numpy().astype("<f4")
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _place(name: str) -> tuple[int, str]:
    found = _LAYER.match(name)
    return (int(found[1]) if found else 0, name)
