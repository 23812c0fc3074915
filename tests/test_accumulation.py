"""How often gradients travel between the ranks: counted, not believed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from learners import on_learner
from torch.utils._python_dispatch import TorchDispatchMode

SUMS = ("allreduce", "reduce_scatter", "reduce_")
# Smaller ones carry norms and flags, not gradients.
LEAST_WEIGHTS = 1000


class Traffic(TorchDispatchMode):
    """Counts the collectives that sum at least LEAST_WEIGHTS numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d::") and any(word in name for word in SUMS):
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            self.calls[name] += max((t.numel() for t in tensors), default=0) >= LEAST_WEIGHTS
        return function(*args, **(kwargs or {}))


def count(learner, world, config, inputs):
    """Sums of gradients in every micro-batch's backward and in the optimizer's step, for two steps of three."""
    from tcopd_fast.packing import pack

    def loss(lm, tokens):
        return -lm.logprobs(tokens, temperature=1.0).logprob.mean()

    steps = []
    for _ in range(2):
        backward = []
        for _ in range(3):
            value = learner.engine(loss, pack([[3, 4, 5]], [[6, 7, 1]]))
            with Traffic() as traffic:
                learner.engine.backward(value, scale_wrt_gas=False)
            backward.append(sum(traffic.calls.values()))
        with Traffic() as traffic:
            learner.engine.step()
        steps.append((backward, sum(traffic.calls.values())))
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_1_sums_gradients_once_per_optimizer_step(tiny, tmp_path, stage, dtype):
    """ZeRO 2 and 3 keep no whole gradients between micro-batches, so they sum in every one; ZeRO 1 only in its step."""
    tree = tiny.tree(tmp_path / "run", model={"dtype": dtype}, learner={"zero_stage": stage})
    for steps in on_learner(count, tree, tmp_path / "ranks", size=2):
        for backward, step in steps:
            if stage == 1:
                assert backward == [0, 0, 0] and step == 1
            else:
                assert all(n >= 1 for n in backward) and step == 0
