"""What training costs around the step: the loop through Ray Train, and encoders run online.

Every loop trains the same adapter on the same random models and runs in a process of its own; they
go on in turn, a window of steps at a time, in an order that changes every round, so that all of
them see the same machine. CPU seconds are those of the loop's whole process tree: of the one
through Ray Train that is the cluster, the driver, the worker, and the thread that reads ahead.

    the step alone         batches lie ready in memory: nothing but the learner
    through Ray Train      jobs/train.py as it is: lanes, read-ahead, records, progress
    layout pixels          shards that hold CLIP's input: CLIP runs in the step
    encoders online        JPEGs are decoded ahead, VAE and CLIP run in the step
    as the released        JPEGs by a DataLoader, all encoders online, float32, anomaly detection,
                           AdamW in its plain form, the loss read at every step

Of the operations of an online step the mid-size VAE has 30 %, CLIP 9 %, the text encoder 7 %; of
Stable Diffusion 1.5 they have 36, 5 and 1 %. The text encoder always runs in the step.

    python benchmarks/train_step.py                # some minutes
    python benchmarks/train_step.py --quick        # tiny models: to see that it runs
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from measuring import alternate, medians, processor
from random_models import SIZES, save, write_features
from train_loops import BARE, KEY, LOOPS, PIXELS, RAY, Task, serve

from pipeline.config import ModelsConfig, OptimConfig, TrainConfig
from pipeline.progress import quiet_libraries

METHODS = [BARE, RAY, *(name for name in LOOPS if name != BARE)]


def config(root: Path, named: ModelsConfig, args: argparse.Namespace) -> TrainConfig:
    """The paper's settings on the models that are there."""
    steps = (args.rounds + 1) * args.window + 1
    return TrainConfig(
        root=str(root),
        models=named,
        workers=1,
        use_gpu=False,
        global_batch=args.batch,
        lanes=args.batch,
        shuffle_rows=64,
        semantic=OptimConfig(steps=0),
        multi_scale=OptimConfig(steps=steps),
        log_steps=min(5, args.window),
        validate_steps=0,
        checkpoint_steps=steps,
    )


class Loops:
    """The processes of the loops, standing still but for one."""

    def __init__(self, tasks: list[Task], gate: str) -> None:
        fork = multiprocessing.get_context("forkserver")  # what they import is imported once
        fork.set_forkserver_preload(["train_loops"])
        self.processes = {task.method: fork.Process(target=serve, args=(task,)) for task in tasks}
        self.connections: dict[str, Connection[Any, Any]] = {}
        with Listener(gate, authkey=KEY) as listener:
            for method, process in self.processes.items():  # one by one: each has the machine
                process.start()
                connection = listener.accept()
                self.connections[connection.recv()] = connection
                self._over(method)

    def go(self, method: str) -> None:
        """One window of steps."""
        self.connections[method].send("go")
        self._over(method)

    def join(self) -> None:
        for process in self.processes.values():
            process.join()

    def trees(self) -> dict[str, psutil.Process]:
        return {name: psutil.Process(process.pid) for name, process in self.processes.items()}

    def _over(self, method: str) -> None:
        try:
            self.connections[method].recv()
        except EOFError:
            raise SystemExit(f"{method} failed: nothing was measured") from None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: a look")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--window", type=int, default=5, help="steps at a time (default: 5)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all (default: 7)")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="threads that compute (default: 1, which leaves the other core to the rest)",
    )  # fmt: skip
    parser.add_argument(
        "--only", default="", help="loops beside the first, a regular expression (default: all)"
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.window, args.batch = 1, 2, 4
    quiet_libraries()
    here = str(Path(__file__).parent)  # workers of Ray import the loops too
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *os.environ.get("PYTHONPATH", "").split(":")])
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    size = "tiny" if args.quick else "mid"
    methods = [name for name in METHODS if name == BARE or re.search(args.only, name)]
    with tempfile.TemporaryDirectory(prefix="train-step-") as temporary:
        folder, gate = Path(temporary), f"{temporary}/gate"
        named = save(SIZES[size], folder)
        tasks = []
        for number, method in enumerate(methods):
            codec = "pixels" if method == PIXELS else "float16"
            root = folder / str(number)
            write_features(root, named, SIZES[size].depths, rows=32 * args.batch, codec=codec)
            cfg = config(root, named, args)
            tasks.append(Task(method, cfg, size, gate, args.window, args.rounds + 1, args.threads))
        loops = Loops(tasks, gate)
        turns: dict[str, Callable[[], Any]] = {
            name: lambda name=name: loops.go(name)  # type: ignore[misc]
            for name in methods
        }
        runs = alternate(turns, args.rounds, loops.trees())
        loops.join()
    show(runs, args, size)


def show(runs: dict[str, list[tuple[float, float]]], args: argparse.Namespace, size: str) -> None:
    """The table."""
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {os.cpu_count()} cores, {args.threads} "
        f"thread{'s' * (args.threads > 1)}; {size} models, six scales, float32, batch {args.batch};"
        f" {args.rounds} rounds of {args.window} steps, medians; torch {torch.__version__}, ray "
        f"{ray.__version__}\n"
    )
    print("| loop | samples/s | CPU s a step | wall / step alone | least to most | CPU / alone |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    _, alone = medians(runs[BARE])
    for name, own in runs.items():
        wall, cpu = medians(own)
        ratios = [a[0] / b[0] for a, b in zip(own, runs[BARE], strict=True)]
        print(
            f"| {name} | {args.window * args.batch / wall:.2f} | {cpu / args.window:.3f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
            f"| {cpu / alone:.3f} |"
        )


if __name__ == "__main__":
    main()
