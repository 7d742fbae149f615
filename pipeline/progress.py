"""What the user sees while a job runs: bars on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from threading import RLock, Thread
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from pipeline.pace import Pace

_console = Console(highlight=False, soft_wrap=True)

# A task's lines in a log: their distance grows with its age, up to a bound.
_SLOWER_EACH_S, _SLOWEST = 100.0, 12.0
# A task without news is spoken of again after this many times the usual wait.
_WAITS = 5

# Libraries that report how they feel at import or load; errors still come through.
_NOISY = (
    "ray", "ray.data", "ray.train", "ray.tune", "transformers", "diffusers", "img2dataset",
    "fsspec", "s3fs", "botocore", "aiobotocore", "PIL", "urllib3", "asyncio", "torch", "wandb",
    "filelock",
)  # fmt: skip
_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_SILENT": "true",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "PYTHONWARNINGS": "ignore",
}


def say(text: str = "") -> None:
    """Print one of the job's own lines, above the bars where there are any."""
    _console.print(text, markup=False)
    sys.stdout.flush()


def quiet_libraries() -> None:
    """Silence warning storms. Called first in every job and in every worker's set-up."""
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions or sys.warnoptions == ["ignore"]:
        warnings.simplefilter("ignore")  # `python -W default` still shows everything
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # it logs, with a traceback of its own, what it then raises
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for name in ("transformers", "diffusers"):
        # these two reset their loggers at import; when they are imported already, ask them
        module = sys.modules.get(f"{name}.utils.logging")
        if module is not None:
            module.set_verbosity_error()
            module.disable_progress_bar()


@contextlib.contextmanager
def without_stderr_lines(unwanted: bytes) -> Iterator[None]:
    """Drop the lines holding `unwanted` from this process's stderr, C++ libraries' included."""
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)

    def forward() -> None:
        with os.fdopen(source, "rb") as lines:
            for line in lines:
                if unwanted not in line:
                    os.write(kept, line)

    thread = Thread(target=forward, name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)  # closes the pipe's last end, and with it the thread
        thread.join(timeout=5)
        os.close(kept)


class Progress:
    """Progress of named tasks with rate and ETA; a context manager, safe to use from threads.

    On a terminal these are bars. Elsewhere a task prints a plain line at most every `every_s`
    seconds at first, every twelvefold later (a week's log is read too), and one when it is
    complete.
    """

    def __init__(self, every_s: float = 5.0, terminal: bool | None = None) -> None:
        self.every_s = every_s
        self._lock = RLock()
        self._tasks: dict[str, _Task] = {}
        self._bars: RichProgress | None = None
        if _console.is_terminal if terminal is None else terminal:
            self._bars = RichProgress(
                TextColumn("{task.description:>12}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"),
                console=_console,
            )

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def task(self, name: str, total: int, done: int = 0) -> None:
        """Begin (or begin anew) the task `name`; `done` of its `total` are there already."""
        with self._lock:
            task = _Task(name, total, done, self.every_s)
            if self._bars is not None:
                if name in self._tasks:
                    self._bars.remove_task(self._tasks[name].bar)
                task.bar = self._bars.add_task(name, total=total, completed=done, figures="")
            elif done:
                say(f"{name}: {done} of {total} are there already")
            self._tasks[name] = task

    def advance(self, name: str, n: int = 1, **figures: Any) -> None:
        """`n` more are done; `figures` (loss=0.12, rows=900) are shown behind the rate."""
        with self._lock:
            task = self._tasks[name]
            task.done += n
            task.pace.add(n)
            task.figures.update(figures)
            task.news, task.moved = True, time.monotonic()
            if self._bars is not None:
                self._show(task)
            elif task.done >= task.total or task.due():
                self._say(task)

    def tick(self) -> None:
        """Call now and then: ETAs go on while nothing advances, and a log hears of a long wait."""
        with self._lock:
            unfinished = [task for task in self._tasks.values() if task.done < task.total]
            for task in unfinished:
                waiting = task is unfinished[0]  # the others wait for it
                if self._bars is not None:
                    self._show(task)
                elif (task.news and task.due()) or (waiting and task.due(_WAITS)):
                    self._say(task)

    def _show(self, task: _Task) -> None:
        assert self._bars is not None
        shown = f"{task.rates()}{task.eta()}  {task.shown()}"
        self._bars.update(task.bar, completed=task.done, figures=shown)

    def _say(self, task: _Task) -> None:
        say(task.line())
        task.said, task.news = time.monotonic(), False


class _Task:
    def __init__(self, name: str, total: int, done: int, every_s: float) -> None:
        self.name, self.total, self.done, self.every_s = name, total, done, every_s
        self.first, self.started = done, time.monotonic()
        self.said, self.moved, self.news = self.started, self.started, False
        self.pace = Pace()
        self.figures: dict[str, Any] = {}
        self.bar: Any = None

    def due(self, times: float = 1) -> bool:
        """Whether it is time for another line, `times` the usual wait since the last one."""
        now = time.monotonic()
        slower = min(_SLOWEST, max(1.0, (now - self.started) / _SLOWER_EACH_S))
        return now - self.said >= times * self.every_s * slower

    def rates(self) -> str:
        """Done per second lately, and since the task began where that differs."""
        if self.done == self.first:
            return ""
        late = self.pace.rate()
        whole = (self.done - self.first) / max(time.monotonic() - self.started, 1e-6)
        differs = abs(late - whole) > 0.1 * whole
        return f"{late:.3g}/s" + (f" ({whole:.3g}/s in all)" if differs else "")

    def eta(self) -> str:
        if self.done >= self.total or self.done == self.first:
            return ""
        return f", ETA {clock((self.total - self.done) / max(self.pace.rate(), 1e-6))}"

    def shown(self) -> str:
        return " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.figures.items()
        )

    def line(self) -> str:
        took = clock(time.monotonic() - self.started)
        parts = [f"{self.name}: {self.done}/{self.total} in {took}{self.eta()}"]
        parts += [part for part in (self.rates(), self.shown()) if part]
        if not self.news and self.done < self.total:
            parts.append(f"nothing new for {clock(time.monotonic() - self.moved)}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """A duration as people write it: 0:07, 1:02:03, 3d 4:05."""
    seconds = max(0, int(min(seconds, 999 * 86_400)))
    if seconds >= 86_400:
        return f"{seconds // 86_400}d {seconds % 86_400 // 3600}:{seconds % 3600 // 60:02d}"
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
