"""The project's Table 1: OPD, G-OPD and TC-OPD on the miniature, several seeds each, from real training runs.

    python bench/table1.py --out runs/table1 [--seeds 5] [--steps 40] [--jobs N] [--limit M] [--only-report]

Every run is `tcopd train` on configs/miniature.yaml with overrides, in OUT/<row>/seed<k>. Calling it again skips
what is finished and continues what was interrupted. When all runs and their final evaluations are there, the table
is written as JSON, as a figure (SVG, and PNG beside it) and into the README between its table1 markers; otherwise
what is missing is named and the exit status is 1. A reduced table (fewer than 3 seeds, other steps, a limit) stays in
OUT unless --json, --figure or --readme say otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table1_plan import (
    BASELINES,
    REFERENCE_ROW,
    ROOT,
    Run,
    baseline_file,
    make_recipe,
    open_recipe,
    plan,
    read_recipe,
    run_state,
    shared_overrides,
    train_command,
)
from table1_report import BEGIN, END, aggregate, check_markers, link_from, markdown, replace_block

from tcopd_fast.errors import UserError
from tcopd_fast.report import format_table, summary_table
from tcopd_fast.report.collect import load_runs
from tcopd_fast.rundir import environment, write_atomically

STEPS = 40
MIN_SEEDS = 3
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Outputs:
    """Files that the table goes to. readme is None when no README is to be changed."""

    json: Path
    figure: Path
    readme: Path | None


class Launcher:
    """Runs commands with one thread each; `stop` ends those that are running, with all their children."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()

    def __call__(self, command: Sequence[str], log: Path) -> int:
        """Run to the end, output appended to `log`; returns the exit status."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.running.add(process)
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        """End every running command and its children."""
        for process in list(self.running):
            os.killpg(process.pid, signal.SIGTERM)


def train_all(runs: Sequence[Run], steps: int, limit: int | None, jobs: int, launcher: Launcher) -> dict[str, str]:
    """`train_runs` with this table's configuration."""
    shared = shared_overrides(steps, limit)
    return train_runs(runs, steps, lambda run, state: train_command(run, state, shared), jobs, launcher)


def train_runs(
    runs: Sequence[Run], steps: int, command_of: Callable[[Run, str], Sequence[str]], jobs: int, launcher: Launcher
) -> dict[str, str]:
    """Start or continue every unfinished run, `jobs` at a time; returns run name -> what went wrong.

    command_of(run, state) is the command that starts ("new") or continues ("partial") a run.
    """

    def train(run: Run, state: str) -> str | None:
        status = launcher(command_of(run, state), run.log)
        if status:
            return f"exit status {status}"
        return None if run_state(run, steps) == "finished" else f"ended before step {steps}"

    pending = [(run, state) for run in runs if (state := run_state(run, steps)) != "finished"]
    print(f"training: {len(runs) - len(pending)} of {len(runs)} runs are finished, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, run, state): run.name for run, state in pending}
        problems = _watch(pool, futures, launcher.stop, lambda problem: problem)
    logs = {run.name: run.log for run in runs}
    return {name: f"{problem}; see {logs[name]}" for name, problem in problems.items()}


def evaluate_all(out: Path, runs: Sequence[Run], steps: int, limit: int | None, jobs: int) -> dict[str, str]:
    """Final evaluation of baselines and finished runs that lack one, in `jobs` processes; returns what went wrong."""
    from table1_final import Job, evaluate_job

    wanted = [
        Job(name, baseline_file(out, name), 0, steps, limit, model=f"miniature:{name}") for name in BASELINES
    ]
    finished = [run for run in runs if run_state(run, steps) == "finished"]
    wanted += [Job(run.name, run.final, run.seed, steps, limit, run_dir=run.folder) for run in finished]
    return run_evaluations(wanted, evaluate_job, jobs)


def run_evaluations(wanted: Sequence[Any], evaluate: Callable[[Any], float], jobs: int) -> dict[str, str]:
    """Call `evaluate` on every job (name, out) whose `out` is missing, in `jobs` processes; returns what went wrong."""
    pending = [job for job in wanted if not job.out.exists()]
    print(f"final evaluation: {len(wanted) - len(pending)} of {len(wanted)} are there, {jobs} at a time", flush=True)
    if not pending:
        return {}
    # Spawned: forked copies of a process that has used torch's threads can hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(evaluate, job): job.name for job in pending}
        return _watch(pool, futures, lambda: None, lambda accuracy: None)


def _watch(
    pool: Executor, futures: dict[Future, str], stop: Callable[[], None], problem_of: Callable[[Any], str | None]
) -> dict[str, str]:
    """Report every job as it ends; an interrupt drops the waiting jobs and stops the running ones."""
    problems, began = {}, time.monotonic()
    try:
        for number, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            problem = repr(error) if error else problem_of(future.result())
            if problem:
                problems[futures[future]] = problem
            minutes = (time.monotonic() - began) / 60
            print(f"  {number}/{len(futures)}  {minutes:5.1f} min  {futures[future]}: {problem or 'done'}", flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        raise
    return problems


def missing_results(out: Path, runs: Sequence[Run]) -> list[str]:
    """Names of the baselines and runs without final evaluation."""
    baselines = [name for name in BASELINES if not baseline_file(out, name).exists()]
    return baselines + [run.name for run in runs if not run.final.exists()]


def read_run(run: Run) -> dict[str, Any]:
    """One run as it goes into the JSON: settings, environment, learning curve, final numbers."""
    files = load_runs([run.folder])[0]
    final = json.loads(run.final.read_text(encoding="utf-8"))
    points = {record["step"]: record for record in files.evals}
    return {
        "row": run.row.key,
        "label": run.row.label,
        "lambdas": {"expert": run.row.expert, "anti_expert": run.row.anti_expert},
        "normalizer": run.row.normalizer,
        "seed": run.seed,
        "environment": dict(files.environment),
        "evaluated_at": final["environment"]["git_sha"],
        "training_seconds_per_step": files.per_step("time_s/step"),
        "curve": [
            {
                "step": step,
                "accuracy": point["mean_at_k"],
                "standard_error_over_problems": point["standard_error"],
                "response_length": point["response_length_mean"],
                "reverse_kl": point["reverse_kl"],
            }
            for step, point in sorted(points.items())
        ],
        "final": final["results"],
    }


def read_baseline(out: Path, name: str) -> dict[str, Any]:
    """One evaluated checkpoint as it goes into the JSON."""
    record = json.loads(baseline_file(out, name).read_text(encoding="utf-8"))
    return {
        "name": name,
        "label": BASELINES[name],
        "evaluated_at": record["environment"]["git_sha"],
        "final": record["results"],
    }


def assemble(out: Path, runs: Sequence[Run], recipe: dict[str, Any]) -> dict[str, Any]:
    """The whole table: the command that makes it, recipe, every run, aggregated rows."""
    records = [read_run(run) for run in runs]
    baselines = [read_baseline(out, name) for name in BASELINES]
    here = environment()
    commits = [record["environment"].get("git_sha") for record in records]
    commits += [record["evaluated_at"] for record in [*records, *baselines]]
    seeds = sorted({run.seed for run in runs})
    return {
        "command": command_of("bench/table1.py", out, seeds, recipe),
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
    readme = arguments.readme if arguments.readme is not None else str(ROOT / "README.md") if whole else ""
    return Outputs(
        json=Path(arguments.json or folder / "table1.json"),
        figure=Path(arguments.figure or folder / "table1.svg"),
        readme=Path(readme) if readme else None,
    )


def command_of(script: str, out: Path, seeds: Sequence[int], recipe: Mapping[str, Any]) -> str:
    """What makes a table, as it is typed."""
    words = ["python", script, "--out", str(out), "--seeds", str(len(seeds)), "--steps", str(recipe["steps"])]
    words += ["--limit", str(recipe["limit"])] if recipe["limit"] is not None else []
    return shlex.join(words)


def write_outputs(
    table: Mapping[str, Any],
    outputs: Outputs,
    document: Path,
    markers: tuple[str, str],
    draw: Callable[[Mapping[str, Any], Path], list[Path]],
    markdown: Callable[[Mapping[str, Any], str, str], str],
) -> None:
    """JSON, figure, and the block between the markers of the document that `outputs` names; prints the block.

    document: where the block belongs, for its links when no document is to be changed.
    """
    outputs.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(outputs.json, json.dumps(table, indent=1, allow_nan=False) + "\n")
    files = [outputs.json, *draw(table, outputs.figure)]
    base = outputs.readme or document
    block = markdown(table, link_from(base, outputs.figure), link_from(base, outputs.json))
    if outputs.readme is not None:
        text = check_markers(outputs.readme, *markers)
        write_atomically(outputs.readme, replace_block(text, block, *markers))
        files.append(outputs.readme)
    print(block)
    print("written: " + ", ".join(map(str, files)))


def complete(missing: Sequence[str], problems: Mapping[str, str], only_report: bool) -> bool:
    """Whether nothing is missing; else every missing result is named, with what went wrong and the remedy."""
    for name in missing:
        print(f"missing: {name}" + (f" ({problems[name]})" if name in problems else ""), file=sys.stderr)
    if missing:
        remedy = "without --only-report they are made" if only_report else "the same command tries them again"
        print(f"nothing written: {len(missing)} results are missing; {remedy}", file=sys.stderr)
    return not missing


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns the exit status."""
    return guarded(_make, _parser().parse_args(argv))


def guarded(make: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """`make(arguments)` with one thread per process, one message per user error, and no run left behind."""
    for name in ("seeds", "steps", "jobs", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            print(f"error: --{name} {value}: must be at least 1", file=sys.stderr)
            return 2
    # Several processes share the cores; and with one thread the numbers do not depend on how many there are.
    os.environ["OMP_NUM_THREADS"] = "1"
    return ended_cleanly(lambda: make(arguments), "interrupted; the same command continues")


def ended_cleanly(make: Callable[[], int], interrupted: str) -> int:
    """`make()`; one message and status 2 for a user error, `interrupted` and status 130 for a signal."""
    # Runs have process groups of their own, so whatever ends this process has to end them too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return make()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _make(arguments: argparse.Namespace) -> int:
    out, problems = Path(arguments.out), {}
    runs = plan(out, arguments.seeds)
    recipe = read_recipe(out) if arguments.only_report else make_recipe(arguments.steps, arguments.limit)
    outputs = choose_outputs(arguments, recipe["steps"], recipe["limit"])
    if outputs.readme is not None:
        check_markers(outputs.readme)
    if not arguments.only_report:
        open_recipe(out, recipe)
        problems = train_all(runs, arguments.steps, arguments.limit, arguments.jobs, Launcher())
        problems |= evaluate_all(out, runs, arguments.steps, arguments.limit, arguments.jobs)
    missing = missing_results(out, runs)
    if missing:
        started = [run.folder for run in runs if (run.folder / "config.yaml").is_file()]
        if started:
            print(format_table(summary_table(started)))
    if not complete(missing, problems, arguments.only_report):
        return 1
    from table1_figure import draw

    write_outputs(assemble(out, runs, recipe), outputs, ROOT / "README.md", (BEGIN, END), draw, markdown)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/table1", metavar="DIR", help="folder of the runs (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per trained row, 0 … N-1 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: CPUs)")
    parser.add_argument("--limit", type=int, default=None, metavar="M", help="only the first M held-out problems")
    parser.add_argument("--json", metavar="FILE", help="default bench/results/table1.json; OUT/table1.json if reduced")
    parser.add_argument("--figure", metavar="FILE.svg", help="default bench/results/table1.svg; likewise")
    parser.add_argument(
        "--readme", metavar="FILE", help="README with the markers (default README.md; none if reduced); '' writes none"
    )
    parser.add_argument("--only-report", action="store_true", help="start nothing, report on what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
