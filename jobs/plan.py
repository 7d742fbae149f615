"""What a run takes on a cluster: bytes to store, Gbit/s to feed, GPU hours, what limits it.

python jobs/plan.py                                         # the paper's: 8 H800, 10 M images
python jobs/plan.py --gpu a100 --gpus 32 --network_gbit 50 --codec int8 --gpu_hour_price 1.8
Nothing is started; --help says what is assumed.
"""

from __future__ import annotations

from pipeline.config import PlanConfig, parse
from pipeline.errors import run
from pipeline.planning import plan, table
from pipeline.progress import say


def main() -> None:
    say(table(plan(parse(PlanConfig, preset="sd15-h800"))))


if __name__ == "__main__":
    run(main)
