"""The judge: an independent segmenter that metrics use and nothing is ever conditioned on.

A small convolutional net that names the class of every pixel. Presence and place of a subject,
and the pixels whose colours are compared with a palette, all follow from its map.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from pipeline.miniworld import world

PRESENT_PIXELS = 20  # of 32 x 32; the smallest subject covers about 35


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.norm(self.second(functional.relu(self.first(x)))))


class Judge(nn.Module):
    """Pictures float (n, 3, 32, 32) in [0, 1] -> logits (n, 1 + classes, 32, 32); 0 = ground."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.down = nn.ModuleList(
            [_Block(3, width), _Block(width, 2 * width), _Block(2 * width, 4 * width)]
        )
        self.middle = _Block(4 * width, 4 * width)
        self.up = nn.ModuleList(
            [_Block(8 * width, 2 * width), _Block(4 * width, width), _Block(2 * width, width)]
        )
        self.head = nn.Conv2d(width, 1 + len(world.CLASSES), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, skips = images * 2.0 - 1.0, []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skip], dim=1))
        return self.head(x)

    @torch.no_grad()
    def segment(self, images: torch.Tensor) -> torch.Tensor:
        """Class map int64 (n, 32, 32): 0 the ground, i + 1 = CLASSES[i]."""
        return self(images).argmax(dim=1)

    def present(self, images: torch.Tensor) -> torch.Tensor:
        """bool (n, classes): the class covers at least PRESENT_PIXELS pixels."""
        labels = self.segment(images)
        counts = functional.one_hot(labels, 1 + len(world.CLASSES)).sum(dim=(1, 2))[:, 1:]
        return counts >= PRESENT_PIXELS

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        half = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(half, folder / "model.safetensors")
        config = {"width": self.width, "classes": list(world.CLASSES)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Judge:
        """The shipped judge; raises ValueError when it was trained for other classes."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        if config["classes"] != list(world.CLASSES):
            raise ValueError(f"{folder}: the judge knows other classes than the mini world has")
        judge = cls(config["width"])
        judge.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        )
        return judge.eval()


def palette_distance(
    pixels: NDArray[np.float32], palette: tuple[tuple[int, int, int], ...]
) -> float:
    """Mean distance of RGB pixels (n, 3), 0-255, to a palette's nearest colour; inf for none."""
    if len(pixels) == 0:
        return float("inf")
    gaps = pixels[:, None, :] - np.array(palette, np.float32)[None]
    return float(np.sqrt((gaps**2).sum(-1)).min(axis=1).mean())


def named_colours(pixels: NDArray[np.float32], share: float = 0.12) -> set[str]:
    """The world's colours that at least `share` of the pixels (n, 3), 0-255, are nearest to."""
    if len(pixels) == 0:
        return set()
    table = np.array(list(world.COLOURS.values()), np.float32)
    nearest = ((pixels[:, None, :] - table[None]) ** 2).sum(-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(table)) / len(pixels)
    return {name for name, part in zip(world.COLOURS, counts, strict=True) if part >= share}
