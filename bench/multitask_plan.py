"""What the two-domain table consists of: its rows, its recipe, and where each run lies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table1_plan import EVAL_EVERY, EVAL_SAMPLES, FINAL, ROOT, Run

from tcopd_fast import miniature
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config

CONFIG = ROOT / "configs" / "miniature_multitask.yaml"
SETS = {"math": "miniature:heldout", "largest": "miniature:heldout_largest"}
"""Domain -> its held-out problems; both have 512."""
EXPERTS = {"math": "math_expert", "largest": "largest_expert"}
BASELINES = {"base": "student (base)", "expert": "math expert", "largest_expert": "largest expert"}


@dataclass(frozen=True)
class Row:
    """One trained setting.

    own, other: λ of a domain's own expert and of the other domain's. normalizer is None where every normalizer gives
    the same objective (one active teacher). domains: those trained on, at equal shares of every step's prompts.
    """

    key: str
    label: str
    own: float
    other: float
    normalizer: str | None
    domains: tuple[str, ...] = tuple(SETS)

    def overrides(self) -> list[str]:
        """The row's own configuration keys."""
        words = [f"data.domain_weights.{domain}={int(domain in self.domains)}" for domain in SETS]
        for domain in SETS:
            for of, expert in EXPERTS.items():
                words.append(f"objective.lambdas.{domain}.{expert}={self.own if of == domain else self.other:g}")
        return [*words, f"objective.normalizer={self.normalizer or 'none'}"]


REFERENCE_ROW = "exopd"
"""Differences are taken to this row, seed by seed."""
ROWS = (
    Row("mopd", "MOPD", 1.0, 0.0, None),
    Row("exopd", "ExOPD", 1.5, 0.0, None),
    Row("contrast_0.5_none", "contrast", 1.5, -0.5, "none"),
    Row("contrast_1.5_none", "contrast", 1.5, -1.5, "none"),
    Row("contrast_0.5_active", "contrast", 1.5, -0.5, "active"),
    Row("contrast_1.5_active", "contrast", 1.5, -1.5, "active"),
    Row("math_only", "OPD, math only", 1.0, 0.0, None, ("math",)),
    Row("largest_only", "OPD, largest only", 1.0, 0.0, None, ("largest",)),
)


def plan(out: Path, seeds: int) -> list[Run]:
    """Every run of the table, seeds outermost: an interrupted table has all rows for the seeds it got through."""
    return [Run(row, seed, out / row.key / f"seed{seed}") for seed in range(seeds) for row in ROWS]


def shared_overrides(steps: int, limit: int | None) -> list[str]:
    """Configuration keys common to all runs."""
    words = [f"steps={steps}", f"eval.every={EVAL_EVERY}", f"eval.samples={EVAL_SAMPLES}", "eval.temperature=1.0"]
    words += ["checkpoint.keep_last=1"]
    if limit is not None:
        words.append("eval.data=[" + ", ".join(f"{{path: {path}, limit: {limit}}}" for path in SETS.values()) + "]")
    return words


def table_config(steps: int, limit: int | None) -> Config:
    """The shared configuration."""
    return load_config(CONFIG, shared_overrides(steps, limit))


def make_recipe(steps: int, limit: int | None) -> dict[str, Any]:
    """Everything but rows and seeds that decides the numbers: settings, configuration, checkpoints and problems."""
    config = table_config(steps, limit).model_dump(mode="json")
    del config["run_dir"], config["seed"], config["data"]["domain_weights"]
    config["objective"] = {k: v for k, v in config["objective"].items() if k not in ("lambdas", "normalizer")}
    files = {name: miniature.asset(name) / "model.safetensors" for name in BASELINES}
    files |= {name: miniature.asset(name) for name in ("train", "train_largest", "heldout", "heldout_largest")}
    return {
        "steps": steps,
        "limit": limit,
        "final": {name: vars(sampling) for name, sampling in FINAL.items()},
        "sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
        "config": config,
    }


def baseline_file(out: Path, name: str) -> Path:
    """Results of a checkpoint that is evaluated without being trained."""
    return out / "baselines" / f"{name}.json"
