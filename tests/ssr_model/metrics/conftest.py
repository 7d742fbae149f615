"""The tiny models as backbones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssr_model.metrics import ClipBackbone, DinoBackbone, load_clip, load_dino


@pytest.fixture(scope="session")
def clip(tiny_models: Path) -> ClipBackbone:
    return load_clip(str(tiny_models / "clip"), name="clip")


@pytest.fixture(scope="session")
def dino(tiny_models: Path) -> DinoBackbone:
    return load_dino(str(tiny_models / "dino"), name="dino")


@pytest.fixture(scope="session")
def dinov2(tiny_models: Path) -> DinoBackbone:
    return load_dino(str(tiny_models / "dinov2"), name="dinov2")
