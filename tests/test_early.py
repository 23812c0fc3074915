"""Finished responses are scored while others are generated: once, rightly, and in full forwards only."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from test_models import WORLD, config_for, rollouts

from tcopd_fast.clock import StageClock
from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models
from tcopd_fast.scoring import Scorer
from tcopd_fast.scoring.early import Early
from tcopd_fast.scoring.placement import FrozenModel

LAMBDAS = {"expert": 1.5, "anti": -0.5}


@pytest.fixture
def counted(monkeypatch):
    """How often each model was asked, and for how many responses in all."""
    calls: Counter[str] = Counter()
    original = Scorer.logprobs

    def logprobs(self, key, items, indices, temperature=None):
        calls[key[0]] += 1
        calls[f"responses of {key[0]}"] += len(indices)
        return original(self, key, items, indices, temperature)

    monkeypatch.setattr(Scorer, "logprobs", logprobs)
    return calls


def scorer_for(tiny, tmp_path, placement="resident", budget=20):
    scoring = {"placement": placement, "max_tokens_per_forward": budget, "max_tokens_per_trip": 2 * budget}
    config = config_for(tiny, tmp_path, scoring=scoring)
    return Scorer(config, check_models(config), WORLD)


def items():
    return [item for _ in range(6) for item in rollouts()]


def early_for(scorer, lambdas=LAMBDAS, own_models=True):
    return Early(scorer, lambda rollout: lambdas, StageClock("cpu"), own_models)


def flat(scored):
    return torch.cat([t for item in scored for t in (item.ref_logprob, *item.teacher_logprobs.values())])


def test_scores_taken_early_are_the_scores(tiny, tmp_path, counted):
    scorer, some = scorer_for(tiny, tmp_path), items()
    expected = scorer.score(some, [LAMBDAS] * len(some))
    counted.clear()
    early = early_for(scorer)
    for rollout in reversed(some):
        early.add(rollout)
    known = early.scores(some)
    assert 0 < sum(map(len, known)) < 3 * len(some)
    got = scorer.score(some, [LAMBDAS] * len(some), known=known)
    torch.testing.assert_close(flat(got), flat(expected), rtol=0, atol=2e-5)
    for path in (tiny.student, tiny.expert, tiny.anti):
        assert counted[f"responses of {path}"] == len(some), "every model sees every response once"


def test_it_waits_until_a_forward_is_full(tiny, tmp_path, counted):
    some = items()
    lengths = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in some]
    scorer = scorer_for(tiny, tmp_path, budget=sum(lengths))
    early = early_for(scorer)
    for rollout in some:
        early.add(rollout)
    assert not counted and early.scores(some) == [{}] * len(some)
    early.add(some[0])
    assert counted[str(tiny.expert)] == 1 and counted[f"responses of {tiny.expert}"] == len(some)


def test_streamed_models_wait_for_a_trip_of_their_layers(tiny, tmp_path, counted):
    resident, offload = (scorer_for(tiny, tmp_path, placement) for placement in ("resident", "offload"))
    for scorer in (resident, offload):
        early = early_for(scorer)
        for rollout in items():
            early.add(rollout)
        scorer.asked = dict(counted)
        counted.clear()
    assert 0 < offload.asked[str(tiny.expert)] < resident.asked[str(tiny.expert)]


def test_models_that_ranks_run_together_are_left_alone(tiny, tmp_path, counted):
    scorer = scorer_for(tiny, tmp_path)
    scorer.models = {key: replace(model, tokens_per_trip=None) for key, model in scorer.models.items()}
    assert all(model.collective for model in scorer.models.values())
    early = early_for(scorer)
    for rollout in items():
        early.add(rollout)
    assert not counted


def test_a_teacher_without_weight_is_not_asked(tiny, tmp_path, counted):
    scorer = scorer_for(tiny, tmp_path)
    early = early_for(scorer, {"expert": 1.5, "anti": 0.0})
    for rollout in items():
        early.add(rollout)
    assert counted[str(tiny.expert)] and not counted[str(tiny.anti)]


def test_its_time_is_scoring_even_inside_the_rollout(tiny, tmp_path):
    clock = StageClock("cpu")
    early = Early(scorer_for(tiny, tmp_path), lambda rollout: LAMBDAS, clock, own_models=True)
    with clock.stage("rollout"):
        for rollout in items():
            early.add(rollout)
    metrics = clock.collect().metrics
    assert metrics["time_s/scoring"] > 0 and metrics["time_s/rollout"] >= 0


@dataclass(frozen=True)
class Served:
    """A model in another process, which answers when it is let to."""

    model: FrozenModel
    free: threading.Event
    asked: list[int] = field(default_factory=list)
    served = True
    collective = False
    tokens_per_trip = 20

    def score(self, items, temperature):
        self.asked.append(len(items))
        assert self.free.wait(10)
        return self.model.score(items, temperature)


def test_servers_are_asked_beside_an_engine_of_this_process(tiny, tmp_path, counted):
    scorer, some, free = scorer_for(tiny, tmp_path), items(), threading.Event()
    expected = scorer.score(some, [LAMBDAS] * len(some))
    counted.clear()
    key = scorer.roles["expert"]
    scorer.models[key] = server = Served(scorer.models[key], free)
    early = early_for(scorer, own_models=False)
    for rollout in some:
        early.add(rollout)
    assert counted[str(tiny.student)] == counted[str(tiny.anti)] == 0
    assert len(server.asked) == 1, "what finishes meanwhile waits for its answer"
    free.set()
    known = early.scores(some)
    assert sum(map(len, known)) == server.asked[0]
    torch.testing.assert_close(flat(scorer.score(some, [LAMBDAS] * len(some), known=known)), flat(expected))
    assert sum(server.asked) == len(some)


def test_a_servers_failure_is_met_in_the_scoring(tiny, tmp_path):
    scorer = scorer_for(tiny, tmp_path)
    key = scorer.roles["expert"]

    class Broken(Served):
        def score(self, items, temperature):
            raise UserError("the teacher's server is gone")

    scorer.models[key] = Broken(scorer.models[key], threading.Event())
    early = early_for(scorer, own_models=False)
    with pytest.raises(UserError, match="the teacher's server is gone"):
        for rollout in items():
            early.add(rollout)
        early.scores(items())
