"""Between two logs the host never waits for the device: nothing is read back, nothing is sent that
the device would have to be waited for.

There is no accelerator here. Reading a value is the same operation on every device, so the loop is
watched on the CPU; and a step on the meta device, whose tensors hold nothing, shows that none is
needed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import TrainConfig
from pipeline.training.inputs import TextEncodings
from pipeline.training.learner import Learner
from pipeline.training.loop import StageLoop
from pipeline.training.run import Run
from pipeline.training.stage import World
from tests.sealed import write_features
from tests.stage_loops import small_config, stage_loop

# What gives the host a value, or a shape that depends on values: on a device the host waits.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
HOST = torch.device("cpu")
READS = {
    "item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Collects the operations of this thread, backward passes too, for which the host would wait;
    copies between devices are such, unless they are said not to be.
    """

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        if name in WAITS:
            self.found.append(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.append("index by a mask")
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != out.device and not kwargs.get("non_blocking", len(args) > 2):
                self.found.append(f"{name} from {source.device} to {out.device}")
        return out


class Calls(TorchFunctionMode):
    """Collects the calls that read tensors, or send figures to them, without an operation."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(call, "__name__", "")
        if name in READS:
            self.found.append(name)
        if name in ("tensor", "as_tensor") and kwargs.get("device", HOST) != HOST:
            self.found.append(f"{name} of figures to {kwargs['device']}")
        return call(*args, **kwargs)


@contextlib.contextmanager
def watched(found: list[str]) -> Iterator[None]:
    with Operations(found), Calls(found):
        yield


def config(root: Path, folder: Path, **fields: Any) -> TrainConfig:
    """All that a step can do, in parts of its rows."""
    everything = {
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "nonfinite": "skip",
        "micro_batch": 3,
        "drop_prompt": 0.2,
        "drop_subject": 0.2,
        "drop_query": 0.2,
    }
    return small_config(root, folder, **everything, **fields)


@pytest.mark.parametrize(
    ("codec", "precision"), [("float16", "bf16"), ("int8", "fp32"), ("pixels", "bf16")]
)
def test_the_loop_reads_nothing_between_logs(
    tmp_path: Path, tiny_models: Path, codec: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(tmp_path, tiny_models, train=24, test=2, codec=codec)
    run = Run(config(tmp_path, tiny_models, precision=precision))
    run.take_over()
    step, log, reads, logs = StageLoop._take, StageLoop._log, list[str](), list[str]()

    def poisoned(loop: StageLoop, inputs: Any) -> None:
        if loop.step == 2:  # one that is not a number is no reason to wait either
            inputs.noise[1] = torch.nan
        with watched(reads):
            step(loop, inputs)

    def logged(loop: StageLoop, clock: Any) -> None:
        with watched(logs):
            log(loop, clock)

    monkeypatch.setattr(TextEncodings, "__call__", TextEncodings._encode)  # as on an accelerator
    monkeypatch.setattr(StageLoop, "_take", poisoned)
    monkeypatch.setattr(StageLoop, "_log", logged)
    run.work(World())
    assert reads == []
    assert "tolist" in logs, "a log does read, and is seen to"


@pytest.mark.parametrize("codec", ["float16", "int8", "pixels"])
def test_a_step_needs_no_values(
    tmp_path: Path, tiny_models: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device: what reads a tensor raises, and what is sent to it is seen."""
    write_features(tmp_path, tiny_models, train=24, test=2, codec=codec)
    cfg = config(tmp_path, tiny_models)
    loop = stage_loop(cfg)
    batches = [loop.prepare(batch) for batch in loop.lanes.batches(0, 3)]
    loop.learner.release()
    # neither fused AdamW nor autocast is told of the meta device
    adam = sys.modules[torch.optim.AdamW.__mro__[1].__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    meta = World(device=torch.device("meta"))
    learner = Learner(cfg, loop.stage, meta, loop.frozen.to(meta.device), loop.learner.adapter)
    learner(batches[0])  # the noise schedule goes to the device once
    found: list[str] = []
    with watched(found):
        for inputs in batches[1:]:
            taken = learner(inputs)
            assert taken.figures.device.type == taken.good.device.type == "meta"
    assert found == []
