"""Settings of pipeline/training/all_reduce.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.shared import RayConfig, at_least
from pipeline.errors import UserError


@dataclass
class AllReduceConfig:
    """python -m pipeline.training.all_reduce: what the network between training's workers carries.

    Exits 1 where it is not as it should be: a worker is missing or lost, a sum is wrong, the
    bandwidth is below the floor. Bandwidths are in Gbit/s (10^9 bits).
    """

    workers: int | None = None
    """Workers that take part, as in jobs/train.py; none = one per GPU that is there, else two."""
    use_gpu: bool | None = None
    """GPU workers (nccl) or CPU workers (gloo); none = GPUs if the cluster has any."""
    mib: list[float] = field(default_factory=lambda: [1.0, 25.0, 256.0])
    """Sizes of what is summed, MiB of float32. That of the training's gradient is added to them;
    25 MiB is what PyTorch sends of it at a time."""
    repeats: int = 10
    """All-reduces of each size that are timed, after two that are not."""
    floor_gbit: float = 0.0
    """Least bus bandwidth of the largest size, Gbit/s; 0 = none. A sane network of one node of
    NVLink, or of many with an HCA of 400 Gbit/s per GPU, gives some hundreds a GPU."""
    timeout_s: float = 120.0
    """Longest time for one all-reduce, the connections' making included, seconds."""
    wait_minutes: float = 10.0
    """Longest wait for the workers' room on a cluster, minutes. Its autoscaler is asked for it."""
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        at_least(self, "all_reduce", repeats=1, floor_gbit=0, timeout_s=1, wait_minutes=0)
        if self.workers is not None:
            at_least(self, "all_reduce", workers=2)
        if not all(size > 0 for size in self.mib):
            raise UserError(f"all_reduce.mib is {self.mib}; sizes must be more than 0")
