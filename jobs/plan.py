"""What a run takes on a cluster: bytes, requests, Gbit/s, hours, days, money, and what limits it.

python jobs/plan.py                                         # the paper's: 8 H800, 10 M images
python jobs/plan.py --gpu a100 --gpus 32 --network_gbit 50 --codec int8 --gpu_hour_price 1.8
python jobs/plan.py --explain true --out plan.md            # every figure with formula and source
python jobs/plan.py --calibrate s3://bucket/short-run       # measured figures for assumed ones
Nothing is started; --help says what is assumed.
"""

from __future__ import annotations

from pipeline.config import PlanConfig, parse
from pipeline.errors import run
from pipeline.planning import plan
from pipeline.planning.calibration import calibrated
from pipeline.planning.text import text, write
from pipeline.progress import say


def main() -> None:
    found = calibrated(parse(PlanConfig, preset="sd15-h800"))
    made = plan(found.cfg, found.measured)
    say(text(made, found.notes, explain=found.cfg.explain))
    if found.cfg.out is not None:
        say(f"\nplan:     {write(made, found.notes, found.cfg.out)}")


if __name__ == "__main__":
    run(main)
