"""What the λ < 0 experiment consists of: settings, guards, and where each run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table1_plan
from table1_plan import CONFIG, Run

from tcopd_fast.config_io import load_config

EVAL_SAMPLES = 2
EXPERT = 1.5
GUARDS: dict[str, dict[str, float]] = {
    "none": {},
    "logratio_clamp": {"logratio_clamp": 1.4},
    "advantage_clamp": {"advantage_clamp": 0.6},
    "warm-up": {"lambda_warmup_steps": 20},
    "ref KL": {"ref_kl_coef": 2.0},
}
GUARDS["all"] = {key: value for guard in GUARDS.values() for key, value in guard.items()}
"""Guard -> its keys under `objective`. Set beforehand from the run at λ = −0.5, seed 0: the clamps near the 95%
quantiles of |log-ratio| (both teachers) and |A|, the ref KL near the 99.9% quantile of |A|; the warm-up is half of the
40 steps."""
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Row:
    """One trained setting: λ of the anti-expert, normalizer, guard."""

    anti_expert: float
    normalizer: str
    guard: str

    @property
    def key(self) -> str:
        """Name of its folder, for example `6_none_ref_kl`."""
        return f"{-self.anti_expert:g}_{self.normalizer}_{self.guard.lower().replace(' ', '_')}"

    def overrides(self) -> list[str]:
        """The row's own configuration keys."""
        words = [f"objective.lambdas.expert={EXPERT:g}", f"objective.lambdas.anti_expert={self.anti_expert:g}"]
        words += [f"objective.normalizer={self.normalizer}"]
        words += [f"objective.{key}={value:g}" for key, value in GUARDS[self.guard].items()]
        return [*words, "logging.token_samples=128"] if self in SAMPLED else words


NORMAL = Row(-0.5, "active", "none")
"""The project's normal setting, which the others are seen against."""
HARMFUL = (-6.0, "none")
"""λ of the anti-expert and normalizer of the figure."""
SAMPLED = (NORMAL, Row(*HARMFUL, "none"))
"""Rows whose whole batches are kept, for the distribution of their log-ratios and advantages."""
ROWS = (
    NORMAL,
    Row(-1.5, "active", "none"),
    Row(-1.5, "active", "all"),
    Row(-3.0, "active", "none"),
    Row(-3.0, "none", "none"),
    Row(-6.0, "active", "none"),
    *(Row(*HARMFUL, guard) for guard in GUARDS),
)


def plan(out: Path, seeds: int) -> list[Run]:
    """Every run, seeds outermost: an interrupted experiment has all rows for the seeds it got through."""
    return [Run(row, seed, out / row.key / f"seed{seed}") for seed in range(seeds) for row in ROWS]


def shared_overrides(steps: int, limit: int | None) -> list[str]:
    """Configuration keys common to all runs."""
    return [*table1_plan.shared_overrides(steps, limit), f"eval.samples={EVAL_SAMPLES}", "logging.tensorboard=false"]


def recipe_of(steps: int, limit: int | None) -> dict[str, Any]:
    """Everything but rows and seeds that decides the numbers."""
    config = load_config(CONFIG, shared_overrides(steps, limit)).model_dump(mode="json")
    del config["run_dir"], config["seed"], config["objective"]["lambdas"], config["objective"]["normalizer"]
    sha256 = table1_plan.make_recipe(steps, limit)["sha256"]
    return {"steps": steps, "limit": limit, "guards": GUARDS, "sha256": sha256, "config": config}
