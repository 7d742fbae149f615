"""What the tests of jobs/generate.py share: tiny models, an untrained encoder, photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import GenerateConfig, ModelsConfig
from pipeline.generation import png, studio
from pipeline.progress import Progress
from pipeline.storage import Storage
from tests.untrained import save_encoder


def write_encoder(root: Path, parts: ModelsConfig) -> Path:
    """root, with an untrained SSR-Encoder under model/."""
    save_encoder(root / "model", parts)
    return root


def write_photos(folder: Path) -> tuple[str, str]:
    """Paths of a photo, 90x60 of noise, and of a mask of it."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))
    photo.save(folder / "cup.jpg")
    mask = Image.new("L", photo.size)
    mask.paste(255, (30, 10, 60, 50))
    mask.save(folder / "mask.png")
    return str(folder / "cup.jpg"), str(folder / "mask.png")


def config(root: Path, parts: ModelsConfig, **settings: object) -> GenerateConfig:
    given = {"references": 2, "steps": 2, "device": "cpu", **settings}
    return GenerateConfig(root=str(root), models=parts, **given)  # type: ignore[arg-type]


def draw(cfg: GenerateConfig, storage: Storage | None = None) -> studio.Made:
    return studio.generate(cfg, storage or Storage(cfg.root), Progress(terminal=False))


def pixels(path: Path) -> np.ndarray:
    """(h, w, 3) int, so that differences do not wrap."""
    return np.asarray(Image.open(path), int)


def recipe(path: Path) -> dict[str, object]:
    """What a picture says of how it was made."""
    said = png.made_by(path.read_bytes())
    assert said is not None
    return said["recipe"]  # type: ignore[no-any-return]
