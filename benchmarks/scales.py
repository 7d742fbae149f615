"""What do CLIP's other scales know of a subject that the last one does not? On the mini world.

For held-out scenes of two subjects, the hidden states of the mini CLIP are averaged over the
patches that a subject covers, and linear probes (ridge) read off them what the subject's class does
not say: its two colours (R2 over RGB) and whether it is plain or striped. If a probe of all scales
is hardly better than one of the last, an encoder that uses them has little to gain.

    python benchmarks/scales.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline import models
from pipeline.miniworld import world
from pipeline.progress import quiet_libraries
from ssr_model.vision import vision_features

CLIP = "miniworld:clip"
DEPTHS = (2, 4, 6)
Array = NDArray[np.float64]


@torch.no_grad()
def subjects(split: world.Split, scenes: int) -> tuple[dict[int, Array], Array, Array]:
    """Of each subject: states {depth: (n, width)}, both colours (n, 6), striped (n,)."""
    vision, processor = models.load_vision(CLIP), models.load_image_processor(CLIP)
    states: dict[int, list[Array]] = {depth: [] for depth in DEPTHS}
    colours, striped = [], []
    for seed in range(scenes):
        scene = world.scene(seed, split, 2)
        pixels = processor(Image.fromarray(world.render(scene)), return_tensors="pt").pixel_values
        found = vision_features(vision, pixels, DEPTHS)
        side = round((found[DEPTHS[0]].shape[1] - 1) ** 0.5)
        for spec, mask in zip(scene.subjects, world.masks(scene), strict=True):
            cover = torch.from_numpy(mask).float()[None]
            share = torch.nn.functional.adaptive_avg_pool2d(cover, (side, side)).flatten()
            for depth in DEPTHS:
                patches = found[depth][0, 1:]
                states[depth].append((share @ patches / share.sum()).double().numpy())
            colours.append(np.concatenate(spec.palette))
            striped.append(spec.identity.texture == "striped")
    return {d: np.stack(s) for d, s in states.items()}, np.array(colours, float), np.array(striped)


def ridge(inputs: Array, targets: Array) -> Callable[[Array], Array]:
    """A linear probe with unit weight decay on standardised inputs."""
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6

    def given(values: Array) -> Array:
        return np.column_stack([(values - mean) / deviation, np.ones(len(values))])

    x = given(inputs)
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ targets)
    return lambda values: given(values) @ weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", type=int, default=1500, help="scenes for the probes (1500)")
    parser.add_argument("--test", type=int, default=400, help="held-out scenes (400)")
    asked = parser.parse_args()
    quiet_libraries()
    x, y, striped = subjects("train", asked.train)
    held_x, held_y, held_striped = subjects("bench", asked.test)
    total = ((held_y - held_y.mean(0)) ** 2).reshape(-1, 2, 3).sum((0, 2))
    print("| scales | main colour, R2 | second colour, R2 | plain or striped, share right |")
    print("| --- | ---: | ---: | ---: |")
    for depths in (*((d,) for d in DEPTHS), DEPTHS):
        inputs = np.concatenate([x[d] for d in depths], axis=1)
        held = np.concatenate([held_x[d] for d in depths], axis=1)
        gaps = (ridge(inputs, y)(held) - held_y) ** 2
        main_r2, second_r2 = 1 - gaps.reshape(-1, 2, 3).sum((0, 2)) / total
        right = ridge(inputs, striped[:, None].astype(float))(held)[:, 0] > 0.5
        texture = (right == held_striped).mean()
        name = "all" if len(depths) > 1 else f"{depths[0]}" + (" (last)" * (depths == DEPTHS[-1:]))
        print(f"| {name} | {main_r2:.2f} | {second_r2:.2f} | {texture:.2f} |")
    print(f"\nalways the commoner texture: {max(held_striped.mean(), 1 - held_striped.mean()):.2f}")


if __name__ == "__main__":
    main()
