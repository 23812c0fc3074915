"""Two domains in one run on the miniature: routing, extrapolation and cross-domain contrast, several seeds each.

    python bench/multitask.py --out runs/multitask [--seeds 5] [--steps 40] [--jobs N] [--limit M] [--only-report]

Every run is `tcopd train` on configs/miniature_multitask.yaml with overrides, in OUT/<row>/seed<k>. Calling it again
skips what is finished and continues what was interrupted. When all runs and their final evaluations are there, the
table is written as JSON, as a figure (SVG, and PNG beside it) and into docs/multitask.md between its markers; otherwise
what is missing is named and the exit status is 1. A reduced table (fewer than 3 seeds, other steps, a limit) stays in
OUT unless --json, --figure or --doc say otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multitask_plan import (
    BASELINES,
    CONFIG,
    REFERENCE_ROW,
    SETS,
    baseline_file,
    make_recipe,
    plan,
    shared_overrides,
)
from multitask_report import BEGIN, END, aggregate, markdown
from table1 import (
    MIN_SEEDS,
    RESULTS,
    STEPS,
    Launcher,
    Outputs,
    command_of,
    complete,
    guarded,
    run_evaluations,
    train_runs,
    write_outputs,
)
from table1_plan import ROOT, Run, open_recipe, read_recipe, run_state, train_command
from table1_report import check_markers

from tcopd_fast.report.collect import load_runs
from tcopd_fast.rundir import environment

DOC = ROOT / "docs" / "multitask.md"


def make_all(out: Path, runs: Sequence[Run], steps: int, limit: int | None, jobs: int) -> dict[str, str]:
    """Train what is unfinished, then evaluate what was not; returns name -> what went wrong."""
    from multitask_final import evaluate_job, evaluation_jobs

    shared = shared_overrides(steps, limit)
    problems = train_runs(
        runs, steps, lambda run, state: train_command(run, state, shared, CONFIG), jobs, Launcher()
    )
    finished = [run for run in runs if run_state(run, steps) == "finished"]
    return problems | run_evaluations(evaluation_jobs(out, finished, steps, limit), evaluate_job, jobs)


def read_run(run: Run) -> dict[str, Any]:
    """One run as it goes into the JSON: settings, environment, learning curve per domain, final numbers."""
    files = load_runs([run.folder])[0]
    final = json.loads(run.final.read_text(encoding="utf-8"))
    curve: dict[str, list[dict[str, Any]]] = {domain: [] for domain in SETS}
    for record in files.evals:
        curve[record["domain"]].append(
            {
                "step": record["step"],
                "accuracy": record["mean_at_k"],
                "standard_error_over_problems": record["standard_error"],
                "change": record["change"],
                "forgetting": record["forgetting"],
                "response_length": record["response_length_mean"],
                "reverse_kl": record["reverse_kl"],
            }
        )
    return {
        "row": run.row.key,
        "label": run.row.label,
        "lambdas": {"own": run.row.own, "other": run.row.other},
        "normalizer": run.row.normalizer,
        "domains": list(run.row.domains),
        "seed": run.seed,
        "environment": dict(files.environment),
        "evaluated_at": final["environment"]["git_sha"],
        "training_seconds_per_step": files.per_step("time_s/step"),
        "routed_away_share": files.per_step("scoring/routed_away_share"),
        "curve": curve,
        "final": final["results"],
    }


def read_baseline(out: Path, name: str) -> dict[str, Any]:
    """One evaluated checkpoint as it goes into the JSON."""
    record = json.loads(baseline_file(out, name).read_text(encoding="utf-8"))
    sha = record["environment"]["git_sha"]
    return {"name": name, "label": BASELINES[name], "evaluated_at": sha, "final": record["results"]}


def assemble(out: Path, runs: Sequence[Run], recipe: dict[str, Any]) -> dict[str, Any]:
    """The whole table: the command that makes it, recipe, every run, aggregated rows."""
    records = [read_run(run) for run in runs]
    baselines = [read_baseline(out, name) for name in BASELINES]
    here = environment()
    commits = [record["environment"].get("git_sha") for record in records]
    commits += [record["evaluated_at"] for record in [*records, *baselines]]
    seeds = sorted({run.seed for run in runs})
    return {
        "command": command_of("bench/multitask.py", out, seeds, recipe),
        "date": here["started"],
        "commits": list(dict.fromkeys(commit for commit in commits if commit)),
        "environment": here,
        "recipe": recipe,
        "seeds": seeds,
        "baselines": baselines,
        "rows": aggregate(records, REFERENCE_ROW),
        "runs": records,
    }


def choose_outputs(arguments: argparse.Namespace, steps: int, limit: int | None) -> Outputs:
    """Where the table goes: the repository's own files only for a whole table or when they are named."""
    whole = steps == STEPS and limit is None and arguments.seeds >= MIN_SEEDS
    folder = RESULTS if whole else Path(arguments.out)
    doc = arguments.doc if arguments.doc is not None else str(DOC) if whole else ""
    return Outputs(
        json=Path(arguments.json or folder / "multitask.json"),
        figure=Path(arguments.figure or folder / "multitask.svg"),
        readme=Path(doc) if doc else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns the exit status."""
    return guarded(_make, _parser().parse_args(argv))


def _make(arguments: argparse.Namespace) -> int:
    out, problems = Path(arguments.out), {}
    runs = plan(out, arguments.seeds)
    recipe = read_recipe(out) if arguments.only_report else make_recipe(arguments.steps, arguments.limit)
    outputs = choose_outputs(arguments, recipe["steps"], recipe["limit"])
    if outputs.readme is not None:
        check_markers(outputs.readme, BEGIN, END)
    if not arguments.only_report:
        open_recipe(out, recipe)
        problems = make_all(out, runs, arguments.steps, arguments.limit, arguments.jobs)
    missing = [name for name in BASELINES if not baseline_file(out, name).exists()]
    missing += [run.name for run in runs if not run.final.exists()]
    if not complete(missing, problems, arguments.only_report):
        return 1
    from multitask_figure import draw

    write_outputs(assemble(out, runs, recipe), outputs, DOC, (BEGIN, END), draw, markdown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/multitask", metavar="DIR", help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per trained row, 0 … N-1 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: CPUs)")
    parser.add_argument("--limit", type=int, default=None, metavar="M", help="only the first M problems of a set")
    parser.add_argument("--json", metavar="FILE", help="default bench/results/multitask.json; in OUT if reduced")
    parser.add_argument("--figure", metavar="FILE.svg", help="default bench/results/multitask.svg; in OUT if reduced")
    parser.add_argument(
        "--doc", metavar="FILE", help="file with the markers (default docs/multitask.md, none if reduced; '': none)"
    )
    parser.add_argument("--only-report", action="store_true", help="start nothing, report on what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
