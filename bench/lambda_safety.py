"""What a large negative λ does, and what each guard does about it, on the miniature.

    python bench/lambda_safety.py --out runs/lambda_safety [--seeds 3] [--steps 40] [--jobs N] [--limit M]
        [--rows ROW …] [--only-report]

Every run is `tcopd train` on configs/miniature.yaml with overrides, in OUT/<row>/seed<k>. Calling it again skips what
is finished and continues what was interrupted. When all runs are there, the table is written as JSON, as a figure (SVG)
and into docs/safety.md between its markers; otherwise what is missing is named and the exit status is 1. A reduced
experiment (fewer seeds or rows, other steps, a limit) stays in OUT unless --json, --figure or --doc say otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from lambda_safety_plan import QUANTILES, ROWS, SAMPLED, plan, recipe_of, shared_overrides
from lambda_safety_report import BEGIN, END, aggregate, markdown
from table1 import (
    MIN_SEEDS,
    RESULTS,
    STEPS,
    Launcher,
    Outputs,
    command_of,
    complete,
    guarded,
    train_runs,
    write_outputs,
)
from table1_plan import ROOT, Run, open_recipe, read_recipe, run_state, train_command
from table1_report import check_markers

from tcopd_fast.report.collect import LAST_STEPS, load_runs, number
from tcopd_fast.report.collect import Run as RunFiles
from tcopd_fast.rundir import environment

DOC = ROOT / "docs" / "safety.md"
EVERY = 5
SERIES = {
    "entropy": "loss/entropy",
    "negative_share": "reward/negative_share",
    "response_length": "rollout/response_length_mean",
    "truncated_share": "rollout/truncated_share",
    "grad_norm": "learner/grad_norm",
}
ALARMS = {"share": "reward/alarm_negative_share", "entropy": "loss/alarm_entropy"}


def read_run(run: Run) -> dict[str, Any]:
    """One run as it goes into the JSON: settings, environment, evaluations, training metrics at every fifth step."""
    files = load_runs([run.folder])[0]
    shown = [row for row in files.metrics if row["step"] == 1 or row["step"] % EVERY == 0]
    return {
        "row": run.row.key,
        "lambda": run.row.anti_expert,
        "normalizer": run.row.normalizer,
        "guard": run.row.guard,
        "seed": run.seed,
        "environment": dict(files.environment),
        "training_seconds_per_step": files.per_step("time_s/step"),
        "curve": [
            {
                "step": record["step"],
                "accuracy": record["mean_at_k"],
                "standard_error_over_problems": record["standard_error"],
                "response_length": record["response_length_mean"],
                "reverse_kl": record["reverse_kl"],
            }
            for record in files.evals
        ],
        "training": {"step": [row["step"] for row in shown]}
        | {name: [number(row.get(key)) for row in shown] for name, key in SERIES.items()},
        "last_steps": {name: files.recent(key) for name, key in SERIES.items()},
        "alarm_steps": {name: _fired(files, key) for name, key in ALARMS.items()},
    }


def _fired(files: RunFiles, key: str) -> list[int]:
    """Steps at which an alarm fired."""
    return [step for step, flag in zip(*files.curve(key), strict=True) if flag]


def token_statistics(run: Run) -> dict[str, Any]:
    """Of all tokens of a run: quantiles of |log-ratio| (both teachers together) and of |A|, nats.

    first_token_advantage: mean A of the first token of right and of wrong responses in the last 10 steps.
    """
    sizes: dict[str, list[float]] = {"logratio": [], "advantage": []}
    first: dict[str, list[float]] = {"right": [], "wrong": []}
    files = load_runs([run.folder])[0]
    for record in files.tokens:
        sizes["advantage"] += map(abs, record["advantage"])
        for teacher in record["teachers"].values():
            sizes["logratio"] += map(abs, teacher["logratio"])
        if record["step"] > files.last_step - LAST_STEPS:
            first["right" if record["correct"] else "wrong"].append(record["advantage"][0])
    return {
        "of": run.name,
        "at": QUANTILES,
        **{name: np.quantile(values, QUANTILES).tolist() for name, values in sizes.items()},
        "first_token_advantage": {name: fmean(values) for name, values in first.items() if values},
    }


def assemble(out: Path, runs: Sequence[Run], recipe: dict[str, Any]) -> dict[str, Any]:
    """The whole experiment: the command that makes it, recipe, every run, aggregated rows."""
    records = [read_run(run) for run in runs]
    here = environment()
    commits = [record["environment"].get("git_sha") for record in records]
    seeds = sorted({run.seed for run in runs})
    keys = list(dict.fromkeys(run.row.key for run in runs))
    some = ["--rows", *keys] if len(keys) < len(ROWS) else []
    return {
        "command": " ".join([command_of("bench/lambda_safety.py", out, seeds, recipe), *some]),
        "date": here["started"],
        "commits": list(dict.fromkeys(commit for commit in commits if commit)),
        "environment": here,
        "recipe": recipe,
        "seeds": seeds,
        "tokens": [token_statistics(run) for run in runs if run.row in SAMPLED and run.seed == 0],
        "rows": aggregate(records),
        "runs": records,
    }


def choose_outputs(arguments: argparse.Namespace, steps: int, limit: int | None) -> Outputs:
    """Where the table goes: the repository's own files only for a whole one or when they are named."""
    whole = steps == STEPS and limit is None and arguments.seeds >= MIN_SEEDS and not arguments.rows
    folder = RESULTS if whole else Path(arguments.out)
    doc = arguments.doc if arguments.doc is not None else str(DOC) if whole else ""
    return Outputs(
        json=Path(arguments.json or folder / "lambda_safety.json"),
        figure=Path(arguments.figure or folder / "lambda_safety.svg"),
        readme=Path(doc) if doc else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns the exit status."""
    return guarded(_make, _parser().parse_args(argv))


def _make(arguments: argparse.Namespace) -> int:
    out, problems = Path(arguments.out), {}
    runs = [run for run in plan(out, arguments.seeds) if run.row.key in (arguments.rows or [row.key for row in ROWS])]
    recipe = read_recipe(out) if arguments.only_report else recipe_of(arguments.steps, arguments.limit)
    outputs = choose_outputs(arguments, recipe["steps"], recipe["limit"])
    if outputs.readme is not None:
        check_markers(outputs.readme, BEGIN, END)
    if not arguments.only_report:
        open_recipe(out, recipe)
        shared = shared_overrides(arguments.steps, arguments.limit)
        problems = train_runs(
            runs, arguments.steps, lambda run, state: train_command(run, state, shared), arguments.jobs, Launcher()
        )
    missing = [run.name for run in runs if run_state(run, recipe["steps"]) != "finished"]
    if not complete(missing, problems, arguments.only_report):
        return 1
    from lambda_safety_figure import draw

    write_outputs(assemble(out, runs, recipe), outputs, DOC, (BEGIN, END), draw, markdown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/lambda_safety", metavar="DIR", help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS, help="seeds per row, 0 … N-1 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: CPUs)")
    parser.add_argument("--limit", type=int, default=None, metavar="M", help="only the first M held-out problems")
    parser.add_argument("--json", metavar="FILE", help="default bench/results/lambda_safety.json; in OUT if reduced")
    parser.add_argument("--figure", metavar="FILE.svg", help="default: beside the JSON")
    parser.add_argument(
        "--doc", metavar="FILE", help="file with the markers (default docs/safety.md, none if reduced; '': none)"
    )
    parser.add_argument("--only-report", action="store_true", help="start nothing, report on what is there")
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS], metavar="ROW", help="only these rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
