"""Features end to end against a bare loop, and reading shards back against other formats.

`extract`: the stage "features" on one unit (read the images' Parquet, decode, resize, tokenize, VAE
and CLIP, write and hash the shard), against a loop over decoded and normalised tensors in memory,
with the same models and batches and nothing else. On an accelerator all but the models can hide
behind them; on a CPU it runs on the same cores, so there the share of the models in the work is the
most that can be reached, and the models have to be dear for the ratio to say anything.

`read`: the same tensors (as CLIP ViT-L/14 and Stable Diffusion 1.5 give them) read back from a
shard of float16, by pyarrow alone from the same shard, from Ray Data's tensor columns, webdataset
and mosaicml-streaming: all scales, and one. Warm page cache. int8 and pixels stand beside them.

All that is compared runs in turn, in an order that changes every round; medians are printed. CPU
seconds are those of the whole process tree. A rival that is not installed is left out, and said so.
They are installed by `pip install --no-deps -r benchmarks/requirements.txt`.

    python benchmarks/features.py extract                     # random models, 45 GFLOP an image
    python benchmarks/features.py extract --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --vision openai/clip-vit-large-patch14 --image-size 512 --scales 6 --batch 16 --device cuda
    python benchmarks/features.py read --rows 128
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from feature_formats import DEPTHS, Formats
from measuring import alternate, medians, processor
from PIL import Image

from pipeline.config import FeaturesConfig, ModelsConfig
from pipeline.curation.features import FeaturesStage
from pipeline.progress import quiet_libraries
from pipeline.storage import Storage

# --- extract ----------------------------------------------------------------------------


def random_models(folder: Path, image_size: int, tiny: bool) -> ModelsConfig:
    """A CLIP and a Stable Diffusion in the real layouts, wide enough to be dear, of no meaning."""
    from diffusers import AutoencoderKL
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from pipeline import models

    widths = (8, 8) if tiny else (48, 96, 192, 192)
    # the VAE's encoder only; its decoder is not run
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=8,
        sample_size=image_size,
    )
    vae.save_pretrained(folder / "sd" / "vae")
    shipped = Path(models.resolve("miniworld:sd"))
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(shipped / part, folder / "sd" / part)
    (folder / "sd" / "model_index.json").write_text("{}")
    side = 32 if tiny else 224
    vision = CLIPVisionConfig(
        hidden_size=32 if tiny else 384,
        intermediate_size=64 if tiny else 1536,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=side,
        patch_size=8 if tiny else 14,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(
        folder / "clip"
    )
    return ModelsConfig(base=str(folder / "sd"), vision=str(folder / "clip"))


def write_unit(root: Path, rows: int, image_size: int) -> Storage:
    """A unit of JPEG images about as large as photographs, and their captions."""
    storage, rng = Storage(root), np.random.default_rng(0)
    keys = [f"{i:016x}" for i in range(rows)]
    images = []
    for _ in range(rows):
        coarse = rng.integers(0, 256, (image_size // 12 + 2,) * 2 + (3,), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((image_size,) * 2, Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "jpeg", quality=95)
        images.append(data.getvalue())
    captions = {"caption": ["a fish and a cup on sand"] * rows, "subjects": [["a fish"]] * rows}
    for stage, columns in {
        "images": {"url": ["http://host/image.jpg"] * rows, "image": images},
        "captions": captions,
    }.items():
        with storage.publish(f"{stage}/train-00000.parquet") as sink:
            pq.write_table(pa.table({"key": keys, **columns}), sink)
    return storage


def extract(args: argparse.Namespace, folder: Path) -> None:
    """Measure and print the stage against the bare loop."""
    given = bool(args.base and args.vision)
    names = (
        ModelsConfig(base=args.base, vision=args.vision)
        if given
        else random_models(folder, args.image_size, args.size == "small")
    )
    cfg = FeaturesConfig(
        scales=args.scales, codec=args.codec, batch_size=args.batch, threads=args.decoders,
        row_group_mib=64.0,
    )  # fmt: skip
    storage = write_unit(folder / "run", args.rows, args.image_size)
    stage = FeaturesStage(cfg, names, args.image_size, args.device)
    stage.open()
    encoders = stage._encoders
    told = stage._told(storage, "train-00000")
    # decoded and normalised, as the models take them: what a bare loop has in memory
    batches = []
    for batch in stage._prepare(storage, "train-00000", told):
        images = [Image.fromarray(pixels) for pixels in batch.vae_pixels.numpy()]
        clip = encoders.processor(images=images, return_tensors="pt")["pixel_values"]
        batches.append((clip, batch.vae_pixels.permute(0, 3, 1, 2).float() / 127.5 - 1))

    @torch.inference_mode()
    def bare() -> None:
        for clip, vae in batches:
            encoders.vae.encode(vae.to(encoders.device))
            if args.codec != "pixels":
                encoders.vision(clip.to(encoders.device), output_hidden_states=True)
        if encoders.device.type != "cpu":
            torch.accelerator.synchronize()

    def ours() -> None:
        with storage.publish("features/train-00000.parquet") as sink:
            tally = stage("train-00000", storage, sink)  # type: ignore[arg-type]
        if tally.kept != args.rows:
            raise SystemExit(f"{tally} is not what was given: nothing was measured")

    methods = {"bare loop": bare, "stage features": ours}
    runs = alternate(methods, args.rounds)
    where = processor(encoders.device.type)
    stored = storage.size("features/train-00000.parquet") / args.rows
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, {torch.get_num_threads()} threads; "
        f"{'models given' if given else 'random models'}, {args.image_size} pixels, "
        f"{args.rows} images by {args.batch}, codec {args.codec}, {stored:,.0f} bytes an image; "
        f"{args.rounds} rounds, medians; torch {torch.__version__}\n"
    )
    print("| features of one unit | images/s | CPU ms/image | images/s over bare | least to most |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, own in runs.items():
        wall, cpu = medians(own)
        ratios = [b[0] / o[0] for o, b in zip(own, runs["bare loop"], strict=True)]
        print(
            f"| {name} | {args.rows / wall:.2f} | {1e3 * cpu / args.rows:.1f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
        )


# --- read -------------------------------------------------------------------------------


def read(args: argparse.Namespace, folder: Path) -> None:
    """Measure and print the readers."""
    formats = Formats(folder, args.rows, args.size, args.row_group_mib)
    readers = formats.readers(args.only)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}; {args.rows} samples, "
        f"{formats.bytes(DEPTHS) / args.rows:,.0f} bytes each, row groups of "
        f"{args.row_group_mib:g} MiB; {args.rounds} rounds of {args.passes} passes, medians; "
        f"pyarrow {pa.__version__}\n"
    )
    for title, depths in {"all scales": DEPTHS, "one scale": DEPTHS[-1:]}.items():
        wanted = formats.bytes(depths)
        methods: dict[str, Callable[[], Any]] = {}
        for name, reader in readers.items():
            if (got := reader(depths)) != wanted:
                raise SystemExit(f"{name} read {got} bytes, not {wanted}: nothing was measured")
            methods[name] = lambda r=reader, d=depths: [r(d) for _ in range(args.passes)]
        for codec in ("int8", "pixels"):
            methods[f"shards, {codec}"] = lambda c=codec, d=depths: [
                formats.shards(d, c) for _ in range(args.passes)
            ]
        runs = alternate(methods, args.rounds)
        print(
            f"| {title} | MB/s | MB per CPU-second | MB/s over pyarrow | per CPU-second over "
            "pyarrow | samples/s |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, own in runs.items():
            wall, cpu = medians(own)
            raw_wall, raw_cpu = medians(runs["pyarrow, raw"])
            size = args.passes * wanted / 1e6
            rates = f"{size / wall:,.0f} | {size / cpu:,.0f}"
            ratios = f"{raw_wall / wall:.2f} | {raw_cpu / cpu:.2f}"
            if name.startswith("shards, "):  # fewer bytes, the same samples
                rates, ratios = "- | -", "- | -"
            print(f"| {name} | {rates} | {ratios} | {args.passes * args.rows / wall:,.0f} |")
        print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("extract", "read"), help="what is measured")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a look")
    parser.add_argument("--rows", type=int, help="images (default: 32), or samples (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all (default: 5)")
    parser.add_argument("--passes", type=int, default=3, help="read: passes a round (default: 3)")
    parser.add_argument(
        "--row-group-mib", type=float, default=64.0, help="read: row groups, MiB (default: 64)"
    )
    parser.add_argument(
        "--only", default="", help="read: other formats, a regular expression (default: all)"
    )
    parser.add_argument("--base", help="extract: Stable Diffusion, hub id or folder")
    parser.add_argument("--vision", help="extract: CLIP, hub id or folder")
    parser.add_argument(
        "--image-size", type=int, default=256, help="extract: pixels (default: 256)"
    )
    parser.add_argument("--scales", type=int, default=3, help="extract: depths (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="extract: images (default: 8)")
    parser.add_argument("--codec", default="float16", help="extract: float16, int8 or pixels")
    parser.add_argument("--decoders", type=int, default=2, help="extract: threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="extract: cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    args = parser.parse_args()
    args.rows = args.rows or {"extract": 32, "read": 64}[args.what]
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="features-bench-") as folder:
        {"extract": extract, "read": read}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
