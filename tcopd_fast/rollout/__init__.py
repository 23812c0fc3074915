"""Stage 2, rollout: engines that sample from the current student, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from tcopd_fast.types import Prompt, Rollout


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

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the learner's weights (Hugging Face parameter names) in place and stamp the version."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
