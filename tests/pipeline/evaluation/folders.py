"""Small benches of every folder layout, with real pictures and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OWN_TEXT = """Classes

subject_name,class
my_cup,cup
my_dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
"a {0} {1} that's wearing a hat".format(unique_token, class_token),
]
"""

BENCH: dict[str, Any] = {
    "version": 1,
    "references": [
        {
            "key": "kitchen",
            "images": ["kitchen.jpg"],
            "subjects": [
                {"name": "cup", "masks": ["masks/cup.png"]},
                {"name": "teapot", "phrase": "a blue teapot", "masks": ["masks/teapot.png"]},
                "apple",
            ],
            "requests": [
                {"subjects": ["cup"], "prompts": ["a cup on snow", "a cup on the beach"]},
                {"subjects": ["teapot", "cup"], "prompts": ["a blue teapot and a cup on a rug"]},
            ],
        },
        {
            "key": "dog.1",
            "images": ["dog-1.png", "dog-2.jpg"],
            "subjects": [{"name": "dog", "masks": [None, "masks/dog.png"]}],
            "requests": [{"subjects": ["dog"], "prompts": ["a dog on the moon"]}],
        },
    ],
}

SCENES: dict[str, Any] = {
    "version": 1,
    "scenes": {
        "creature": {
            "subjects": ["creature", "bowl", {"name": "stone", "phrase": "an old stone"}],
            "prompts": ["a photo of <asset0> at the beach", "<asset2> and <asset1>, in oil"],
        },
        "birds": {"subjects": ["owl", "robin"], "prompts": ["a drawing of <asset0>"]},
    },
}


def write_picture(path: Path, size: tuple[int, int] = (24, 16), colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, 80, 160)).save(path)


def write_mask(path: Path, column: int = 0, size: tuple[int, int] = (24, 16)) -> None:
    """White in four columns from `column`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[:, column : column + 4] = 255
    Image.fromarray(pixels).save(path)


def write_dreambench(folder: Path, text: str, images: int = 4) -> Path:
    """The published layout, in `folder`/dataset."""
    dataset = folder / "dataset"
    dataset.mkdir(parents=True)
    (dataset / "prompts_and_classes.txt").write_text(text)
    (dataset / "references_and_licenses.txt").write_text("Photos taken by nobody")
    rows = text.partition("subject_name,class")[2].partition("Prompts")[0].split("\n")
    for number, row in enumerate(filter(None, rows)):
        for image in range(images):
            name = row.partition(",")[0]
            write_picture(dataset / name / f"{image:02d}.jpg", colour=40 * image + number)
    return folder


def write_multi_subject(folder: Path, bench: Any = BENCH) -> Path:
    for number, name in enumerate(("kitchen.jpg", "dog-1.png", "dog-2.jpg")):
        write_picture(folder / name, colour=100 * number)
    for number, name in enumerate(("cup", "teapot", "dog")):
        write_mask(folder / f"masks/{name}.png", column=6 * number)
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


def write_break_a_scene(folder: Path, scenes: Any = SCENES) -> Path:
    for name, masks in (("creature", 3), ("birds", 2)):
        write_picture(folder / name / "img.jpg")
        for number in range(masks):
            write_mask(folder / name / f"mask{number}.png", column=6 * number)
    (folder / "scenes.json").write_text(json.dumps(scenes))
    return folder
