"""What a subject costs at each denoising step: against the plain pipeline and against IP-Adapter.

One guided step (U-Net on [unconditional, conditional], guidance, DDIM) on random weights, for
512 x 512 pixels. All methods run on the same U-Net, in turn, in an order that changes every round;
medians, the ratios of each round to its plain step, and the counted operations (a multiply-add is
two) are printed. IP-Adapter is diffusers' own, with as many image tokens as the SSR-Encoder has
subject tokens (six scales of 77).

    python benchmarks/attention.py                  # mid size: half Stable Diffusion 1.5's widths
    python benchmarks/attention.py --size sd15      # Stable Diffusion 1.5's own U-Net
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from measuring import processor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssr_model import SSRAdapter, SSRConfig, Subject
from ssr_model.attachment import KEY, Attachment, Condition
from ssr_model.branch import SubjectBranch
from ssr_model.config import cross_attention_layers

SIZES = {  # widths, side of the latent
    "small": ((32, 64, 64, 64), 16),  # to see that it runs
    "mid": ((160, 320, 640, 640), 64),
    "sd15": ((320, 640, 1280, 1280), 64),
}
QUERY_TOKENS, DEPTHS, TEXT, VISION = 77, (4, 8, 12, 16, 20, 24), 768, 1024


class Bench:
    """One U-Net, one step on it, and the ways to condition that step."""

    def __init__(self, size: str, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        widths, side = SIZES[size]
        unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=TEXT)
        self.unet = unet.to(device, dtype).eval()
        self.layers, _ = cross_attention_layers(self.unet)
        self.adapter = SSRAdapter(
            SSRConfig(vision_dim=VISION, text_dim=TEXT, depths=DEPTHS, layers=self.layers)
        ).to(device, dtype)
        self.adapter.init_from_unet(self.unet)
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(30)
        self.where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = torch.randn(1, 4, side, side, **self.where)
        self.prompt = torch.randn(2, QUERY_TOKENS, TEXT, **self.where)
        self.tokens = torch.randn(1, len(DEPTHS) * QUERY_TOKENS, TEXT, **self.where)

    def count(self, methods: Mapping[str, Callable[[], Any]]) -> dict[str, int]:
        """Floating-point operations of a step. Every method must do something, too."""
        results, operations = {}, {}
        for name, method in methods.items():
            # attention as plain matrix products, which are what the counter knows
            with (
                method() as given,
                sdpa_kernel(SDPBackend.MATH),
                FlopCounterMode(display=False) as c,
            ):
                results[name] = self.step(**given)
            operations[name] = c.get_total_flops()
        plain = results.pop("plain")
        for name, result in results.items():
            if not result.isfinite().all() or torch.allclose(result, plain):
                raise SystemExit(f"{name} does not condition the step: nothing was measured")
        return operations

    def step(self, **kwargs: Any) -> Tensor:
        """One guided denoising step."""
        t = self.scheduler.timesteps[10]
        out = self.unet(torch.cat([self.latents] * 2), t, self.prompt, return_dict=False, **kwargs)
        negative, positive = out[0].chunk(2)
        noise = negative + 7.5 * (positive - negative)
        return self.scheduler.step(noise, t, self.latents, return_dict=False)[0]

    @contextmanager
    def plain(self) -> Iterator[dict[str, Any]]:
        """No subject."""
        self.unet.set_attn_processor(AttnProcessor2_0())
        yield {}

    @contextmanager
    def ssr(self, subjects: int, region: bool = False) -> Iterator[dict[str, Any]]:
        """`subjects` subjects; keys and values are made here, once per call of a pipeline."""
        self.unet.set_attn_processor(AttnProcessor2_0())
        left = np.zeros((64, 64), bool)
        left[:, :32] = True
        one = Subject(np.zeros((8, 8, 3), np.uint8), query="fish", region=left if region else None)
        branch = SubjectBranch.deal(
            self.adapter.by_layer(), self.tokens.expand(subjects, -1, -1), [[one] * subjects]
        )
        attached = Attachment.make(self.unet, self.layers)
        yield {"cross_attention_kwargs": {KEY: Condition(branch, guided=True)}}
        attached.remove()

    @contextmanager
    def ip_adapter(self, subjects: int) -> Iterator[dict[str, Any]]:
        """diffusers' IP-Adapter on as many tokens, each subject's after the other's."""
        count = subjects * self.tokens.shape[1]
        processors: dict[str, Any] = {}
        for name in self.unet.attn_processors:
            processors[name] = AttnProcessor2_0()
            if name in self.layers:
                processors[name] = IPAdapterAttnProcessor2_0(
                    self.layers[name], TEXT, num_tokens=(count,)
                ).to(**self.where)
        self.unet.set_attn_processor(processors)
        kept = self.unet.encoder_hid_proj, self.unet.config.encoder_hid_dim_type
        self.unet.encoder_hid_proj = MultiIPAdapterImageProjection([torch.nn.Identity()])
        self.unet.config.encoder_hid_dim_type = "ip_image_proj"
        embeds = self.tokens.repeat(2, subjects, 1)[:, None]
        yield {"added_cond_kwargs": {"image_embeds": [embeds]}}
        self.unet.encoder_hid_proj, self.unet.config.encoder_hid_dim_type = kept


def measure(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid", help="U-Net (default: mid)")
    parser.add_argument(
        "--only", default="", help="methods beside plain, a regular expression (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all methods (default: 7)")
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads (default: torch's)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--half", action="store_true", help="float16 (default: float32)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.size, args.device, torch.float16 if args.half else torch.float32)
    methods: dict[str, Callable[[], Any]] = {
        "plain": bench.plain,
        "SSR, 1 subject": lambda: bench.ssr(1),
        "SSR, 3 subjects": lambda: bench.ssr(3),
        "SSR, 1 subject in a region": lambda: bench.ssr(1, region=True),
        "IP-Adapter, 462 tokens": lambda: bench.ip_adapter(1),
        "IP-Adapter, 1,386 tokens": lambda: bench.ip_adapter(3),
    }
    methods = {k: m for k, m in methods.items() if k == "plain" or re.search(args.only, k)}
    with torch.inference_mode():
        operations = bench.count(methods)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    rng = random.Random(0)
    with torch.inference_mode():
        for done in range(args.rounds):
            for name in rng.sample(list(methods), len(methods)):
                with methods[name]() as given:
                    times[name].append(
                        measure(lambda given=given: bench.step(**given), args.device)
                    )
            print(f"round {done + 1} of {args.rounds}", file=sys.stderr, flush=True)
    name = processor(args.device)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {name}, {torch.get_num_threads()} threads; "
        f"U-Net {args.size} {SIZES[args.size][0]}, {bench.where['dtype']}; "
        f"{args.rounds} rounds, medians; "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}\n"
    )
    print(
        "| one denoising step | wall, s | CPU, s | wall / plain | least to most "
        "| operations / plain |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, runs in times.items():
        ratios = [own[0] / plain[0] for own, plain in zip(runs, times["plain"], strict=True)]
        wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"| {name} | {wall:.3f} | {cpu:.3f} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} "
            f"| {operations[name] / operations['plain']:.3f} |"
        )


if __name__ == "__main__":
    main()
