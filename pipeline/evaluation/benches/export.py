"""A bench for other tools: its references, masks and requests as files that anything can read.

    requests.jsonl              one request a line:
      {"key": ..., "prompt": ..., "seed": ..., "picture": "<key>.png",
       "selections": [{"reference": ..., "query": "cup", "phrase": "a cup",
                       "images": ["references/<reference>/0.png", ...],
                       "masks": ["references/<reference>/0-0.png" or null, ...]}, ...]}
    references/<reference>/I.png      image I of the reference, RGB
    references/<reference>/I-S.png    where subject S is in it, white on black, of the same size

A tool draws each prompt with what is selected, and writes `picture` into a folder of its own. A
copy of requests.jsonl there says what its pictures were drawn of, and is compared with the bench.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluation.benches.bench import Bench, Reference, Request, Selection
from pipeline.generation import png
from pipeline.storage import Storage

REQUESTS = "requests.jsonl"


def export_requests(bench: Bench, storage: Storage) -> int:
    """Write a bench into a folder, requests.jsonl last; the number of its requests."""
    lines: list[str] = []
    written: set[str] = set()
    for start, stop in bench.references():  # one at a time: a bench's pictures are many
        for request in bench.requests(start, stop):
            for reference in {id(s.reference): s.reference for s in request.selections}.values():
                if reference.key not in written:
                    _write(reference, storage)
                    written.add(reference.key)
            lines.append(json.dumps(_line(request), ensure_ascii=False) + "\n")
    storage.write_bytes(REQUESTS, "".join(lines).encode())
    return len(lines)


def _write(reference: Reference, storage: Storage) -> None:
    for i, image in enumerate(reference.images):
        storage.write_bytes(_image(reference, i), png.encode(image))
        for j, subject in enumerate(reference.subjects):
            mask = subject.masks[i]
            if mask is not None:
                white = Image.fromarray(mask.astype(np.uint8) * 255)
                storage.write_bytes(_mask(reference, i, j), png.encode(white))


def _line(request: Request) -> dict[str, Any]:
    return {
        "key": request.key,
        "prompt": request.prompt,
        "seed": request.seed,
        "picture": f"{request.key}.png",
        "selections": [_selection(selection) for selection in request.selections],
    }


def _selection(selection: Selection) -> dict[str, Any]:
    reference, subject = selection.reference, selection.subject
    masks = [
        None if mask is None else _mask(reference, i, selection.target)
        for i, mask in enumerate(subject.masks)
    ]
    return {
        "reference": reference.key,
        "query": subject.query,
        "phrase": subject.phrase,
        "images": [_image(reference, i) for i in range(len(reference.images))],
        "masks": masks,
    }


def _image(reference: Reference, image: int) -> str:
    return f"references/{reference.key}/{image}.png"


def _mask(reference: Reference, image: int, subject: int) -> str:
    return f"references/{reference.key}/{image}-{subject}.png"
