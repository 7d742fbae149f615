"""The compiled step: one graph, compiled once, and the numbers of the step that is not compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pipeline.errors import UserError
from pipeline.training.loop import StageLoop
from ssr_model.training_step import SSRTrainingModule
from tests.stage_loops import small_config, stage_loop


def trained(loop: StageLoop, steps: int = 2) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The figures of each step, and the weights after them."""
    batches = [loop.prepare(batch) for batch in loop.lanes.batches(0, steps)]
    figures = [loop.learner(inputs).figures for inputs in batches]
    weights = {name: p.detach().clone() for name, p in loop.learner.parameters.items()}
    loop.learner.release()
    return figures, weights


@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("aot_eager", {}),
        ("eager", {"precision": "bf16", "queries": 2, "gradient_checkpointing": True}),
    ],
)
def test_one_graph_and_the_same_numbers(
    root: Path,
    tiny_models: Path,
    backend: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The capture is whole, and AOTAutograd splits it into both passes; nothing is generated from
    it, for that takes minutes and a C++ compiler.
    """
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)
    own = SSRTrainingModule.compile
    monkeypatch.setattr(SSRTrainingModule, "compile", lambda self: own(self, backend=counter))
    figures, weights = trained(stage_loop(small_config(root, tiny_models, **fields)))
    assert counter.frame_count == 0
    compiled = trained(stage_loop(small_config(root, tiny_models, compile=True, **fields)))
    assert counter.frame_count == 1, "the attention processors are part of one graph, made once"
    assert not counters["graph_break"]
    close = 2e-2 if fields.get("precision") == "bf16" else 1e-4
    for ours, expected in zip(compiled[0], figures, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=1e-5)
    for name, expected in weights.items():
        moved = (expected - compiled[1][name]).abs().max()
        assert moved < 0.1 * 2e-3, f"{name}: more than a tenth of two steps of AdamW"


def halved(graph: Any, _: Any) -> Any:
    """A compiler that errs: the same values, half of their gradient."""
    return lambda *args: [
        (out + out.detach()) / 2 if out.requires_grad else out for out in graph(*args)
    ]


def test_a_compiler_that_errs_is_refused(
    root: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    own = SSRTrainingModule.compile
    monkeypatch.setattr(SSRTrainingModule, "compile", lambda self: own(self, backend=halved))
    loop = stage_loop(small_config(root, tiny_models, compile=True))
    before = {name: p.detach().clone() for name, p in loop.learner.parameters.items()}
    inputs = loop.prepare(next(iter(loop.lanes.batches(0, 1))))
    with pytest.raises(UserError, match=r"is off by 50%: .* set compile to false"):
        loop.learner.settle(inputs)
    after = loop.learner.parameters
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in after.values())
    loop.learner.release()
