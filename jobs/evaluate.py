"""How well an SSR-Encoder and its rivals draw the selected subject: a bench, judged, as tables.

python jobs/evaluate.py [--references 100] [--root runs/mini]
python jobs/evaluate.py --bench FOLDER --methods ssr-text ip-adapter@h94/IP-Adapter
python jobs/evaluate.py --preset mini-ablation
python jobs/evaluate.py compare --root runs/mini --other runs/another
"""

from __future__ import annotations

from pipeline import report
from pipeline.command_line import parse_command
from pipeline.config import EvaluateConfig
from pipeline.errors import run
from pipeline.evaluation.commands import COMMANDS
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.storage import Storage


def main() -> None:
    command, cfg = parse_command(EvaluateConfig, COMMANDS)
    if command is not None:
        say(command.run(cfg))
        return
    quiet_libraries()
    storage = Storage(cfg.root)
    storage.check_writable()

    # slow: after the settings were checked
    from pipeline.evaluation.ablation import ablate
    from pipeline.evaluation.run import evaluate

    with Progress() as progress:
        made = (ablate if cfg.ablation.arms else evaluate)(cfg, storage, progress)

    say(f"\n{made.text}")
    say(f"scores:  {storage.url(made.folder)}/scores.json, .md, .parquet (every picture)")
    say(f"samples: {storage.url(made.folder)}/grid.png, extremes.png")
    say(f"report:  {report.build(storage)}")
    of = f"--root {storage.url()} --bench {made.name}"
    say(f"next:    python jobs/evaluate.py compare {of} --other ANOTHER_ROOT")


if __name__ == "__main__":
    run(main)
