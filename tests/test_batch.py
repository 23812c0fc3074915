from __future__ import annotations

import pytest
import torch
from test_reward import config_with, scored

from tcopd_fast.batch import build_minibatches
from tcopd_fast.dist import World
from tcopd_fast.types import RewardedRollout

ONE = World(0, 1, torch.device("cpu"))


def rewarded(count: int) -> list[RewardedRollout]:
    items = [scored(i, 1 + i % 5, ["a"]) for i in range(count)]
    return [RewardedRollout(i, i.old_logprob, i.ref_logprob, {"a": 1.0}, None) for i in items]


def configured(minibatches=1, budget=16, prompts=12, aggregation="token_mean"):
    config = config_with({"a": 1.0}, ("a",), aggregation=aggregation)
    learner = config.learner.model_copy(update={"minibatches": minibatches, "max_tokens_per_microbatch": budget})
    rollout = config.rollout.model_copy(update={"prompts_per_step": prompts})
    return config.model_copy(update={"learner": learner, "rollout": rollout})


def thirds(count: int) -> list[int]:
    return [i * 3 // count for i in range(count)]


@pytest.mark.parametrize("budget", [4, 9, 1000])
@pytest.mark.parametrize("aggregation", ["token_mean", "gopd_compat"])
def test_weights_of_every_optimizer_step_sum_to_one(budget, aggregation):
    for batches in build_minibatches(rewarded(12), thirds(12), configured(3, budget, aggregation=aggregation), ONE):
        assert sum(float(b.weights.sum()) for b in batches) == pytest.approx(1.0, abs=1e-6)


def test_gopd_compat_is_the_mean_over_sequences_of_token_means():
    items = rewarded(6)
    [batches] = build_minibatches(items, [0] * 6, configured(prompts=6, aggregation="gopd_compat"), ONE)
    got = sum(float((b.weights * b.reward).sum()) for b in batches)
    expected = sum(float(i.reward.mean()) for i in items) / 6
    assert got == pytest.approx(expected, abs=1e-5)


def test_every_rollout_is_trained_once_with_its_own_numbers():
    items = rewarded(12)
    seen = []
    for batches in build_minibatches(items, thirds(12), configured(3, 9), ONE):
        for b in batches:
            rewards = b.reward.split(b.lengths)
            for index, reward in zip(b.indices, rewards, strict=True):
                seen.append(index)
                torch.testing.assert_close(reward, items[index].reward)
            assert b.tokens.targets.numel() == b.weights.numel() == sum(b.lengths)
    assert sorted(seen) == list(range(12))
