"""Does drawing together pay? The service's queue with batches, and one picture after another.

As many clients as `--clients`, each asks for a picture as soon as it has the last one, in this
process: what is measured is the queue and the denoising, not HTTP. Both methods have the same
models; rounds alternate, and one more warms up. Told are medians over the rounds of pictures/s and
of the clients' median and 95th percentile waits.

    python benchmarks/serve.py                                  # after make demo
    python benchmarks/serve.py --device cuda --dtype float16 --base ... --vision ... --model ...
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from datetime import UTC, datetime

import numpy as np
from measuring import processor
from PIL import Image

from pipeline.config import ModelsConfig, ServeConfig
from pipeline.generation.recipe import Recipe, Reference
from pipeline.serving.artist import Drawn
from pipeline.serving.local import LocalArtist

Round = tuple[float, float, float]
"""Pictures/s, median wait, 95th percentile of the waits, s."""


async def measure(artist: LocalArtist, clients: int, pictures: int, steps: int) -> Round:
    """One round: each client draws `pictures`, one after another."""
    waits = list[float]()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    subject = Reference(Image.fromarray(noise), query="cup")

    async def client(number: int) -> None:
        for i in range(pictures):
            recipe = Recipe("a cup on snow", (subject,), seed=number * pictures + i, steps=steps)
            began = time.perf_counter()
            async for told in artist.draw(recipe, 3600.0):
                last = told
            assert isinstance(last, Drawn)
            waits.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    wall = time.perf_counter() - began
    return clients * pictures / wall, statistics.median(waits), float(np.quantile(waits, 0.95))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="runs/mini/model", help="trained encoder (default: %(default)s)"
    )
    parser.add_argument("--base", default="miniworld:sd", help="base model (default: %(default)s)")
    parser.add_argument("--vision", default="miniworld:clip", help="CLIP (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="precision (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at a time (default: %(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=2, help="of each client (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="largest batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured (default: %(default)s)")
    args = parser.parse_args()

    def artist(batch: int) -> LocalArtist:
        return LocalArtist.load(
            ServeConfig(
                model=args.model,
                models=ModelsConfig(base=args.base, vision=args.vision),
                device=args.device,
                dtype=args.dtype,
                batch=batch,
                queue=args.clients,
            )
        )

    methods = {f"batches of up to {args.batch}": artist(args.batch), "one at a time": artist(1)}
    runs: dict[str, list[Round]] = {name: [] for name in methods}
    rng = random.Random(0)
    for done in range(args.rounds + 1):
        for name in rng.sample(list(methods), len(methods)):
            found = asyncio.run(measure(methods[name], args.clients, args.pictures, args.steps))
            if done:
                runs[name].append(found)
        print(f"round {done} of {args.rounds}", file=sys.stderr, flush=True)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {processor(args.device)}; {args.base}, {args.dtype}, "
        f"{args.steps} steps, {args.clients} clients of {args.pictures} pictures each, "
        f"medians of {args.rounds} rounds\n"
    )
    print("| | pictures/s | p50 wait, s | p95 wait, s |\n| --- | ---: | ---: | ---: |")
    for name, rounds in runs.items():
        rate, middle, high = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {rate:.2f} | {middle:.2f} | {high:.2f} |")


if __name__ == "__main__":
    main()
