"""Pictures of selected subjects: a grid of held-out references, or your own images.

python jobs/generate.py
python jobs/generate.py --image cup.jpg --query cup --prompt "a cup on snow" --pictures 4
python jobs/generate.py --from PICTURE.png                  # draws it again; see docs/generate.md
"""

from __future__ import annotations

from pipeline import report
from pipeline.config import GenerateConfig, parse
from pipeline.errors import run
from pipeline.progress import Progress, quiet_libraries, say
from pipeline.storage import Storage


def main() -> None:
    cfg = parse(GenerateConfig)
    quiet_libraries()
    storage = Storage(cfg.root)
    storage.check_writable()

    from pipeline.generation.studio import generate  # slow: after the settings were checked

    with Progress() as progress:
        made = generate(cfg, storage, progress)

    say(f"grid:     {storage.url(made.grid)}")
    say(f"pictures: {storage.url('generate')} ({made.pictures})")
    say(f"report:   {report.build(storage)}")


if __name__ == "__main__":
    run(main)
