"""A sealed curation of random features with the tiny models' shapes: what training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline import models
from pipeline.shards import (
    CLIP_PIXELS,
    Manifest,
    ShardWriter,
    encode_states,
    flipped_column,
    layout,
)
from pipeline.storage import Storage

DEPTHS = (2, 4, 6)
CLASSES = ("fish", "cup", "tree", "boat", "star")


def write_features(
    root: Path | str,
    folder: Path,
    train: int = 90,
    test: int = 12,
    codec: str = "float16",
    flip: bool = False,
) -> Manifest:
    """Shards and manifest under `root` for the models in `folder` (sd/ and clip/). The columns of
    the flipped images are the others' negatives (int8: their scales are), so that a row tells which
    it is of.
    """
    storage = Storage(root)
    sd, clip = str(folder / "sd"), str(folder / "clip")
    tokenizer = models.load_tokenizer(sd)
    rng = np.random.default_rng(0)
    latent, states, pixels = (16, 8, 8), (65, 48), (32, 32, 3)
    length = tokenizer.model_max_length
    tensors = layout(
        codec,
        tokens=length,
        latent=latent,
        depths=DEPTHS,
        states=states,
        pixels=pixels,
        flip=flip,
    )
    shards = []
    for unit, rows in (
        ("train-00000", train // 2),
        ("train-00001", train - train // 2),
        ("test-00000", test),
    ):
        names = rng.choice(CLASSES, (rows, 2))
        captions = [f"a {a} and a {b} on sand" for a, b in names]
        ids = tokenizer(captions, padding="max_length", truncation=True)["input_ids"]
        columns = {
            "key": [f"{unit}-{i}" for i in range(rows)],
            "url": ["http://example.com"] * rows,
            "caption": captions,
            "aesthetic": [6.5] * rows,
            "predictor": ["v2"] * rows,
            "subjects": [[f"a {a}", f"a {b}"] for a, b in names],
            "token_ids": np.asarray(ids, np.int32),
        }
        columns["latent_mean"] = rng.standard_normal((rows, *latent))
        columns["latent_logvar"] = rng.standard_normal((rows, *latent)) * 0.1 - 4.0
        if codec == "pixels":
            columns[CLIP_PIXELS] = rng.integers(0, 256, (rows, *pixels), np.uint8)
        else:
            drawn = {depth: rng.standard_normal((rows, *states)) for depth in DEPTHS}
            given = {depth: torch.from_numpy(value).float() for depth, value in drawn.items()}
            columns |= {k: v.numpy() for k, v in encode_states(codec, given).items()}
        if flip:
            for name in [name for name in columns if name.startswith(("latent", "clip"))]:
                if name != CLIP_PIXELS:
                    columns[flipped_column(name)] = -columns[name]
        path = f"features/{unit}.parquet"
        with storage.publish(path) as sink:
            writer = ShardWriter(sink, tensors, row_group_bytes=200_000)
            writer.write(columns)
            writer.close()
        shards.append(
            {
                "path": path,
                "split": unit.partition("-")[0],
                "rows": rows,
                "row_groups": writer.row_groups,
                "bytes": sink.bytes,
                "sha256": sink.sha256,
            }
        )
    manifest = Manifest(
        shards=shards,  # type: ignore[arg-type]
        depths=list(DEPTHS),
        tensors={t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in tensors},
        encoders={
            "vision": models.identity(clip),
            "vae": models.identity(sd, "vae"),
            "text": models.identity(sd, "text_encoder"),
        },
        codec=codec,
    )
    manifest.save(storage)
    return manifest
