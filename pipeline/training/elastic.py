"""How many workers train: as many as divide the lanes and have room, between two bounds.

Ray Train's own elastic worlds know nothing of lanes, so the size is chosen here, for each attempt:
the driver waits for room and picks the size, and the workers leave when a node is about to go or
when there is room for more of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.cluster import cores, private, room
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.progress import say

_LOOK_S = 1.0


@dataclass(frozen=True)
class Sizes:
    """Numbers of workers that a run may have.

    Attributes:
        allowed: divisors of the lanes, ascending.
        kind: the resource of which a worker takes one: GPU or CPU.
    """

    allowed: tuple[int, ...]
    kind: str

    @staticmethod
    def of(cfg: TrainConfig) -> Sizes:
        """As asked, or as the connected cluster allows.

        Raises:
            UserError: the workers do not divide the lanes; no size lies between the bounds.
        """
        divisors = [n for n in range(1, cfg.lanes + 1) if cfg.lanes % n == 0]
        if cfg.workers is not None and cfg.workers not in divisors:
            raise UserError(
                f"{cfg.workers} workers do not divide {cfg.lanes} lanes; change one of them"
            )
        gpus = room("GPU")
        kind = "GPU" if (gpus > 0 if cfg.use_gpu is None else cfg.use_gpu) else "CPU"
        if cfg.workers is not None:
            most = cfg.workers
        elif cfg.min_workers is not None:
            most = cfg.lanes
        else:
            there = gpus if kind == "GPU" else min(2, cores())
            most = max((n for n in divisors if n <= there), default=1)
        least = cfg.min_workers or most
        allowed = tuple(n for n in divisors if least <= n <= most)
        if not allowed:
            raise UserError(
                f"no number of workers from {least} to {most} divides {cfg.lanes} lanes: change "
                "min_workers, workers or lanes"
            )
        return Sizes(allowed, kind)

    def fitting(self, most: int | None = None) -> int:
        """The largest that the nodes have room for, up to `most`; 0 if none."""
        there = room(self.kind)
        there = there if most is None else min(there, most)
        return max((n for n in self.allowed if n <= there), default=0)

    def below(self, size: int) -> int:
        """The next smaller one; 0 if there is none."""
        return max((n for n in self.allowed if n < size), default=0)

    def more(self, size: int) -> int:
        """Workers that the next larger one has more than this; 0 if there is none."""
        return min((n - size for n in self.allowed if n > size), default=0)

    def wait(self, cfg: TrainConfig, most: int | None = None) -> int:
        """The largest that fits, up to `most`, as soon as one does.

        Raises:
            UserError: none does, on a cluster of our own, or after `wait_minutes` on another.
        """
        size, least = self.fitting(most), self.allowed[0]
        if size:
            return size
        missing = (
            f"training takes {least} {self.kind} worker{'s' * (least > 1)} at least, and the "
            f"cluster has room for {room(self.kind)}"
        )
        if private(cfg.ray):
            raise UserError(f"{missing}; lower workers")
        say(f"waiting up to {cfg.wait_minutes:g} min: {missing}")
        until = time.monotonic() + cfg.wait_minutes * 60
        with _asked(self.kind, least):
            while not (size := self.fitting(most)):
                if time.monotonic() > until:
                    raise UserError(
                        f"{missing}, after {cfg.wait_minutes:g} minutes; lower workers or "
                        "min_workers, or give it nodes; the same command goes on"
                    )
                time.sleep(_LOOK_S)
        return size


class Leaving:
    """Whether this worker should leave: see `StageLoop`.

    A node of the workers' is about to go, which Ray tells all of them; or, as rank 0 finds out,
    there has been room for the next larger world for `resize_minutes`. Every worker must ask
    equally often.

    Args:
        rank: which worker this is.
        kind: the resource of which a worker takes one.
        more: workers that the next larger world has more than this one; 0 = there is none.
        resize_minutes: see TrainConfig.
        name: of the room that is asked for, for `give_back`.
    """

    def __init__(self, rank: int, kind: str, more: int, resize_minutes: float, name: str) -> None:
        self._more = more if rank == 0 else 0
        self._kind, self._patience_s, self._name = kind, resize_minutes * 60, name
        self._room: Any = None
        self._since: float | None = None

    def __call__(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None or (self._more > 0 and self._has_room())

    def _has_room(self) -> bool:
        """Asks for the room, which tells the cluster's autoscaler what is wanted."""
        if self._room is None:
            self._room = _ask(self._kind, self._more, self._name)
        if not self._room.wait(0):
            self._since = None
            return False
        if self._since is None:
            self._since = time.monotonic()
        return time.monotonic() - self._since >= self._patience_s


def no_room(error: BaseException) -> bool:
    """Whether an attempt failed because others hold what its workers need."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def give_back(name: str) -> None:
    """Free the room that a `Leaving` has asked for; Ray does not when its worker dies."""
    from ray.util import get_placement_group, remove_placement_group

    with contextlib.suppress(ValueError):  # nothing was asked for
        remove_placement_group(get_placement_group(name))


def _ask(kind: str, workers: int, name: str = "") -> Any:
    """Room for so many workers, as a placement group, which may have to wait for it."""
    from ray.util import placement_group

    return placement_group([{kind: 1.0}] * workers, name=name)


@contextlib.contextmanager
def _asked(kind: str, workers: int) -> Iterator[None]:
    from ray.util import remove_placement_group

    group = _ask(kind, workers)
    try:
        yield
    finally:
        remove_placement_group(group)
