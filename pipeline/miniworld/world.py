"""The mini world's scenes: procedural pictures of one to three nameable subjects on a ground.

A subject's class is what its caption names; its *identity* (two colours, texture, proportions,
where the second colour sits) is what only a picture shows. Everything is a function of
(split, seed), so captions, masks and palettes are exact, and the splits never share a scene.

Coordinates: a scene is laid out in the unit square, y down; a subject is drawn in its own
frame, u and v in [-1, 1], from two boolean shapes: the main part and the second part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["foundation", "train", "val", "bench"]
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]

SPLITS: tuple[Split, ...] = ("foundation", "train", "val", "bench")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 36),
    "orange": (252, 138, 18),
    "yellow": (250, 222, 40),
    "green": (38, 176, 58),
    "cyan": (36, 204, 208),
    "blue": (44, 70, 226),
    "purple": (140, 48, 204),
    "pink": (252, 112, 184),
    "white": (252, 252, 252),
    "black": (22, 22, 28),
}

TEXTURES = ("plain", "striped")
SUPERSAMPLE = 4  # sub-pixels per pixel side at small sizes


def _ellipse(u: Floats, v: Floats, cu: float, cv: float, ru: float, rv: float) -> Bools:
    return ((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 <= 1.0


def _box(u: Floats, v: Floats, left: float, top: float, right: float, bottom: float) -> Bools:
    return (u >= left) & (u <= right) & (v >= top) & (v <= bottom)


def _fish(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    body = _ellipse(u, v, 0.2, 0.0, 0.78, 0.58)
    tail = (u < -0.35) & (u > -1.0) & (np.abs(v) < -(u + 0.35) * 1.0 + 0.08)
    fin = (np.abs(u - 0.15) < 0.3) & (v < -0.45) & (v > -0.9) & (v > -1.0 + np.abs(u - 0.15))
    return body, (tail | fin) & ~body


def _tree(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    crown = (v < 0.45) & (np.abs(u) < (v + 1.0) * 0.6)
    return crown, _box(u, v, -0.2, 0.45, 0.2, 1.0)


def _house(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    door = _box(u, v, -0.2, 0.45, 0.2, 1.0)
    walls = _box(u, v, -0.72, -0.12, 0.72, 1.0) & ~door
    roof = (v >= -1.0) & (v < -0.12) & (np.abs(u) < (v + 1.0) * 1.14)
    return walls, roof | door


def _cup(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    body = _box(u, v, -0.8, -0.75, 0.35, 0.9)
    rim = _box(u, v, -0.8, -0.75, 0.35, -0.45)
    handle = _ellipse(u, v, 0.4, 0.1, 0.58, 0.55) & ~_ellipse(u, v, 0.4, 0.1, 0.28, 0.26)
    return body & ~rim, rim | (handle & ~body)


def _star(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    angle = np.arctan2(u, -v)
    radius = np.hypot(u, v)
    wedge = np.abs((angle / (2 * np.pi / 5) + 0.5) % 1.0 - 0.5) * 2.0  # 0 at a tip, 1 between tips
    star = radius < 1.05 - 0.66 * wedge
    heart = radius < 0.34
    return star & ~heart, heart


def _car(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    wheels = _ellipse(u, v, -0.52, 0.55, 0.3, 0.36) | _ellipse(u, v, 0.52, 0.55, 0.3, 0.36)
    cabin = _box(u, v, -0.5, -0.65, 0.45, 0.0)
    window = _box(u, v, -0.28, -0.42, 0.22, -0.1)
    body = _box(u, v, -1.0, -0.1, 1.0, 0.5) | cabin
    return body & ~wheels & ~window, wheels | window


def _mushroom(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    cap = _ellipse(u, v, 0.0, 0.05, 0.98, 1.0) & (v < 0.05)
    return cap, _box(u, v, -0.28, 0.05, 0.28, 1.0)


def _boat(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    hull = (v > 0.35) & (v < 0.95) & (np.abs(u) < 1.0 - (v - 0.35) * 0.65)
    sail = (v > -1.0) & (v <= 0.22) & (u > -0.12) & (u < 0.72 * (v + 1.0) / 1.22)
    mast = _box(u, v, -0.24, -1.0, -0.1, 0.36)
    return hull, sail | mast


def _key(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    ring = _ellipse(u, v, -0.55, 0.0, 0.45, 0.6) & ~_ellipse(u, v, -0.55, 0.0, 0.18, 0.24)
    shaft = _box(u, v, -0.12, -0.16, 1.0, 0.16)
    teeth = _box(u, v, 0.4, 0.0, 0.6, 0.62) | _box(u, v, 0.8, 0.0, 1.0, 0.62)
    return ring, (shaft | teeth) & ~ring


def _flower(u: Floats, v: Floats) -> tuple[Bools, Bools]:
    w = v + 0.3
    angle = np.arctan2(w, u)
    petals = np.hypot(u / 0.96, w / 0.7) < 0.8 + 0.2 * np.cos(5 * angle + 0.5)
    heart = _ellipse(u, v, 0.0, -0.3, 0.24, 0.22)
    stem = _box(u, v, -0.1, 0.1, 0.1, 1.0) & ~petals
    return petals & ~heart, heart | stem


SHAPES: dict[str, Callable[[Floats, Floats], tuple[Bools, Bools]]] = {
    "fish": _fish,
    "tree": _tree,
    "house": _house,
    "cup": _cup,
    "star": _star,
    "car": _car,
    "mushroom": _mushroom,
    "boat": _boat,
    "key": _key,
    "flower": _flower,
}
CLASSES = tuple(SHAPES)


def _sand(x: Floats, y: Floats) -> Floats:
    return 0.5 + 0.5 * np.sin(9 * x + 31 * y + 2.0 * np.sin(7 * x))


def _grass(x: Floats, y: Floats) -> Floats:
    return 0.5 + 0.5 * np.sin(44 * x + 3.0 * np.sin(5 * y))


def _water(x: Floats, y: Floats) -> Floats:
    return (np.sin(26 * y + 2.4 * np.sin(12 * x)) > 0.35).astype(np.float32)


def _snow(x: Floats, y: Floats) -> Floats:
    return 0.5 + 0.5 * np.sin(5 * x + 3 * y)


def _brick(x: Floats, y: Floats) -> Floats:
    row = np.floor(y * 5)
    joint = ((y * 5) % 1.0 < 0.2) | ((x * 3 + 0.5 * (row % 2)) % 1.0 < 0.12)
    return joint.astype(np.float32)


def _stone(x: Floats, y: Floats) -> Floats:
    return (((x * 4) % 1.0 < 0.1) | ((y * 4) % 1.0 < 0.1)).astype(np.float32)


# name -> (pattern in [0, 1], colour at 0, colour at 1); dull, so that subjects stand out
GROUNDS: dict[str, tuple[Callable[[Floats, Floats], Floats], tuple[int, ...], tuple[int, ...]]] = {
    "sand": (_sand, (224, 198, 150), (206, 178, 128)),
    "grass": (_grass, (110, 150, 84), (84, 124, 64)),
    "water": (_water, (96, 142, 176), (132, 172, 200)),
    "snow": (_snow, (232, 236, 244), (214, 222, 234)),
    "brick": (_brick, (160, 98, 80), (190, 160, 146)),
    "stone": (_stone, (138, 138, 142), (104, 104, 110)),
}


@dataclass(frozen=True)
class Identity:
    """What a picture shows of a subject and its class name does not say."""

    main: str
    second: str
    texture: str
    stripes: int
    """Stripes across the subject, 2 or 3 (texture "striped" only)."""
    phase: float
    """Offset of the stripes, in stripes, [0, 1)."""
    upright: bool
    """Stripes run from top to bottom, not from left to right."""
    aspect: float
    """Width over height of the subject's frame, 0.8 to 1.25."""
    mirrored: bool


@dataclass(frozen=True)
class SubjectSpec:
    """One subject of a scene: its class, identity and place (unit square)."""

    cls: str
    identity: Identity
    cx: float
    cy: float
    size: float
    """Side of the square frame before `aspect`, as a share of the picture."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """RGB of the main and the second colour, 0-255."""
        return COLOURS[self.identity.main], COLOURS[self.identity.second]

    @property
    def half_extent(self) -> tuple[float, float]:
        """Half width and half height, shares of the picture."""
        stretch = self.identity.aspect**0.5
        return 0.5 * self.size * stretch, 0.5 * self.size / stretch


@dataclass(frozen=True)
class Scene:
    subjects: tuple[SubjectSpec, ...]
    ground: str
    phase: tuple[float, float]
    """Offset of the ground's pattern, [0, 1) each."""


_SIZES = {1: (0.5, 0.74), 2: (0.42, 0.52), 3: (0.33, 0.4)}
_COUNT_SHARES = (0.4, 0.45, 0.15)


def scene(seed: int, split: Split, subjects: int | None = None) -> Scene:
    """The scene of a seed in a split; `subjects` fixes how many (1-3), none draws it.

    Classes and colours never repeat within a scene, so a palette tells its subjects apart.
    """
    rng = np.random.default_rng([SPLITS.index(split), seed])
    count = subjects or int(rng.choice([1, 2, 3], p=_COUNT_SHARES))
    classes = rng.choice(len(CLASSES), size=count, replace=False)
    colours = rng.choice(len(COLOURS), size=2 * count, replace=False)
    names = list(COLOURS)
    placed: list[SubjectSpec] = []
    while len(placed) < count:
        placed = []
        for index in range(count):
            identity = Identity(
                main=names[colours[2 * index]],
                second=names[colours[2 * index + 1]],
                texture=TEXTURES[int(rng.random() < 0.4)],
                stripes=int(rng.integers(2, 4)),
                phase=float(rng.random()),
                upright=bool(rng.random() < 0.5),
                aspect=float(np.exp(rng.uniform(np.log(0.8), np.log(1.25)))),
                mirrored=bool(rng.random() < 0.5),
            )
            spec = _place(CLASSES[classes[index]], identity, placed, count, rng)
            if spec is None:
                break
            placed.append(spec)
    ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
    return Scene(tuple(placed), ground, (float(rng.random()), float(rng.random())))


def _place(
    cls: str,
    identity: Identity,
    others: list[SubjectSpec],
    count: int,
    rng: np.random.Generator,
) -> SubjectSpec | None:
    """A frame inside the picture that overlaps no other; None when 30 draws find no room."""
    for _ in range(30):
        size = float(rng.uniform(*_SIZES[count]))
        stretch = identity.aspect**0.5
        hx, hy = 0.5 * size * stretch, 0.5 * size / stretch
        cx, cy = float(rng.uniform(hx, 1 - hx)), float(rng.uniform(hy, 1 - hy))
        gap = 0.03
        if all(
            abs(cx - o.cx) > hx + o.half_extent[0] + gap
            or abs(cy - o.cy) > hy + o.half_extent[1] + gap
            for o in others
        ):
            return SubjectSpec(cls, identity, cx, cy, size)
    return None


def _frame(size: tuple[int, int], sub: int) -> tuple[Floats, Floats]:
    """x (1, w*sub) and y (h*sub, 1) of sub-pixel centres; the central square spans [0, 1]."""
    width, height = size
    side = min(size)
    x = ((np.arange(width * sub) + 0.5) / sub - (width - side) / 2) / side
    y = ((np.arange(height * sub) + 0.5) / sub - (height - side) / 2) / side
    return x.astype(np.float32)[None, :], y.astype(np.float32)[:, None]


def _local(spec: SubjectSpec, x: Floats, y: Floats) -> tuple[slice, slice, Floats, Floats]:
    """The slices of the picture that hold the subject, and u, v there."""
    hx, hy = spec.half_extent
    columns = np.nonzero(np.abs(x[0] - spec.cx) <= hx)[0]
    rows = np.nonzero(np.abs(y[:, 0] - spec.cy) <= hy)[0]
    across, down = slice(columns[0], columns[-1] + 1), slice(rows[0], rows[-1] + 1)
    u = np.broadcast_to((x[:, across] - spec.cx) / hx, (len(rows), len(columns)))
    v = np.broadcast_to((y[down] - spec.cy) / hy, (len(rows), len(columns)))
    return down, across, -u if spec.identity.mirrored else u, v


def _subsamples(size: tuple[int, int]) -> int:
    return SUPERSAMPLE if min(size) <= 48 else 2


def render(scene: Scene, size: tuple[int, int] = (32, 32)) -> NDArray[np.uint8]:
    """The picture, uint8 (h, w, 3), anti-aliased; `size` = (w, h), the scene its centre square."""
    sub = _subsamples(size)
    x, y = _frame(size, sub)
    pattern, dark, light = GROUNDS[scene.ground]
    tone = np.asarray(pattern(x + scene.phase[0], y + scene.phase[1]), np.float32)
    tone = np.broadcast_to(tone, (y.shape[0], x.shape[1]))[..., None]
    base, step = np.array(dark, np.float32), np.array(light, np.float32) - np.array(dark)
    image = base + tone * step.astype(np.float32)
    for spec in scene.subjects:
        down, across, u, v = _local(spec, x, y)
        main, second = SHAPES[spec.cls](u, v)
        if spec.identity.texture == "striped":
            along = u if spec.identity.upright else v
            stripe = ((along * 0.5 + 0.5) * spec.identity.stripes + spec.identity.phase) % 1.0
            band = main & (stripe < 0.42)
            main, second = main & ~band, second | band
        patch = image[down, across]
        patch[main] = spec.palette[0]
        patch[second] = spec.palette[1]
    height, width = size[1], size[0]
    small = image.reshape(height, sub, width, sub, 3).mean(axis=(1, 3))
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)


def masks(scene: Scene, size: tuple[int, int] = (32, 32)) -> Bools:
    """Exact masks, bool (subjects, h, w): pixels that the subject covers by more than half."""
    sub = _subsamples(size)
    x, y = _frame(size, sub)
    out = np.zeros((len(scene.subjects), y.shape[0], x.shape[1]), np.float32)
    for index, spec in enumerate(scene.subjects):
        down, across, u, v = _local(spec, x, y)
        main, second = SHAPES[spec.cls](u, v)
        out[index, down, across] = main | second
    shape = (len(scene.subjects), size[1], sub, size[0], sub)
    return out.reshape(shape).mean(axis=(2, 4)) > 0.5


def phrase(spec: SubjectSpec, attributes: bool) -> str:
    """A noun phrase: "a cup", or with attributes "a red and white striped cup"."""
    words = spec.cls
    if attributes:
        texture = "striped " if spec.identity.texture == "striped" else ""
        words = f"{spec.identity.main} and {spec.identity.second} {texture}{spec.cls}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene, attributes: bool = False, rng: np.random.Generator | None = None) -> str:
    """A sentence that names every subject and the ground.

    With `attributes` and a generator each subject names its appearance with probability 0.7
    and the order of the subjects is shuffled; with `attributes` alone every subject does.
    """
    order = list(scene.subjects)
    if rng is not None:
        order = [order[i] for i in rng.permutation(len(order))]
    parts = [phrase(s, attributes and (rng is None or rng.random() < 0.7)) for s in order]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{listed} on {scene.ground}"
