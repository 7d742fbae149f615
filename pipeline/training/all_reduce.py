"""What the network between training's workers carries, before anything is trained on it.

python -m pipeline.training.all_reduce                                   # what there is
python -m pipeline.training.all_reduce --workers 16 --use_gpu true --floor_gbit 1500

The workers are those of jobs/train.py, started by Ray Train in the same way. They add up float32
numbers of several sizes, the gradient's among them, and check every sum. Then each sends to its
like on the next node (to the next worker, where there is one node), all at once, which tells the
node apart that holds the others up. Exits 1, with one line, where the network is not as it should
be.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.cluster import connect, cores, private, room
from pipeline.config import AllReduceConfig, TrainConfig, parse
from pipeline.errors import UserError, run, user_message
from pipeline.planning import TRAINABLES
from pipeline.progress import quiet_libraries, say
from pipeline.training.elastic import Sizes
from pipeline.training.trainer import last_line, workers

GRADIENT_BYTES = 4 * TRAINABLES
"""Of one optimizer step: float32."""
SLOW = 2.0
"""A worker is called slow whose exchange takes this many times as long as the fastest one's."""
_WARM_UPS = 2
_SETTINGS = ("NCCL_", "GLOO_", "UCX_", "FI_")
"""Which network a library takes is set by environment variables of these names."""


@dataclass(frozen=True)
class Timing:
    """All-reduces of one size.

    Attributes:
        nbytes: of a worker's numbers.
        seconds: of one all-reduce, the slowest worker's mean.
        wrong: ranks that got a wrong sum.
    """

    nbytes: int
    seconds: float
    wrong: tuple[int, ...]

    @property
    def algorithm_gbit(self) -> float:
        """Bytes over time, Gbit/s: what a training step sees."""
        return self.nbytes * 8 / self.seconds / 1e9

    def bus_gbit(self, workers: int) -> float:
        """What each worker sends, and receives, at least, Gbit/s: comparable with the hardware's,
        whatever the number of workers.
        """
        return self.algorithm_gbit * 2 * (workers - 1) / workers


@dataclass(frozen=True)
class Peer:
    """A worker, and its exchange of `GRADIENT_BYTES` with another one.

    Attributes:
        node: the name of its node.
        device: what it computes on.
        settings: environment variables that choose the network, NAME=VALUE.
        source: the rank that it received from.
        across: whether that was on another node.
        seconds: how long it took.
    """

    node: str
    device: str
    settings: tuple[str, ...]
    source: int
    across: bool
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What the workers found."""

    backend: str
    timings: tuple[Timing, ...]
    peers: tuple[Peer, ...]
    """By rank."""


def measure(cfg: AllReduceConfig) -> Measured:
    """Measure with workers on the connected cluster.

    Raises:
        UserError: the cluster has no room for the workers; one of them was lost, or did not answer.
    """
    count = cfg.workers or room("GPU" if cfg.use_gpu is not False else "CPU")
    if cfg.workers is None and (cfg.use_gpu is False or not count):
        count = min(2, cores())
    count = max(2, count)
    as_training = TrainConfig(
        workers=count,
        lanes=count,
        use_gpu=cfg.use_gpu,
        wait_minutes=cfg.wait_minutes,
        ray=cfg.ray,
    )
    sizes = Sizes.of(as_training)
    sizes.wait(as_training)
    nbytes = sorted({*(max(1, round(size * 2**18)) * 4 for size in cfg.mib), GRADIENT_BYTES})
    settings = {"nbytes": nbytes, "repeats": cfg.repeats}
    with tempfile.TemporaryDirectory(
        prefix="ssr-all-reduce-",
        ignore_cleanup_errors=True,  # a worker that is killed may still write into it
    ) as scratch:
        trainer = workers(
            _work, settings, count, sizes.kind, "all-reduce", scratch, private(cfg.ray),
            cfg.wait_minutes * 60, cfg.timeout_s,
        )  # fmt: skip
        try:
            measured: Measured = trainer.fit().return_value
        except Exception as error:
            reason = user_message(error) or last_line(error)
            raise UserError(
                f"one of {count} {sizes.kind} workers failed or did not answer within "
                f"{cfg.timeout_s:g} s ({reason}); look at its node, at NCCL_SOCKET_IFNAME and "
                "NCCL_IB_HCA, and, with NCCL_DEBUG=INFO, at what it says"
            ) from error
    return measured


def faults(measured: Measured, floor_gbit: float) -> list[str]:
    """What is not as it should be, a line each."""
    found, count = [], len(measured.peers)
    for timing in measured.timings:
        if timing.wrong:
            where = ", ".join(_named(measured.peers, rank) for rank in timing.wrong)
            found.append(f"wrong sums of {_size(timing.nbytes)} at {where}: take the node out")
    largest = measured.timings[-1]
    reached = largest.bus_gbit(count)
    if reached < floor_gbit:
        late = slow(measured.peers)
        where = ", ".join(_named(measured.peers, rank) for rank in late)
        found.append(
            f"the bus bandwidth is {reached:.3g} Gbit/s at {_size(largest.nbytes)}, below the "
            f"floor of {floor_gbit:g}; "
            + (f"slow: {where}" if late else "no worker is slower than the others")
        )
    return found


def slow(peers: Sequence[Peer]) -> list[int]:
    """Ranks whose exchange took far longer than the fastest of its kind (in a node, across)."""
    best: dict[bool, float] = {}
    for peer in peers:
        best[peer.across] = min(peer.seconds, best.get(peer.across, peer.seconds))
    return [at for at, peer in enumerate(peers) if peer.seconds > SLOW * best[peer.across]]


def table(measured: Measured) -> str:
    """The measurement as text: who took part, each size, each node."""
    peers, count = measured.peers, len(measured.peers)
    nodes = list(dict.fromkeys(peer.node for peer in peers))
    lines = [
        f"all-reduce of {count} workers ({peers[0].device}) on {len(nodes)} "
        f"node{'s' * (len(nodes) > 1)}, {measured.backend}",
        *_environment(peers),
        "",
        f"{'size':>22}  {'ms':>9}  {'algorithm Gbit/s':>16}  {'bus Gbit/s':>10}  sums",
    ]
    lines += [
        f"{_size(timing.nbytes):>22}  {timing.seconds * 1e3:9.3f}  {timing.algorithm_gbit:16.2f}  "
        f"{timing.bus_gbit(count):10.2f}  {'wrong' if timing.wrong else 'right'}"
        for timing in measured.timings
    ]
    late = slow(peers)
    lines += ["", f"each worker's exchange of {_size(GRADIENT_BYTES)}, all at once, by node"]
    for node in nodes:
        ranks = [rank for rank, peer in enumerate(peers) if peer.node == node]
        rates = [GRADIENT_BYTES * 8 / peers[rank].seconds / 1e9 for rank in ranks]
        told = [
            f"rank {rank} {'across nodes' if peers[rank].across else 'within'} SLOW"
            for rank in ranks
            if rank in late
        ]
        lines.append(
            f"  {node}: ranks {ranks[0]} to {ranks[-1]}, {min(rates):.2f} to {max(rates):.2f} "
            f"Gbit/s{'; ' + ', '.join(told) if told else ''}"
        )
    return "\n".join(lines)


def _environment(peers: Sequence[Peer]) -> list[str]:
    """The variables that choose the network, once where all workers have the same."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for rank, peer in enumerate(peers):
        kinds.setdefault(peer.settings, []).append(rank)
    lines = []
    for settings, ranks in kinds.items():
        whose = "" if len(kinds) == 1 else f" (ranks {', '.join(map(str, ranks))})"
        lines.append(f"set{whose}: {' '.join(settings) or 'no NCCL_*, GLOO_*, UCX_* or FI_*'}")
    return lines


def _named(peers: Sequence[Peer], rank: int) -> str:
    return f"rank {rank} on {peers[rank].node}"


def _size(nbytes: int) -> str:
    if nbytes == GRADIENT_BYTES:
        return f"{nbytes / 1e6:.0f} MB (gradient)"
    return f"{nbytes / 2**20:.4g} MiB"


# --- the workers ------------------------------------------------------------------------


def _work(config: dict[str, Any]) -> Measured | None:
    """What each Ray Train worker runs; rank 0 returns what all found."""
    quiet_libraries()
    import ray.train
    from ray.train.torch import get_device

    context, device = ray.train.get_context(), get_device()
    torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    timings = [_time(nbytes, config["repeats"], device) for nbytes in config["nbytes"]]
    mine = _exchange(_node(), device)
    peers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peers, mine)
    if dist.get_rank() != 0:
        return None
    return Measured(dist.get_backend(), tuple(timings), tuple(peers))


def _time(nbytes: int, repeats: int, device: torch.device) -> Timing:
    """All-reduces of one size. Every sum is checked: of whole numbers that float32 adds exactly."""
    rank, count = dist.get_rank(), dist.get_world_size()
    pattern = torch.arange(nbytes // 4, dtype=torch.float32, device=device).remainder_(13).add_(1)
    sums = pattern * (count * (count + 1) // 2)
    spent, right = 0.0, True
    for number in range(_WARM_UPS + repeats):
        numbers = pattern * (rank + 1)
        _together(device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        _computed(device)
        if number >= _WARM_UPS:
            spent += time.perf_counter() - began
        right = right and torch.equal(numbers, sums)
    found: list[Any] = [None] * count
    dist.all_gather_object(found, (spent / repeats, right))
    wrong = tuple(at for at, (_, well) in enumerate(found) if not well)
    return Timing(nbytes, max(seconds for seconds, _ in found), wrong)


def _exchange(node: str, device: torch.device) -> Peer:
    """Send to one worker and receive from another, as all do at the same time."""
    rank, count = dist.get_rank(), dist.get_world_size()
    nodes: list[Any] = [None] * count
    dist.all_gather_object(nodes, node)
    shift = _shift(nodes)
    target, source = (rank + shift) % count, (rank - shift) % count
    sent = torch.ones(GRADIENT_BYTES // 4, device=device)
    received = torch.empty_like(sent)
    seconds = 0.0
    for _ in range(_WARM_UPS):  # the first makes the connections
        _together(device)
        began = time.perf_counter()
        pairs = [dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()
        _computed(device)
        seconds = time.perf_counter() - began
    shown = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(_SETTINGS)]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    across = nodes[source] != node
    return Peer(node, where, tuple(sorted(shown)), source, across, seconds)


def _shift(nodes: Sequence[str]) -> int:
    """To which rank further on a worker sends: its like on the next node, so that every node's
    adapters are all used; its neighbour where the nodes hold different numbers of workers.
    """
    sizes = {nodes.count(node) for node in nodes}
    size = sizes.pop()
    return size if not sizes and size < len(nodes) else 1


def _node() -> str:
    """The node's name as Kubernetes gives it (a pod's is its host name), and Ray's of the node."""
    import ray

    return f"{os.uname().nodename} ({ray.get_runtime_context().get_node_id()[:8]})"


def _together(device: torch.device) -> None:
    _computed(device)
    dist.barrier()
    _computed(device)


def _computed(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main() -> None:
    cfg = parse(AllReduceConfig)
    quiet_libraries()
    try:
        with connect(cfg.ray):
            measured = measure(cfg)
    except UserError as error:
        sys.exit(f"error: {error}")
    say(table(measured))
    if found := faults(measured, cfg.floor_gbit):
        sys.exit(f"error: {'; '.join(found)}")


if __name__ == "__main__":
    from pipeline.training import all_reduce  # the workers know it by this name

    run(all_reduce.main)
