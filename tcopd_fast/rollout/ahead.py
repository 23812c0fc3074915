"""Generation of later batches while the learner works (`rollout.staleness` above 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.rollout.requests import Ticket
from tcopd_fast.rollout.vllm_server import ServerEngine
from tcopd_fast.types import Prompt, Rollout


class Ahead:
    """Keeps batches under way beyond the one being trained on.

    Step s is asked for while step s − ahead is trained on. A response that is still running at a weight sync goes on
    with the new weights; every token keeps the logprob of the weights it was sampled with. Without `partial_share`
    ahead = staleness, so that at most `staleness` syncs lie between a token and its update. With it ahead =
    staleness − 1, that share of a step's responses is not waited for, and they join the batch of the step in which they
    finish, unless some of their tokens are by then more than `staleness` syncs old.

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
        self._ahead = config.staleness - bool(config.partial_share)
        self._asked: dict[int, int] = {}
        """Step -> responses that were asked for."""
        self._ticket = Ticket()

    def take(self, step: int, on_finished: Callable[[Rollout], None]) -> list[Rollout]:
        """This rank's responses to train on in a step, older batches' first. A collective.

        Responses of later steps are asked for before it waits. The last step waits for all that are left.
        """
        for later in range(step, min(step + self._ahead, self._steps - 1) + 1):
            if later not in self._asked:
                self._ask(later)
        return self._engine.collect(
            self._ticket,
            on_finished,
            batch=step,
            unfinished=0 if step == self._steps - 1 else int(self._config.partial_share * self._asked[step]),
            oldest=step - self._config.staleness,
        )

    def metrics(self, step: int) -> dict[str, float]:
        """What partial batches did so far, on this rank: responses dropped, and those that go on beyond this step."""
        return {
            "rollout/dropped_stale": float(self._ticket.dropped),
            "rollout/carried_on": float(self._ticket.under_way(step)),
        }

    def _ask(self, step: int) -> None:
        prompts = self._prompts_of(step)
        self._asked[step] = len(prompts) * self._config.samples_per_prompt
        self._engine.submit(
            prompts,
            samples=self._config.samples_per_prompt,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            seed=self._seed_of(step),
            ticket=self._ticket,
            batch=step,
        )
