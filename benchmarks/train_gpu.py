"""The training step of Stable Diffusion 1.5's size on one GPU: samples/s, TFLOP/s, memory.

The step is the one that training takes: the learner, with its frozen U-Net in bf16, on batches that
lie in page-locked memory and go to the device within the step. Weights and features are random.
Online, pictures go to the device instead, and VAE and CLIP run in the step. Operations are counted
on the meta device (a multiply-add is two); the share is that of the GPU's dense bf16 peak. The aim
on a GPU of an H100's class is 223 samples/s of six scales, precomputed.

    python benchmarks/train_gpu.py                                  # some minutes
    python benchmarks/train_gpu.py --batches 16 128 --compile no
    python benchmarks/train_gpu.py --device cpu --size tiny         # to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from encoders import Encoders
from measuring import processor
from random_models import SIZES, VOCABULARY, Models, Size, adapter_config, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.planning import peak_tflops
from pipeline.shards import clip_column
from pipeline.training.inputs import Inputs
from pipeline.training.learner import Learner
from pipeline.training.stage import Frozen, Stage, World
from ssr_model.encoder import SSRAdapter
from ssr_model.training_step import SSRTrainingModule

AIM = 223
ONLINE, PRECOMPUTED = "online", "precomputed"


# --- what a step costs ---


def gflop(size: Size, depths: tuple[int, ...], online: bool = False) -> float:
    """GFLOP of a training sample: forward, and backward to the adapter; counted, not run."""
    models = make(size, device="meta")
    models.vae.eval()
    adapter = SSRAdapter(adapter_config(size, models, size.depths)).to("meta")
    adapter.train_scales(depths)
    module = SSRTrainingModule(adapter, models.unet)
    meta = {"device": "meta"}
    ids = torch.zeros(1, size.text[3], dtype=torch.long, **meta)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            prompt, z_q = (models.text_encoder(ids).last_hidden_state for _ in range(2))
            if online:
                models.vae.encode(torch.empty(1, 3, size.image, size.image, **meta))
                models.vision(torch.empty(1, 3, size.clip, size.clip, **meta))
        states = 1 + (size.clip // size.vision[3]) ** 2, size.vision[0]
        features = {depth: torch.empty(1, *states, **meta) for depth in depths}
        noisy, t = torch.empty(1, *size.latent, **meta), torch.zeros(1, dtype=torch.long, **meta)
        prediction, subject = module(noisy, t, prompt, z_q, features)
        (prediction.sum() + subject.tokens.sum()).backward()
    return counter.get_total_flops() / 1e9


# --- the step ---


@dataclass
class Case:
    """One row of the table."""

    features: str
    compiled: bool
    batch: int


class Bench:
    """The models on one device, and the step of each case."""

    def __init__(self, size: Size, device: str, depths: tuple[int, ...]) -> None:
        self.size, self.device, self.depths = size, torch.device(device), depths
        self.models: Models = make(size, device=device)
        self.frozen = Frozen(
            self.models.unet.to(torch.bfloat16),
            self.models.text_encoder,
            None,
            self.models.scheduler,
            0.18215,
        ).to(self.device)
        self.shape = adapter_config(size, self.models, depths)

    def step(self, case: Case) -> tuple[Learner, Callable[[], Inputs]]:
        """The learner of a case, and what makes the inputs of a step."""
        cfg = TrainConfig(global_batch=case.batch, precision="bf16", compile=case.compiled)
        optim = OptimConfig(steps=10**6, lr=1e-6)
        torch.manual_seed(0)
        adapter = SSRAdapter(self.shape)
        adapter.init_from_unet(self.frozen.unet)
        stage = Stage("multi_scale", 1, self.depths, optim)
        learner = Learner(cfg, stage, World(device=self.device), self.frozen, adapter)
        inputs = self._inputs(case.batch)
        if case.features == PRECOMPUTED:
            return learner, lambda: inputs
        encode = Encoders(
            self.models.vae, self.models.vision, self.models.image_processor, half=True
        )
        size = self.size
        image = self._pinned(torch.rand(case.batch, 3, size.image, size.image) * 2 - 1)
        clip = torch.randint(256, (case.batch, size.clip, size.clip, 3), dtype=torch.uint8)
        clip = self._pinned(clip)

        def online() -> Inputs:
            there = (each.to(self.device, non_blocking=True) for each in (image, clip))
            return encode(inputs, *there, self.depths)

        return learner, online

    def _inputs(self, rows: int) -> Inputs:
        """A batch as the read-ahead leaves it."""
        size, tokens = self.size, self.size.text[3]
        states = 1 + (size.clip // size.vision[3]) ** 2, size.vision[0]
        latent = (rows, *size.latent)
        inputs = Inputs(
            step=0,
            keys=[str(row) for row in range(rows)],
            latent_mean=torch.randn(latent).half(),
            latent_logvar=torch.full(latent, -4.0).half(),
            latent_noise=torch.randn(latent),
            noise=torch.randn(latent),
            timesteps=torch.randint(0, 1000, (rows,)),
            prompt_ids=torch.randint(0, VOCABULARY - 2, (rows, tokens)),
            query_ids=torch.randint(0, VOCABULARY - 2, (rows, 1, tokens)),
            named=torch.ones(rows, 1, dtype=torch.bool),
            keep_subject=torch.ones(rows, dtype=torch.bool),
            features={clip_column(d): torch.randn(rows, *states).half() for d in self.depths},
        )
        return inputs if self.device.type == "cpu" else inputs.pin()

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory()

    def measure(self, case: Case, steps: int, rounds: int) -> tuple[float, float]:
        """(samples/s, the median of the rounds; peak GiB on the device)."""
        torch._dynamo.reset()
        learner, inputs = self.step(case)
        try:
            learner.settle(inputs())
            for _ in range(3):
                learner(inputs())
            self._settle()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rates = []
            for _ in range(rounds):
                began = time.perf_counter()
                for _ in range(steps):
                    taken = learner(inputs())
                self._settle()
                rates.append(steps * case.batch / (time.perf_counter() - began))
            if not taken.good:
                raise SystemExit(f"the step of {case} is not a number: nothing was measured")
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
            return statistics.median(rates), peak
        finally:
            learner.release()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[args.compile]
    for features in (PRECOMPUTED, ONLINE):
        for batch in args.batches:
            yield from (Case(features, each, batch) for each in compiled)


def row(case: Case, rate: float, peak: float, each: float, most: float | None) -> str:
    """A line of the table. each: GFLOP a sample; most: TFLOP/s of the GPU."""
    tflops = rate * each / 1e3
    share = f"{tflops / most:.1%}" if most else "–"
    memory = "–" if peak != peak else f"{peak:.1f}"
    return (
        f"| {case.features}{', compiled' if case.compiled else ''} | {case.batch} | {rate:.1f} "
        f"| {tflops:.3g} | {share} | {memory} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a look (default: cuda)")
    parser.add_argument("--size", choices=SIZES, default="sd15", help="models (default: sd15)")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64], help="samples")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--one-scale", action="store_true", help="the first stage's step")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a case (default: 3)")
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s (default: by its name)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here: nothing was run, nothing was measured")
    size, name = SIZES[args.size], processor(args.device)
    depths = size.depths[-1:] if args.one_scale else size.depths
    most = args.peak or (peak_tflops(name) if args.device == "cuda" else None)
    each = {kind: gflop(size, depths, kind == ONLINE) for kind in (PRECOMPUTED, ONLINE)}
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {name}, peak {most or 'not known'} TFLOP/s; {args.size} "
        f"models, {len(depths)} scale{'s' * (len(depths) > 1)}, bf16, "
        f"{each[PRECOMPUTED]:.4g} GFLOP a sample precomputed, {each[ONLINE]:.4g} online; "
        f"{args.rounds} rounds of {args.steps} steps, medians; torch {torch.__version__}\n"
    )
    print("| features | batch | samples/s | TFLOP/s | of the peak | peak memory, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    bench, best = Bench(size, args.device, depths), 0.0
    for case in cases(args):
        try:
            rate, peak = bench.measure(case, args.steps, args.rounds)
        except (torch.OutOfMemoryError, UserError) as error:
            refused = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            compiled = ", compiled" if case.compiled else ""
            print(f"| {case.features}{compiled} | {case.batch} | {refused} | | | |", flush=True)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        print(row(case, rate, peak, each[case.features], most), flush=True)
        best = max(best, rate) if case.features == PRECOMPUTED else best
    if args.size == "sd15" and not args.one_scale:
        print(f"\nBest precomputed: {best:.1f} samples/s, {best / AIM:.2f} of the aim of {AIM}")


if __name__ == "__main__":
    main()
