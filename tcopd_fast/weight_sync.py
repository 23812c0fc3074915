"""Stage 8, weight_sync: the learner's weights into the rollout engine, in place, version stamped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tcopd_fast.adapter import student_tensors
from tcopd_fast.learner import Learner
from tcopd_fast.rollout import RolloutEngine


class LearnerWeights:
    """The learner's present weights, read when they are iterated (`rollout.Weights`)."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.learner.named_weights()

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, whole shape) of every weight; under ZeRO-3 the shard itself has another shape."""
        return [
            (tensor.name, tensor.weight.dtype, tuple(getattr(tensor.weight, "ds_shape", tensor.weight.shape)))
            for tensor in student_tensors(self.learner.lm.model)
        ]


def sync_weights(learner: Learner, engine: RolloutEngine, version: int) -> int:
    """Copy every weight (gathered one at a time under ZeRO-3), stamp `version` and return it.

    A collective under ZeRO-3 and with engines in processes of their own: every rank must call it. No file is written.
    """
    engine.load_weights(LearnerWeights(learner), version)
    return engine.version
