"""Generation of later batches while the learner works (`rollout.staleness` above 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.rollout.requests import Ticket
from tcopd_fast.rollout.vllm_server import ServerEngine
from tcopd_fast.types import Prompt, Rollout


class Ahead:
    """Keeps `staleness` batches under way beyond the one being trained on.

    Step s is asked for while step s − staleness is trained on, so that at most `staleness` weight syncs lie between a
    token and its update. A response that is still running at a sync goes on with the new weights; every token keeps
    the logprob of the weights it was sampled with.

    prompts_of: this rank's prompts of a step. seed_of: the seed of its sampling. steps: of the whole run.
    """

    def __init__(
        self,
        engine: ServerEngine,
        config: RolloutConfig,
        prompts_of: Callable[[int], Sequence[Prompt]],
        seed_of: Callable[[int], int],
        steps: int,
    ) -> None:
        self._engine, self._config, self._prompts_of, self._seed_of = engine, config, prompts_of, seed_of
        self._steps = steps
        self._under_way: dict[int, tuple[Sequence[Prompt], Ticket]] = {}

    def take(self, step: int, on_finished: Callable[[Rollout], None]) -> list[Rollout]:
        """The responses of a step, prompt-major; those of later steps are asked for first. A collective."""
        for later in range(step, min(step + self._config.staleness, self._steps - 1) + 1):
            if later not in self._under_way:
                self._under_way[later] = self._ask(later)
        prompts, ticket = self._under_way.pop(step)
        return self._engine.collect(ticket, prompts, self._config.samples_per_prompt, on_finished)

    def _ask(self, step: int) -> tuple[Sequence[Prompt], Ticket]:
        prompts = self._prompts_of(step)
        ticket = self._engine.submit(
            prompts,
            samples=self._config.samples_per_prompt,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            seed=self._seed_of(step),
        )
        return prompts, ticket
