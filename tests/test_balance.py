"""Responses moved between ranks: nobody's is lost, tokens are balanced, optimizer steps see the same prompts."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import pytest
import torch
from test_reward import config_with

from tcopd_fast.balance import Item, Share, assign, balance
from tcopd_fast.batch import shard
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt, Rollout

ONE = World(0, 1, torch.device("cpu"))


@dataclass
class Meeting:
    """Ranks as threads that hand each other objects."""

    size: int
    slots: dict[int, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def gather(self, rank: int, value: object) -> list:
        self.slots[rank] = value
        self.barrier.wait(10)
        out = [self.slots[r] for r in range(self.size)]
        self.barrier.wait(10)
        return out


def configured(minibatches: int = 1, samples: int = 1):
    config = config_with({"a": 1.0}, ("a",))
    learner = config.learner.model_copy(update={"minibatches": minibatches})
    rollout = config.rollout.model_copy(update={"samples_per_prompt": samples})
    return config.model_copy(update={"learner": learner, "rollout": rollout})


def rollouts(lengths: list[int], samples: int = 1) -> list[Rollout]:
    """One prompt of 3 tokens per `samples` responses."""
    out = []
    for i, length in enumerate(lengths):
        prompt = Prompt(str(i // samples), "d", (1, 2, 3), "", None, "test")
        out.append(Rollout(prompt, i % samples, (4,) * length, torch.zeros(length), "stop", 0, ""))
    return out


def tokens(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.token_ids) - 1


def on_ranks(size: int, parts: list[list[Rollout]], config, monkeypatch) -> list[Share]:
    """`balance` on every rank, each in a thread of its own."""
    meeting = Meeting(size)
    monkeypatch.setattr(World, "gather", lambda self, value: meeting.gather(self.rank, value))
    shares: dict[int, Share] = {}

    def rank(r: int) -> None:
        scores = [{("m", "float32"): torch.full((len(x.token_ids),), float(r))} for x in parts[r]]
        shares[r] = balance(parts[r], scores, config, World(r, size, torch.device("cpu")))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [shares[r] for r in range(size)]


@pytest.mark.parametrize(("size", "minibatches", "samples"), [(1, 3, 1), (2, 1, 2), (2, 3, 1), (3, 2, 4)])
def test_nothing_is_lost_and_every_step_sees_the_prompts_that_one_rank_would(size, minibatches, samples, monkeypatch):
    lengths = [random.Random(1).randint(1, 200) for _ in range(12 * samples)]
    items = rollouts(lengths, samples)
    config = configured(minibatches, samples)
    prompts = [items[i * samples : (i + 1) * samples] for i in range(12)]
    parts = [[r for group in shard(prompts, World(r, size, ONE.device)) for r in group] for r in range(size)]
    shares = on_ranks(size, parts, config, monkeypatch)
    seen = sorted(
        (int(r.prompt.id), r.sample, minibatch)
        for share in shares
        for r, minibatch in zip(share.rollouts, share.minibatches, strict=True)
    )
    assert seen == [(i, s, i * minibatches // 12) for i in range(12) for s in range(samples)]
    for share in shares:
        assert len(share.rollouts) == len(share.minibatches) == len(share.scores)
        for rollout, known in zip(share.rollouts, share.scores, strict=True):
            (score,) = known.values()
            assert len(score) == len(rollout.token_ids)
            # What a model said of a response goes with it.
            assert float(score[0]) == int(rollout.prompt.id) % size
        order = [(m, int(r.prompt.id), r.sample) for r, m in zip(share.rollouts, share.minibatches, strict=True)]
        assert order == sorted(order)


def test_one_long_tail_is_spread(monkeypatch):
    long, short = [1000, 900, 800, 700], [10, 10, 10, 10]
    shares = on_ranks(2, [rollouts(long), rollouts(short)], configured(), monkeypatch)
    loads = [sum(map(tokens, share.rollouts)) for share in shares]
    assert max(loads) < 1.02 * sum(loads) / 2
    assert shares[0].imbalance == shares[1].imbalance == pytest.approx(max(loads) * 2 / sum(loads))
    assert shares[0].imbalance_before == pytest.approx(2 * 3408 / 3456)


def test_a_balanced_batch_stays_where_it_is(monkeypatch):
    parts = [rollouts([50, 40, 30]), rollouts([50, 40, 30])]
    for r, share in enumerate(on_ranks(2, parts, configured(), monkeypatch)):
        assert all(a is b for a, b in zip(share.rollouts, parts[r], strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_has_more_than_the_bound(seed):
    """The best division's fullest rank has at least the mean, and at least the longest item."""
    random_ = random.Random(seed)
    items = [Item(i, random_.choice([random_.randint(1, 50), random_.randint(1, 5000)]), i % 8, i) for i in range(64)]
    ranks = assign(items, 8)
    loads = [sum(item.tokens for item, r in zip(items, ranks, strict=True) if r == rank) for rank in range(8)]
    least = max(sum(loads) / 8, *(item.tokens for item in items))
    assert max(loads) <= (4 / 3) * least
    assert ranks == assign(items, 8)


def test_a_step_without_responses_is_refused():
    with pytest.raises(UserError, match=r"rollout\.staleness=0: every response of this step has older tokens"):
        balance([], [], configured(), ONE)
