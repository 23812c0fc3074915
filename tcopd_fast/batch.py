"""Stage 5, batch: packed micro-batches whose weighted sums add up to the global mean.

Weights hold the global normaliser of an optimizer step, so neither the number of ranks, nor which rank has which
rollout, nor the micro-batch size changes how a token counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.types import Batch, RewardedRollout


def shard(items: Sequence, world: World) -> list:
    """This rank's part of a global list."""
    return list(items[world.rank :: world.size])


def build_minibatches(
    rewarded: Sequence[RewardedRollout], minibatches: Sequence[int], config: Config, world: World
) -> list[list[Batch]]:
    """One list of micro-batches per optimizer step; every rank gets equally many in each. A collective.

    minibatches: which optimizer step each of this rank's rollouts belongs to; one without any on all ranks is left out.
    """
    members: list[list[int]] = [[] for _ in range(config.learner.minibatches)]
    for i, minibatch in enumerate(minibatches):
        members[minibatch].append(i)
    batches = [_microbatches(indices, rewarded, config, world) for indices in members]
    return [step for step in batches if step]


def _microbatches(
    indices: Sequence[int], rewarded: Sequence[RewardedRollout], config: Config, world: World
) -> list[Batch]:
    rollouts = [rewarded[i].scored.rollout for i in indices]
    totals = world.sum({"tokens": float(sum(len(r.token_ids) for r in rollouts)), "sequences": float(len(rollouts))})
    lengths = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts]
    groups = split_by_tokens(lengths, config.learner.max_tokens_per_microbatch)
    batches = [_batch([indices[g] for g in group], rewarded, config, totals, world) for group in groups]
    most = int(world.max({"microbatches": float(len(batches))})["microbatches"])
    return batches + [_filler()] * (most - len(batches))


def _batch(
    indices: Sequence[int],
    rewarded: Sequence[RewardedRollout],
    config: Config,
    totals: dict[str, float],
    world: World,
) -> Batch:
    items = [rewarded[i] for i in indices]
    rollouts = [item.scored.rollout for item in items]
    weights = []
    for rollout in rollouts:
        length = len(rollout.token_ids)
        if config.objective.aggregation == "token_mean":
            share = 1.0 / totals["tokens"]
        else:
            share = 1.0 / (totals["sequences"] * length)
        # DeepSpeed averages gradients over the ranks; the shares already add up to 1 over all of them.
        weights.append(torch.full((length,), share * world.size))
    old = [item.scored.old_logprob for item in items]
    return Batch(
        indices=tuple(indices),
        lengths=tuple(len(r.token_ids) for r in rollouts),
        tokens=pack([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts]),
        reward=torch.cat([item.reward for item in items]),
        ref_logprob=torch.cat([item.ref_logprob for item in items]),
        rollout_logprob=torch.cat([r.logprobs for r in rollouts]),
        old_logprob=torch.cat([o for o in old if o is not None]) if old[0] is not None else None,
        weights=torch.cat(weights),
    )


def _filler() -> Batch:
    """One token of weight 0, so that every rank runs the same number of forwards and backwards."""
    zero = torch.zeros(1)
    return Batch((), (), pack([[0]], [[0]]), zero, zero, zero, zero, zero)
