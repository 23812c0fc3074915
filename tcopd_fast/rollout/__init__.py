"""Stage 2, rollout: engines that sample from the current student, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tcopd_fast.types import Prompt, Rollout


class Weights(Protocol):
    """The learner's weights: every parameter once, under its Hugging Face name."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh pass of (name, whole tensor), valid until the next one is asked for. A collective under ZeRO-3."""
        ...

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) in the order of a pass; gathers nothing."""
        ...


class RolloutEngine(Protocol):
    """What the trainer and the evaluation need of a sampler.

    version counts the weight syncs so far; every Rollout carries it.
    """

    version: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Sample `samples` responses per prompt; the result is prompt-major: prompt 0's samples first.

        temperature 0 is greedy (logprobs are then those at temperature 1). `on_finished` is called once per
        response as it ends, in any order. hf: equal weights, prompts and seed give equal samples.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Copy the learner's weights (Hugging Face parameter names) in place and stamp the version."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of this kind of engine for the step's metrics; equal on every rank."""
        ...

    def sleep(self) -> None:
        """Leave the device to the learner until the next `load_weights`, where the engine can."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
