"""Stage 5, batch: packed micro-batches whose weighted sums add up to the global mean.

A step's prompts are numbered over all ranks; minibatch m takes a contiguous range of them and rank r every
prompt whose number is r modulo the number of ranks. So neither the number of ranks nor the micro-batch size
changes which tokens an optimizer step sees or how they are weighted.
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


def minibatch_of(prompt_number: int, config: Config) -> int:
    """Which optimizer step of the batch a prompt belongs to."""
    return prompt_number * config.learner.minibatches // config.rollout.prompts_per_step


def build_minibatches(rewarded: Sequence[RewardedRollout], config: Config, world: World) -> list[list[Batch]]:
    """One list of micro-batches per optimizer step; every rank gets equally many in each.

    `rewarded` is this rank's share in prompt-major order.
    """
    samples = config.rollout.samples_per_prompt
    members: list[list[int]] = [[] for _ in range(config.learner.minibatches)]
    for i in range(len(rewarded)):
        members[minibatch_of(world.rank + i // samples * world.size, config)].append(i)
    return [_microbatches(indices, rewarded, config, world) for indices in members]


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
