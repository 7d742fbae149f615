"""How well a trained SSR-Encoder selects: the held-out bench, judged, as a table and pictures.

python jobs/evaluate.py [--references 100] [--root runs/mini]
"""

from __future__ import annotations

from pipeline import report
from pipeline.config import EvaluateConfig, parse
from pipeline.errors import run
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.storage import Storage


def main() -> None:
    cfg = parse(EvaluateConfig)
    quiet_libraries()
    storage = Storage(cfg.root)
    storage.check_writable()

    from pipeline.evaluation.selection import evaluate  # slow: after the settings were checked

    with Progress() as progress:
        table = evaluate(cfg, storage, progress)

    say(f"\n{table}")
    say(f"scores:  {storage.url('evaluation/scores.json')}")
    say(f"samples: {storage.url('evaluation/grid.png')}")
    say(f"report:  {report.build(storage)}")


if __name__ == "__main__":
    run(main)
