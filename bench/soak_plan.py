"""What the soak consists of: its run, its faults and when they come, and what counts as flat memory."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "miniature.yaml"
STEPS = 200
MIN_STEPS = 60
RANKS = 2
STALENESS = 1
CHECKPOINT_EVERY = 5
LONGEST_DELAY_S = 1.5
# Memory counts as flat when the last quarter of a process's life is within this share of the quarter after warm-up.
WARM_UP_STEPS = 15
MIN_LIFE_STEPS = 40
FLAT_SHARE = 0.05
# The soak learned as the unbroken run did when it gained at least this share of what that gained.
GAIN_SHARE = 0.75
UNBROKEN = "unbroken run's rank"
"""Name of the life that nothing happened to, the longest one."""

ENGINE_KILLED = "engine killed"
ENGINE_STOPPED = "engine stopped"
RANK_KILLED = "rank killed"
RANK_KILLED_DAMAGED = "rank killed, newest checkpoint damaged"
TERMINATED = "SIGTERM"
JUDGE_HANGS = "judge hangs"
JUDGE_EXITS = "judge exits"
NO_ROOM = "no room for checkpoints"
ENDING = (RANK_KILLED, RANK_KILLED_DAMAGED, TERMINATED)
"""Faults that end the run, which is then resumed."""


@dataclass(frozen=True)
class Window:
    """A fault comes at a random moment after one of the steps first … last, of STEPS."""

    kind: str
    first: int
    last: int


# Faults of the engine come early in a life of the trainer: what is left of it is the new engine's life.
WINDOWS = (
    Window(JUDGE_HANGS, 6, 9),
    Window(NO_ROOM, 14, 19),
    Window(JUDGE_EXITS, 28, 32),
    Window(RANK_KILLED, 45, 48),
    Window(ENGINE_KILLED, 49, 50),
    Window(ENGINE_KILLED, 53, 55),
    Window(TERMINATED, 101, 104),
    Window(ENGINE_STOPPED, 105, 107),
    Window(RANK_KILLED_DAMAGED, 151, 153),
    Window(ENGINE_KILLED, 154, 156),
)


@dataclass(frozen=True)
class Fault:
    """One fault: kind, delay_s seconds after the first `step` steps are logged. rank: whom it hits, where it is one."""

    kind: str
    step: int
    delay_s: float
    rank: int


def schedule(seed: int, steps: int = STEPS) -> list[Fault]:
    """The faults of a run, in order; equal seeds give equal faults. With fewer steps than STEPS they come closer."""
    chance = random.Random(seed)
    return [
        Fault(
            window.kind,
            round(chance.randint(window.first, window.last) * steps / STEPS),
            round(chance.uniform(0.0, LONGEST_DELAY_S), 3),
            chance.randrange(RANKS),
        )
        for window in WINDOWS
    ]


def overrides(steps: int, run_dir: Path, seed: int) -> list[str]:
    """Configuration keys of the soak and of the unbroken run that it is compared with."""
    return [
        f"run_dir={run_dir}", f"steps={steps}", f"seed={seed}", "rollout.prompts_per_step=64", "eval.every=0",
        "eval.samples=2", f"checkpoint.every={CHECKPOINT_EVERY}", "checkpoint.keep_last=3",
        "logging.tensorboard=false", "logging.token_samples=0", "judge.default=soak_judge:verdict", "judge.timeout_s=3",
    ]  # fmt: skip


def soak_overrides() -> list[str]:
    """What the soak has beyond the unbroken run: an engine in a process of its own, one batch ahead."""
    return [
        "rollout.engine=vllm", "rollout.vllm.mode=server", f"rollout.staleness={STALENESS}",
        f"rollout.vllm.kv_cache_memory_bytes={32 << 20}", "rollout.vllm.server.request_timeout_s=30",
    ]  # fmt: skip


def train_command(words: Sequence[str], ranks: int) -> list[str]:
    """`tcopd train` with this interpreter."""
    return [sys.executable, "-m", "tcopd_fast.cli", "train", "--ranks", str(ranks), *words]


@dataclass(frozen=True)
class Sample:
    """Memory of a process with its children, bytes, `t` seconds into the soak, with `step` steps logged."""

    t: float
    step: int
    resident: int
    anonymous: int


@dataclass(frozen=True)
class Flatness:
    """Medians of the resident set, bytes: of the quarter of a life after warm-up, and of its last quarter.

    flat: None when the life was shorter than MIN_LIFE_STEPS. per_100_steps: bytes of anonymous memory, Theil–Sen slope
    over the second half of the life: what would add up over a night.
    """

    steps: int
    early: float
    late: float
    per_100_steps: float
    flat: bool | None

    @property
    def change(self) -> float:
        """Relative to the early median."""
        return self.late / self.early - 1 if self.early else 0.0


def flatness(samples: Sequence[Sample]) -> Flatness:
    """The criterion, for one process's life. Raises ValueError without samples.

    Samples after its last logged step do not count: an evaluation may follow, a last checkpoint, the process's end.
    """
    if not samples:
        raise ValueError("flatness: no samples of this process")
    first, last = samples[0].step, samples[-1].step
    steps, begin = last - first, first + WARM_UP_STEPS
    quarter = steps / 4
    trained = [s for s in samples if s.step < last]
    early = [s.resident for s in trained if begin <= s.step <= begin + quarter]
    late = [s.resident for s in trained if s.step >= last - quarter]
    if steps < MIN_LIFE_STEPS or not early:
        return Flatness(steps, float(samples[0].resident), float(samples[-1].resident), 0.0, None)
    one, two = median(early), median(late)
    slope = theil_sen([(s.step, s.anonymous) for s in trained if s.step >= first + steps / 2])
    return Flatness(steps, one, two, 100 * slope, abs(two / one - 1) <= FLAT_SHARE)


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """Median of the slopes of all pairs of points with different x; 0 when there is none."""
    slopes = [
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 != x1
    ]
    return median(slopes) if slopes else 0.0
