"""What Table 1 consists of: its rows, its recipe, and where each run lies and how far it is."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcopd_fast import miniature
from tcopd_fast.checkpoints import checkpoint_steps
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config
from tcopd_fast.errors import UserError
from tcopd_fast.report.collect import load_runs
from tcopd_fast.rundir import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "miniature.yaml"
EVAL_EVERY = 10
EVAL_SAMPLES = 4


@dataclass(frozen=True)
class Row:
    """One trained setting. normalizer is None where every normalizer gives the same objective (one active teacher)."""

    key: str
    label: str
    expert: float
    anti_expert: float
    normalizer: str | None

    def overrides(self) -> list[str]:
        """The row's own configuration keys."""
        return [
            f"objective.lambdas.expert={self.expert:g}",
            f"objective.lambdas.anti_expert={self.anti_expert:g}",
            f"objective.normalizer={self.normalizer or 'none'}",
        ]


REFERENCE_ROW = "g_opd_1.5"
"""Differences are taken to this row, seed by seed."""
ROWS = (
    Row("opd", "OPD", 1.0, 0.0, None),
    Row("g_opd_1.5", "G-OPD", 1.5, 0.0, None),
    Row("g_opd_2", "G-OPD", 2.0, 0.0, None),
    Row("tc_0.5_none", "TC-OPD", 1.5, -0.5, "none"),
    Row("tc_1.5_none", "TC-OPD", 1.5, -1.5, "none"),
    Row("tc_0.5_active", "TC-OPD", 1.5, -0.5, "active"),
    Row("tc_1.5_active", "TC-OPD", 1.5, -1.5, "active"),
)
BASELINES = {"base": "student (base)", "expert": "expert", "anti_expert": "anti-expert"}


@dataclass(frozen=True)
class Sampling:
    """One final evaluation: samples per problem at a temperature."""

    temperature: float
    samples: int


FINAL = {"t1": Sampling(1.0, 8), "t07": Sampling(0.7, 4), "greedy": Sampling(0.0, 1)}
"""Final evaluations by name; t1 also gives response length and reverse KL."""


@dataclass(frozen=True)
class Run:
    """One training run of the table."""

    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """For example `opd/seed0`."""
        return f"{self.row.key}/seed{self.seed}"

    @property
    def log(self) -> Path:
        """What the training processes print."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def final(self) -> Path:
        """Results of the final evaluation."""
        return self.folder / "final.json"


def plan(out: Path, seeds: int) -> list[Run]:
    """Every run of the table, seeds outermost: an interrupted table has all rows for the seeds it got through."""
    return [Run(row, seed, out / row.key / f"seed{seed}") for seed in range(seeds) for row in ROWS]


def baseline_file(out: Path, name: str) -> Path:
    """Results of a checkpoint that is evaluated without being trained."""
    return out / "baselines" / f"{name}.json"


def shared_overrides(steps: int, limit: int | None) -> list[str]:
    """Configuration keys common to all runs."""
    words = [f"steps={steps}", f"eval.every={EVAL_EVERY}", f"eval.samples={EVAL_SAMPLES}", "eval.temperature=1.0"]
    words += ["checkpoint.keep_last=1"]
    if limit is not None:
        sources = load_config(CONFIG).eval.data
        words.append("eval.data=[" + ", ".join(f"{{path: {s.path}, limit: {limit}}}" for s in sources) + "]")
    return words


def table_config(steps: int, limit: int | None) -> Config:
    """The shared configuration, with both teachers active."""
    return load_config(CONFIG, shared_overrides(steps, limit))


def make_recipe(steps: int, limit: int | None) -> dict[str, Any]:
    """Everything but rows and seeds that decides the numbers: settings, configuration, checkpoints and problems."""
    config = table_config(steps, limit).model_dump(mode="json")
    del config["run_dir"], config["seed"]
    config["objective"] = {k: v for k, v in config["objective"].items() if k not in ("lambdas", "normalizer")}
    files = {name: miniature.asset(name) / "model.safetensors" for name in BASELINES}
    files |= {name: miniature.asset(name) for name in ("train", "heldout")}
    return {
        "steps": steps,
        "limit": limit,
        "final": {name: vars(sampling) for name, sampling in FINAL.items()},
        "sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
        "config": config,
    }


def open_recipe(out: Path, recipe: dict[str, Any]) -> None:
    """Record the recipe in OUT, or check that OUT was made by the same one. Raises UserError naming the difference."""
    file = out / "recipe.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(recipe, indent=1) + "\n")
        return
    before, now = (dict(_flat(tree)) for tree in (read_recipe(out), recipe))
    for key in before.keys() | now.keys():
        if before.get(key) != now.get(key):
            raise UserError(
                f"--out {out}: was made with {key}={before.get(key)}, now it is {now.get(key)}; "
                "give another --out, or remove that folder"
            )


def read_recipe(out: Path) -> dict[str, Any]:
    """The recipe that OUT was made with. Raises UserError when there is none."""
    file = out / "recipe.json"
    if not file.is_file():
        raise UserError(f"--out {out}: no recipe.json, so no table was started there; leave out --only-report")
    return json.loads(file.read_text(encoding="utf-8"))


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [item for key, value in tree.items() for item in _flat(value, f"{prefix}.{key}" if prefix else key)]


def run_state(run: Run, steps: int) -> str:
    """"new", "partial" (to be resumed) or "finished" (checkpoint and evaluation of the last step are there)."""
    if not (run.folder / "config.yaml").is_file():
        return "new"
    evaluated = {record["step"] for record in load_runs([run.folder])[0].evals}
    return "finished" if steps in checkpoint_steps(run.folder) and steps in evaluated else "partial"


def train_command(run: Run, state: str, shared: Sequence[str], config: Path = CONFIG) -> list[str]:
    """The `tcopd train` command that starts or continues a run on one rank."""
    command = [sys.executable, "-m", "tcopd_fast.cli", "train", "--ranks", "1"]
    if state == "partial":
        return [*command, "--resume", str(run.folder)]
    own = [f"run_dir={run.folder}", f"seed={run.seed}", *run.row.overrides()]
    return [*command, "--config", str(config), *shared, *own]
