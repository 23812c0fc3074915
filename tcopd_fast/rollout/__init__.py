"""Stage 2, rollout: engines that sample from the current student, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tcopd_fast.timeline import Span
from tcopd_fast.types import Prompt, Rollout


def response_limit(prompt: Prompt, max_new_tokens: int) -> int:
    """Most tokens of a response to `prompt` when no response may be longer than `max_new_tokens`."""
    return max_new_tokens if prompt.max_new_tokens is None else min(max_new_tokens, prompt.max_new_tokens)


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

    version counts the weight syncs so far; every Rollout carries it. apart: it generates in processes of its own, so
    that this one can work meanwhile.
    """

    version: int
    apart: bool

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
        response as it ends, in any order. A prompt's own limit holds where it is lower than `max_new_tokens`.
        hf: equal weights, prompts and seed give equal samples.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Copy the learner's weights (Hugging Face parameter names) in place and stamp the version."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of this kind of engine for the step's metrics; equal on every rank."""
        ...

    def spans(self, until: float) -> dict[str, list[Span]]:
        """Track ("engine N") -> when it generated for this rank since the last call, up to `until`, epoch seconds.

        Empty for an engine in this process, whose time is that of the stage that waits for it.
        """
        ...

    def sleep(self) -> None:
        """Leave the device to the learner until the next `load_weights`, where the engine can."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
