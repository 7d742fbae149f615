"""Marks on the way from the command to the first step, for startup.py; imported by workers too."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKS = "STARTUP_MARKS"  # the file that marks are added to


def mark(name: str) -> None:
    """Now `name` is reached; from any process."""
    with Path(os.environ[MARKS]).open("a") as file:
        file.write(f"{time.time()} {name}\n")


def main() -> None:
    """jobs/train.py, marked."""
    mark("python")
    import jobs.train

    parse, quiet = jobs.train.parse_command, jobs.train.quiet_libraries

    def parsed(*args: Any) -> Any:
        mark("job imported")
        return parse(*args)

    def imported() -> None:
        """What the job imports next is imported here, and marked."""
        mark("settings read")
        quiet()
        from pipeline.training import run, trainer

        mark("training imported")
        run.Run = _marked(run.Run)  # type: ignore[misc]
        fit = trainer.fit

        def fitted(*args: Any) -> Any:
            mark("Ray started")
            return fit(*args)

        trainer.fit = fitted

    jobs.train.parse_command, jobs.train.quiet_libraries = parsed, imported
    jobs.train.main()


def _marked(run: Any) -> Any:
    from startup_marks import Marked  # by its name, as a worker knows it

    def make(cfg: Any) -> Any:
        made = Marked(run(cfg), os.environ[MARKS])
        mark("run checked")
        return made

    return make


@dataclass
class Marked:
    """A run that marks what its worker does."""

    run: Any
    marks: str

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "marks"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.run, name)

    def work(self, world: Any, *leaving: Any) -> Any:
        os.environ[MARKS] = self.marks
        mark("worker at work")
        from pipeline.training.loop import StageLoop

        begin, take = StageLoop.run, StageLoop._take

        def begun(loop: StageLoop) -> Any:
            mark("models loaded")
            return begin(loop)

        def taken(loop: StageLoop, inputs: Any) -> None:
            if loop.step == 0:
                mark("first batch")
            take(loop, inputs)
            if loop.step == 1:
                mark("first step")

        StageLoop.run, StageLoop._take = begun, taken  # type: ignore[method-assign]
        return self.run.work(world, *leaving)


if __name__ == "__main__":
    main()
