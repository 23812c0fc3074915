"""Between rollout and scoring: responses move between ranks until all have about as many tokens to work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.scoring import ModelKey
from tcopd_fast.types import Rollout


@dataclass(frozen=True)
class Share:
    """This rank's part of a step, in the order of the step's prompts.

    minibatches: which optimizer step of the batch each rollout belongs to. scores: what frozen models have said of it
    already, model -> float32 [L]. imbalance, imbalance_before: tokens of the fullest rank over the mean of the ranks, 1
    where all are equal, and the same before anything moved.
    """

    rollouts: list[Rollout]
    minibatches: list[int]
    scores: list[dict[ModelKey, Tensor]]
    imbalance: float
    imbalance_before: float


class Item(NamedTuple):
    """What ranks must know of a response to agree: number of its prompt in the step, tokens, where it is."""

    prompt_number: int
    tokens: int
    rank: int
    position: int


def balance(
    rollouts: Sequence[Rollout], scores: Sequence[dict[ModelKey, Tensor]], config: Config, world: World
) -> Share:
    """Every rank's share of the step, with about as many packed tokens in every optimizer step. A collective.

    Minibatch m takes a contiguous range of the step's prompts, which are numbered over all ranks (rank r generated
    every prompt whose number is r modulo the number of ranks), so neither the number of ranks nor who works on what
    changes which tokens an optimizer step sees. Raises UserError when no rank has any.
    """
    samples = config.rollout.samples_per_prompt
    mine = [
        Item(world.rank + i // samples * world.size, len(r.prompt.token_ids) + len(r.token_ids) - 1, world.rank, i)
        for i, r in enumerate(rollouts)
    ]
    everyone = world.gather(mine)
    items = sorted(item for part in everyone for item in part)
    if not items:
        raise world.agreed(
            f"rollout.staleness={config.rollout.staleness}: every response of this step has older tokens and was "
            "dropped; raise it, or lower rollout.partial_share"
        )
    numbers = sorted({item.prompt_number for item in items})
    place = {number: i for i, number in enumerate(numbers)}

    def minibatch(item: Item) -> int:
        return place[item.prompt_number] * config.learner.minibatches // len(numbers)

    owner: dict[tuple[int, int], int] = {}
    for m in range(config.learner.minibatches):
        group = [item for item in items if minibatch(item) == m]
        owner |= dict(zip(((i.rank, i.position) for i in group), assign(group, world.size), strict=True))
    leaving = [(i, rollouts[i], scores[i]) for i in range(len(rollouts)) if owner[world.rank, i] != world.rank]
    moved = {
        (rank, i): (rollout, known)
        for rank, part in enumerate(world.gather(leaving) if world.size > 1 else [])
        for i, rollout, known in part
    }
    own = [item for item in items if owner[item.rank, item.position] == world.rank]
    held = [
        (rollouts[item.position], scores[item.position]) if item.rank == world.rank else moved[item.rank, item.position]
        for item in own
    ]
    return Share(
        [rollout for rollout, _ in held],
        [minibatch(item) for item in own],
        [known for _, known in held],
        _imbalance(items, [owner[item.rank, item.position] for item in items], world.size),
        _imbalance(items, [item.rank for item in items], world.size),
    )


def _imbalance(items: Sequence[Item], ranks: Sequence[int], size: int) -> float:
    loads = [0] * size
    for item, rank in zip(items, ranks, strict=True):
        loads[rank] += item.tokens
    return max(loads) * size / sum(loads)


def assign(items: Sequence[Item], ranks: int) -> list[int]:
    """The rank of each item: longest first, each to the rank with the fewest tokens so far, its own one if equal.

    No rank has more than 4/3 of the tokens that the fullest rank of the best division has (Graham 1969).
    """
    loads = [0] * ranks
    out = [0] * len(items)
    for position in sorted(range(len(items)), key=lambda p: (-items[p].tokens, items[p])):
        item = items[position]
        rank = min(range(ranks), key=lambda r: (loads[r], r != item.rank, r))
        loads[rank] += item.tokens
        out[position] = rank
    return out
