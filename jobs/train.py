"""Sealed feature shards -> a trained SSR-Encoder, in two stages on Ray Train.

python jobs/train.py                                        # the mini world, on this machine
python jobs/train.py --preset sd15-h800 --root s3://bucket/run
python jobs/train.py export --stage 1 --out FOLDER          # a model from a checkpoint; see --help
python jobs/train.py push --repo owner/name                 # the model on the hub
Run it again to go on where it stopped.
"""

from __future__ import annotations

from pipeline import lease
from pipeline.cluster import connect
from pipeline.config import TrainConfig, parse_command
from pipeline.errors import run
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.training.commands import COMMANDS


def main() -> None:
    command, cfg = parse_command(TrainConfig, COMMANDS)
    quiet_libraries()
    if command is not None:
        return say(command.run(cfg))

    from pipeline.training.run import MODEL, Run  # slow: after the settings were read
    from pipeline.training.trainer import fit

    training = Run(cfg)
    if training.finished:
        say("training was finished before; nothing was done")
        figures = training.figures()
    else:
        one = lease.held(training.storage.sub("train"))
        with one, connect(cfg.ray), Progress() as progress:
            figures = fit(training, progress)
    for stage, reached in figures.items():
        parts = [f"{key} {value:.4g}" for key, value in reached.items() if key in SHOWN]
        say(f"{stage}: {', '.join(parts)}")
    from pipeline import report  # nothing of it is needed before

    say(f"model:    {training.storage.url(MODEL)}")
    say(f"curves:   tensorboard --logdir {training.storage.url('train/tensorboard')}")
    say(f"report:   {report.build(training.storage)}")
    say(f"next:     python jobs/generate.py --root {cfg.root}")


SHOWN = ("step", "epoch", "ldm", "reg", "validation_ldm", "validation_reg", "seconds")

if __name__ == "__main__":
    run(main)
