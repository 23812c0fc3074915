"""What the throughput benchmark runs, and how a run's timeline becomes its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from teacher_memory_models import Shape

from tcopd_fast.timeline import StepTimeline, throughput_metrics, use

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "miniature.yaml"
STEPS = 10
# The first steps allocate, compile and fill caches.
WARM_UP_STEPS = 3
ROUNDS = 3
RATES = ("rollout/tokens_per_s", "scoring/tokens_per_s", "learner/tokens_per_s", "batch/tokens_per_s")
VLLM = ("rollout.engine=vllm", f"rollout.vllm.kv_cache_memory_bytes={64 << 20}")
SERVER = (*VLLM, "rollout.vllm.mode=server")


@dataclass(frozen=True)
class Cell:
    """One way to generate. apart: its engine has a core of its own."""

    name: str
    title: str
    overrides: tuple[str, ...]
    apart: bool = False


STRICT = Cell("server_0", "vllm, server, staleness 0", (*SERVER, "rollout.staleness=0"), apart=True)
AHEAD = Cell("server_1", "vllm, server, staleness 1", (*SERVER, "rollout.staleness=1"), apart=True)
INSIDE = (
    Cell("hf", "hf", ("rollout.engine=hf",)),
    Cell("colocate", "vllm, colocate", (*VLLM, "rollout.vllm.mode=colocate")),
)


@dataclass(frozen=True)
class Workload:
    """A model and its batch, for some cells. rounds: most that are run. shape: of a random model (or the miniature)."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    rounds: int
    overrides: tuple[str, ...]
    shape: Shape | None = None


# Epochs, prompts and lengths are chosen so that training takes about as long as generating.
WORKLOADS = (
    Workload(
        "miniature",
        "miniature, 0.3M parameters, 128 responses of about 13 tokens",
        (*INSIDE, STRICT, AHEAD),
        2,
        ("rollout.prompts_per_step=128", "learner.epochs=6"),
    ),
    Workload(
        "wider",
        "random Qwen3, 4.2M parameters, 32 responses of 64 tokens",
        (STRICT, AHEAD),
        ROUNDS,
        ("rollout.prompts_per_step=32", "rollout.max_new_tokens=64", "learner.lr=1e-5"),
        Shape(vocab=4096, hidden=256, intermediate=768, layers=4, sequences=32, response_tokens=64),
    ),
)


def overrides(workload: Workload, cell: Cell, run_dir: Path, models: Path, steps: int) -> list[str]:
    """Configuration keys of a run. models: where the random model of a workload with a shape lies."""
    words = [
        f"run_dir={run_dir}", f"steps={steps}", "eval.data=[]", "checkpoint.every=0", "logging.tensorboard=false",
        "logging.token_samples=0", *workload.overrides, *cell.overrides,
    ]  # fmt: skip
    if workload.shape is not None:
        base, other = models / "base", models / "full_1"
        words += [f"model.path={base}", f"teachers.expert.path={other}", f"teachers.anti_expert.path={base}"]
    return words


def numbers(steps: Sequence[StepTimeline]) -> dict[str, Any]:
    """Medians over a run's steps after warm-up, the last one left out: no later batch is generated beside it.

    step_s, generating_s, working_s, both_s: as `timeline.Use`. shares: of the step's wall time, per stage of rank 0 and
    for the engine's `generate`. rates: tokens per second.
    """
    counted = [step for step in steps[WARM_UP_STEPS:-1]]
    uses = [use(step) for step in counted]
    metrics = [throughput_metrics(step) for step in counted]
    shares = [_shares(step) for step in counted]
    return {
        "step_s": median(one.step for one in uses),
        "generating_s": median(one.generating for one in uses),
        "working_s": median(one.working for one in uses),
        "both_s": median(one.both for one in uses),
        "shares": {name: median(one.get(name, 0.0) for one in shares) for name in _names(shares)},
        "rates": {name: median(values) for name in RATES if (values := _finite(metrics, name))},
    }


def _shares(step: StepTimeline) -> dict[str, float]:
    busy = step.busy()
    out = {stage: seconds / step.seconds for stage, seconds in busy["rank 0"].items()}
    return out | {"generate": sum(sum(busy[name].values()) for name in step.engines) / step.seconds}


def _names(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _finite(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if isfinite(row.get(name, float("nan")))]


def over_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median of every number over the rounds."""
    first = rounds[0]
    return {
        key: median(one[key] for one in rounds)
        if not isinstance(value, Mapping)
        else {name: median(one[key].get(name, 0.0) for one in rounds) for name in value}
        for key, value in first.items()
    }


@dataclass(frozen=True)
class Overlap:
    """What generating ahead gains, in seconds per step.

    rollout, learn: time that the engine generated, and that the rank did anything else, in a strictly on-policy step.
    strict, ahead: the step. ratio: ahead / max(rollout, learn). hidden: (strict − ahead) / min(rollout, learn), the
    share of the shorter part that runs beside the longer one. ratio and hidden have one value per round.
    """

    rollout: float
    learn: float
    strict: float
    ahead: float
    ratio: tuple[float, ...]
    hidden: tuple[float, ...]


def overlap(strict: Sequence[Mapping[str, float]], ahead: Sequence[Mapping[str, float]]) -> Overlap:
    """From the rounds with and without staleness, compared round by round."""
    pairs = list(zip(strict, ahead, strict=True))
    return Overlap(
        rollout=median(one["generating_s"] for one in strict),
        learn=median(one["working_s"] for one in strict),
        strict=median(one["step_s"] for one in strict),
        ahead=median(one["step_s"] for one in ahead),
        ratio=tuple(two["step_s"] / max(one["generating_s"], one["working_s"]) for one, two in pairs),
        hidden=tuple(
            (one["step_s"] - two["step_s"]) / min(one["generating_s"], one["working_s"]) for one, two in pairs
        ),
    )
