"""Pictures of selected subjects: a grid of held-out references, or your own images.

python jobs/generate.py
python jobs/generate.py --image cup.jpg --query "a cup" --prompt "a cup on snow"
"""

from __future__ import annotations

from pipeline import report
from pipeline.config import GenerateConfig, parse
from pipeline.errors import run
from pipeline.progress import quiet_libraries, say
from pipeline.storage import Storage


def main() -> None:
    cfg = parse(GenerateConfig)
    quiet_libraries()
    storage = Storage(cfg.root)
    storage.check_writable()

    from pipeline.generation.studio import generate  # slow: after the settings were checked

    made = generate(cfg, storage, say)

    say(f"grid:     {storage.url(made.grid)}")
    say(f"pictures: {storage.url('generate')} ({made.pictures})")
    say(f"report:   {report.build(storage)}")


if __name__ == "__main__":
    run(main)
