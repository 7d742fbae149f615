"""Does a subject stay in its region? On the mini world, whose judge names the class of a pixel.

Held-out references with two subjects, A and B. Two questions, each with the same noise:

- one subject, "A on a ground": no region, the left half, the right half;
- both, "A and B on a ground": no regions, A left and B right, A right and B left.

Told for each: how often A (and B) is there, by its class; and of its pixels in the left and in the
right half the mean RGB distance to its palette, which no text tells of: small where the subject
acts, that of a stranger (about 150) where it does not.

    python benchmarks/regions.py --picture docs/regions.png        # after make demo
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline import models
from pipeline.config import GenerateConfig
from pipeline.evaluation.benches import MiniReference, MiniSubject, mini_bench
from pipeline.generation.grid import enlarge
from pipeline.generation.sampler import Sampler
from pipeline.miniworld.judge import PRESENT_PIXELS, Judge, palette_distance
from pipeline.miniworld.world import CLASSES
from ssr_model import Subject

BATCH, CELL, LEAST_PIXELS = 10, 96, 8
LEFT = np.zeros((2, 2), bool)
LEFT[:, 0] = True
# what is asked: (title, the regions of A and of B; one of them = A alone)
ASKED: list[tuple[str, list[np.ndarray | None]]] = [
    ("A", [None]),
    ("A, left", [LEFT]),
    ("A, right", [~LEFT]),
    ("A and B", [None, None]),
    ("A left, B right", [LEFT, ~LEFT]),
    ("A right, B left", [~LEFT, LEFT]),
]


def draw(
    sampler: Sampler, references: list[MiniReference], regions: list[np.ndarray | None]
) -> list[Image.Image]:
    """One picture of each reference; its seed is its place."""
    pictures: list[Image.Image] = []
    for first in range(0, len(references), BATCH):
        batch = references[first : first + BATCH]
        subjects, prompts = [], []
        for reference in batch:
            asked = list(zip(reference.subjects, regions, strict=False))
            subjects.append([Subject(reference.image, s.query, region=r) for s, r in asked])
            prompts.append(" and ".join(s.phrase for s, _ in asked) + f" on {reference.ground}")
        seeds = range(first, first + len(batch))
        pictures += sampler.draw(prompts, list(seeds), subjects)
    return pictures


def measure(
    pictures: list[Image.Image], subjects: list[MiniSubject], judge: Judge
) -> tuple[float, float, float]:
    """(share of pictures with the subject's class, distance to its palette left, and right)."""
    arrays = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    labels = judge.segment(torch.from_numpy(arrays / 255).permute(0, 3, 1, 2)).numpy()
    middle, present = arrays.shape[2] // 2, 0
    halves: tuple[list[float], list[float]] = ([], [])
    for pixels, label, subject in zip(arrays, labels, subjects, strict=True):
        found = label == 1 + list(CLASSES).index(subject.name)
        if found.sum() < PRESENT_PIXELS:
            continue
        present += 1
        for half, columns in zip(halves, (slice(middle), slice(middle, None)), strict=True):
            inside = found[:, columns]
            if inside.sum() >= LEAST_PIXELS:
                half.append(palette_distance(pixels[:, columns][inside], subject.palette))
    left, right = (float(np.mean(half)) if half else float("nan") for half in halves)
    return present / len(pictures), left, right


def main() -> None:
    """Draw, judge, print; and write the picture, if asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="runs/mini/model", help="trained encoder (default: runs/mini/model)"
    )
    parser.add_argument("--references", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--picture", help="where to write a grid of the first six (default: none)")
    args = parser.parse_args()
    cfg = GenerateConfig(guidance_rescale=0.7)
    sampler = Sampler.load(args.model, cfg, cfg)
    judge = Judge.load(models.resolve("miniworld:judge"))
    two_classes = [
        r for r in mini_bench(args.references, sampler.side)
        if r.subjects[0].name != r.subjects[1].name
    ]  # fmt: skip
    drawn = {title: draw(sampler, two_classes, regions) for title, regions in ASKED}
    print(
        f"{datetime.now(UTC):%Y-%m-%d}; {len(two_classes)} held-out references of two classes, "
        f"{cfg.steps} steps, guidance {cfg.guidance:g} rescaled by {cfg.guidance_rescale:g}\n"
    )
    print("| asked | of | present | distance, left half | right half |")
    print("| --- | --- | ---: | ---: | ---: |")
    for title, regions in ASKED:
        for place, name in enumerate("AB"[: len(regions)]):
            subjects = [r.subjects[place] for r in two_classes]
            present, left, right = measure(drawn[title], subjects, judge)
            print(f"| {title} | {name} | {present:.2f} | {left:.0f} | {right:.0f} |")
    if args.picture:
        write_grid(Path(args.picture), two_classes[:6], drawn)
        print(f"\nwrote {args.picture}")


def write_grid(
    path: Path, references: list[MiniReference], drawn: dict[str, list[Image.Image]]
) -> None:
    """References and what was drawn, under titles; a line marks the halves where they count."""
    wide, high = CELL + 8, CELL + 22
    sheet = Image.new("RGB", (wide * (1 + len(ASKED)) + 8, high * len(references) + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(["reference", *drawn]):
        pen.text((8 + column * wide, 8), title, "black")
        for row, reference in enumerate(references):
            x, y = 8 + column * wide, 24 + row * high
            picture = drawn[title][row] if column else reference.image
            sheet.paste(enlarge(picture, CELL), (x, y))
            if not column:
                names = [subject.name for subject in reference.subjects]
                pen.text((x, y + CELL + 2), f"A {names[0]}, B {names[1]}", "black")
            if "left" in title or "right" in title:
                pen.line((x + CELL // 2, y, x + CELL // 2, y + CELL - 1), "white")
    sheet.save(path)


if __name__ == "__main__":
    main()
