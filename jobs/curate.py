"""Web metadata, or images of one's own -> sealed feature shards, through captions and features.

python jobs/curate.py                                       # the mini world, on this machine
python jobs/curate.py --preset laion-sd15 --filter.inputs s3://bucket/metadata --root s3://bucket/run
python jobs/curate.py --preset finetune-sd15 --folder.path photos
python jobs/curate.py --preset finetune-sd15 --webdataset.inputs "s3://bucket/set/{000..099}.tar"
python jobs/curate.py export --root runs/mini --out tars    # images and captions as a WebDataset
python jobs/curate.py status --root s3://bucket/run         # how far it is; see --help
"""

from __future__ import annotations

from pipeline import report
from pipeline.config import CurateConfig, parse_command
from pipeline.curation.commands import COMMANDS
from pipeline.errors import run
from pipeline.progress import quiet_libraries, say
from pipeline.storage import Storage


def main() -> None:
    command, cfg = parse_command(CurateConfig, COMMANDS)
    quiet_libraries()
    if command is not None:
        return say(command.run(cfg))
    from pipeline.curation.run import curate  # torch and Ray: seconds that a status does without

    storage = Storage(cfg.root)
    storage.check_writable()
    manifest = curate(cfg, storage)
    say(f"features: {storage.url('features')} ({manifest.size()})")
    say(f"report:   {report.build(storage)}")
    say(f"next:     python jobs/train.py --root {cfg.root}")


if __name__ == "__main__":
    run(main)
