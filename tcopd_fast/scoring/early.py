"""Scoring of finished responses while others are still generated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from torch import Tensor

from tcopd_fast.clock import StageClock
from tcopd_fast.scoring import ModelKey, Scorer
from tcopd_fast.types import Rollout


class Early:
    """Collects the responses of a step as they finish, and scores them in whole forwards.

    A model scores when a forward (for a streamed one a trip of its layers) is full, so that nothing is packed less
    tightly than it would be later; a served one when a request is full and its last answers are there. What does not
    fill one, and models that all ranks run together, are left to `Scorer.score`.

    lambdas_of: the coefficients of one response, as `Scorer.score` takes them. own_models: whether this process has
    time for models of its own, because another one generates.
    """

    def __init__(
        self,
        scorer: Scorer,
        lambdas_of: Callable[[Rollout], Mapping[str, float]],
        clock: StageClock,
        own_models: bool,
    ) -> None:
        self._scorer, self._lambdas_of, self._clock, self._own_models = scorer, lambdas_of, clock, own_models
        self._waiting: dict[ModelKey, list[Rollout]] = {}
        self._asked: dict[ModelKey, Future[None]] = {}
        self._scores: dict[int, dict[ModelKey, Tensor]] = {}

    def add(self, rollout: Rollout) -> None:
        """Take a finished response; scores those that came before it when it does not fit beside them."""
        for key in self._scorer.keys_for(self._lambdas_of(rollout)):
            model = self._scorer.models[key]
            if model.tokens_per_trip is None or not (self._own_models or model.served):
                continue
            waiting = self._waiting.setdefault(key, [])
            if waiting and _tokens([*waiting, rollout]) > model.tokens_per_trip:
                if not model.served:
                    with self._clock.stage("scoring"):
                        self._score(key, waiting)
                    waiting.clear()
                elif key not in self._asked or self._asked[key].done():
                    self._ask(key, list(waiting))
                    waiting.clear()
            waiting.append(rollout)

    def scores(self, rollouts: Sequence[Rollout]) -> list[dict[ModelKey, Tensor]]:
        """What is known of each of these responses, model -> float32 [L], once servers have answered what they were
        asked. Raises UserError as their models' `score`."""
        for answer in self._asked.values():
            answer.result()
        return [self._scores.get(id(rollout), {}) for rollout in rollouts]

    def _score(self, key: ModelKey, rollouts: Sequence[Rollout]) -> None:
        for i, logprob in self._scorer.logprobs(key, rollouts, range(len(rollouts))).items():
            self._scores.setdefault(id(rollouts[i]), {})[key] = logprob

    def _ask(self, key: ModelKey, rollouts: Sequence[Rollout]) -> None:
        """As `_score`, in a thread. It ends with the process: a run that is told to stop does not wait for a server."""
        answer = self._asked.get(key)
        if answer is not None:
            answer.result()
        done: Future[None] = Future()
        self._asked[key] = done

        def work() -> None:
            try:
                self._score(key, rollouts)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=work, name="early scoring", daemon=True).start()


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts)
