"""A sealed curation of random features with the tiny models' shapes: what training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline import models
from pipeline.shards import Manifest, ShardWriter, Tensor, clip_column
from pipeline.storage import Storage

DEPTHS = (2, 4, 6)
CLASSES = ("fish", "cup", "tree", "boat", "star")


def write_features(root: Path, folder: Path, train: int = 90, test: int = 12) -> Manifest:
    """Shards and manifest under `root` for the models in `folder` (sd/ and clip/)."""
    storage = Storage(root)
    sd, clip = str(folder / "sd"), str(folder / "clip")
    tokenizer = models.load_tokenizer(sd)
    rng = np.random.default_rng(0)
    tensors = [
        Tensor("token_ids", (tokenizer.model_max_length,), "int32"),
        Tensor("latent_mean", (16, 8, 8), "float16"),
        Tensor("latent_logvar", (16, 8, 8), "float16"),
        *(Tensor(clip_column(depth), (65, 48), "float16") for depth in DEPTHS),
    ]
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
            "subjects": [[f"a {a}", f"a {b}"] for a, b in names],
            "token_ids": np.asarray(ids, np.int32),
        }
        for tensor in tensors[1:]:
            scale, shift = (0.1, -4.0) if tensor.name == "latent_logvar" else (1.0, 0.0)
            columns[tensor.name] = rng.standard_normal((rows, *tensor.shape)) * scale + shift
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
    )
    manifest.save(storage)
    return manifest
