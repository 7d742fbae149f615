"""What the tests of training share: a curated root, and workers that start fast."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.sealed import write_features

# Workers fork from one process that has imported what they need.
multiprocessing.set_forkserver_preload(["diffusers", "transformers", "pipeline.training.loop"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The tiny models are too small to share out; idle threads would only spin."""
    torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path: Path, tiny_models: Path) -> Path:
    """A fresh curated root."""
    write_features(tmp_path / "run", tiny_models)
    return tmp_path / "run"
