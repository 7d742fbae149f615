"""From the command to the first training step on the mini world: where the time goes.

`jobs/train.py --preset mini` on random features, in a process of its own each round, with the
system's file cache warm. CPU seconds are those of the whole process tree until the first step.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import ray
import torch
from measuring import cpu_seconds, processor
from random_models import write_features
from startup_marks import MARKS

from pipeline.config import ModelsConfig

HERE = Path(__file__).parent
PHASES = {  # from the mark before it
    "python": "the interpreter",
    "job imported": "the job's own modules",
    "settings read": "settings",
    "training imported": "torch, diffusers, the training package",
    "run checked": "the run: manifest, hashes of the encoders, settings",
    "Ray started": "Ray: a private cluster",
    "worker at work": "Ray Train: controller and worker, their imports",
    "models loaded": "frozen models, adapter, optimizer",
    "first batch": "lanes, read-ahead, first batch",
    "first step": "first step",
}
LAST = "first step"


def once(folder: Path, number: int) -> tuple[dict[str, float], float]:
    """(when each mark was reached, seconds after the command; CPU seconds until the last)."""
    marks, root = folder / f"marks-{number}", folder / f"root-{number}"
    write_features(root, ModelsConfig(), (2, 4, 6), rows=256)
    marks.touch()
    paths = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, MARKS: str(marks), "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable, str(HERE / "startup_marks.py"), "--preset", "mini", "--root", str(root),
        "--workers", "1", "--semantic.steps", "2", "--multi_scale.steps", "0",
        "--validate_steps", "0",
    ]  # fmt: skip
    began, cpu = time.time(), 0.0
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=log, stderr=log
        ) as child,
    ):
        tree = psutil.Process(child.pid)
        while child.poll() is None and LAST not in marks.read_text():
            cpu = max(cpu, cpu_seconds(tree))
            time.sleep(0.05)
        child.wait()
    seen = {
        name: float(when) - began
        for when, name in (line.split(" ", 1) for line in marks.read_text().splitlines())
    }
    if LAST not in seen:
        raise SystemExit(f"training did not begin:\n{(folder / 'log').read_text()}")
    return seen, cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="after a warm-up (default: 5; 0: a look)"
    )
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        for number in range(args.rounds + 1):
            rounds.append(once(Path(folder), number))
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    rounds = rounds[1:] or rounds
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {processor('cpu')}, {os.cpu_count()} cores; {args.rounds} "
        f"rounds, medians; torch {torch.__version__}, ray {ray.__version__}\n"
    )
    print("| from the command to the first step | seconds | since the command |")
    print("| --- | ---: | ---: |")
    before = "command"
    for name, said in PHASES.items():
        spent = statistics.median(seen[name] - seen.get(before, 0.0) for seen, _ in rounds)
        since = statistics.median(seen[name] for seen, _ in rounds)
        print(f"| {said} | {spent:.2f} | {since:.2f} |")
        before = name
    print(f"\n{statistics.median(cpu for _, cpu in rounds):.1f} CPU seconds until then")


if __name__ == "__main__":
    main()
