"""One launch or several: how the vocabulary of M models is cut into programs, and what that is predicted to cost.

A program computes some vocabulary tiles of one row block of one model. The model of time is a list schedule:
P programs of at most c microseconds each, one at a time on each multiprocessor, end within ⌈P / multiprocessors⌉·c.
`plan` chooses the cut with the smallest such bound. Several launches cost the sum of their own plans, one launch the
plan of all programs together, so it saves the idle multiprocessors at the end of each launch and the launches.

The rates below are those of an H100-class GPU, set from data sheets and not measured: the choice that
`choose_launch` makes is a prediction until bench/multi_launch.py has been run on the GPU in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

LAUNCHES = ("auto", "joint", "separate")

FLOP_PER_US = 4.5e6  # of one multiprocessor in a half-precision matrix product
BYTES_PER_US = 22e3  # of one multiprocessor's share of the memory bandwidth
PROGRAM_US = 1.0  # a program before its first and after its last tile
GAP_US = 4.0  # idle GPU between dependent launches: drain, launch, combine, fill
HOST_US = 60.0  # Python and driver time of one call of the forward; the GPU waits for it when it is longer
MOST_WAVES = 8
# One launch sets up its TMA descriptors on the device and shares one tile shape; it must promise at least this gain.
LEAST_GAIN = 0.03


class Work(NamedTuple):
    """One model: vocabulary tiles, and the time of one tile of one row block on one multiprocessor."""

    tiles: int
    tile_us: float


class Plan(NamedTuple):
    """tiles_per_split of each model, and the bound of the time of all programs in microseconds."""

    tiles_per_split: tuple[int, ...]
    time_us: float


def work(V: int, D: int, itemsize: int, block_m: int, block_n: int, row_blocks: int) -> Work:
    """A tile costs its arithmetic or its share of reading the weight once, whichever takes longer."""
    arithmetic = 2 * block_m * block_n * D / FLOP_PER_US
    reading = block_n * D * itemsize / row_blocks / BYTES_PER_US
    return Work(-(-V // block_n), max(arithmetic, reading))


@lru_cache(maxsize=1024)
def plan(works: tuple[Work, ...], row_blocks: int, multiprocessors: int) -> Plan:
    """The cut with the smallest time bound; among equals the one with most programs."""
    fewest = -(-len(works) * row_blocks // multiprocessors)
    best = _cut(works, row_blocks, multiprocessors, fewest)
    for waves in range(fewest + 1, MOST_WAVES + 1):
        candidate = _cut(works, row_blocks, multiprocessors, waves)
        if candidate.time_us <= best.time_us:
            best = candidate
    return best


def _cut(works: Sequence[Work], row_blocks: int, multiprocessors: int, waves: int) -> Plan:
    """Splits of about equal time whose programs fit `waves` rounds of all multiprocessors."""
    most_programs = waves * multiprocessors
    total_us = row_blocks * sum(w.tiles * w.tile_us for w in works)
    split_us = total_us / most_programs
    while True:
        tiles = [min(w.tiles, max(1, int(split_us / w.tile_us))) for w in works]
        programs = row_blocks * sum(-(-w.tiles // t) for w, t in zip(works, tiles, strict=True))
        if programs <= most_programs:
            break
        split_us *= 1.02
    longest_us = PROGRAM_US + max(t * w.tile_us for w, t in zip(works, tiles, strict=True))
    rounds = -(-programs // multiprocessors)
    busy_us = (total_us + programs * PROGRAM_US) / multiprocessors
    return Plan(tuple(tiles), min(rounds * longest_us, busy_us + longest_us))


def predicted_us(
    groups: Sequence[Sequence[Work]], row_blocks: Sequence[int], multiprocessors: int
) -> tuple[float, float]:
    """(one launch per group, one per model), with what the launches themselves cost. row_blocks: of each group."""

    def call_us(part: Sequence[Work], blocks: int) -> float:
        return max(HOST_US, GAP_US + plan(tuple(part), blocks, multiprocessors).time_us)

    together = list(zip(groups, row_blocks, strict=True))
    return (
        sum(call_us(group, blocks) for group, blocks in together),
        sum(call_us((w,), blocks) for group, blocks in together for w in group),
    )


def choose_launch(joint_us: float, separate_us: float) -> str:
    """ "joint" where one launch per group promises to save at least LEAST_GAIN, else "separate"."""
    return "joint" if joint_us <= (1 - LEAST_GAIN) * separate_us else "separate"
