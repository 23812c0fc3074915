"""How fast the miniature trains with every rollout engine, and what generating ahead of the learner gains.

    python bench/throughput.py --out runs/throughput [--rounds 3] [--steps 10] [--only-report]

One rank trains the miniature with the engines hf, vLLM in its process, and vLLM in a process of its own at staleness 0
and 1; and a wider random model with the last two. The rounds interleave them. Every process has one thread; the rank is
pinned to one core and an engine of its own to another, so that they can work at the same time. The numbers come from
the runs' timeline.jsonl. JSON, figure, the tables of docs/throughput.md and a summary in the README are written; with
fewer rounds or steps they stay in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from soak_watch import LEASH
from table1 import RESULTS, Outputs, ended_cleanly, write_outputs
from table1_report import check_markers, link_from, replace_block
from teacher_memory_models import write_models
from throughput_plan import (
    AHEAD,
    CONFIG,
    ROOT,
    ROUNDS,
    STEPS,
    STRICT,
    WARM_UP_STEPS,
    WORKLOADS,
    Workload,
    numbers,
    over_rounds,
    overlap,
    overrides,
)
from throughput_report import BEGIN, END, markdown, summary

from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.rundir import environment, write_atomically
from tcopd_fast.timeline import StepTimeline, load

DOC = ROOT / "docs" / "throughput.md"
README = ROOT / "README.md"
LIMIT_S = 420.0
POLL_S = 0.1
SHOWN_STEPS = 3


def cores() -> tuple[int, int]:
    """The rank's core and the engine's. Raises UserError when there is only one."""
    free = sorted(os.sched_getaffinity(0))
    if len(free) < 2:
        raise UserError("throughput: this process may use one core only; overlap needs two")
    return free[0], free[1]


def pin(process: psutil.Process, core: int) -> None:
    """Every thread of a process and of its children onto one core."""
    with suppress(psutil.Error, ProcessLookupError):
        for one in (process, *process.children(recursive=True)):
            for thread in one.threads():
                os.sched_setaffinity(thread.id, {core})


def train(words: Sequence[str], run_dir: Path, apart: bool) -> None:
    """One run, pinned, to its end; apart: its engine goes to a core of its own. Raises UserError when it fails."""
    command = [sys.executable, "-m", "tcopd_fast.train", "--config", str(CONFIG), *words]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    # Left to itself vLLM would choose the cores of its threads.
    env |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    mine, engines = cores()
    log = run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        os.sched_setaffinity(process.pid, {mine})
        end = time.monotonic() + LIMIT_S
        while process.poll() is None:
            if time.monotonic() > end:
                raise UserError(f"throughput: {run_dir.name} took more than {LIMIT_S:.0f} s; see {log}")
            if apart and not (run_dir / "metrics.jsonl").exists():
                pin_engines(process.pid, engines)
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise UserError(f"throughput: {run_dir.name} ended with status {process.returncode}; see {log}")


def pin_engines(trainer: int, core: int) -> None:
    """While they start; threads and processes that they make later inherit the core."""
    with suppress(psutil.Error):
        for child in psutil.Process(trainer).children():
            if LEASH in child.cmdline():
                pin(child, core)


def shown(steps: Sequence[StepTimeline]) -> list[dict[str, Any]]:
    """A few steps in the middle, for the figure."""
    middle = len(steps) // 2
    return [step.record() for step in steps[middle : middle + SHOWN_STEPS]]


def measure(out: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Every cell of every workload, interleaved."""
    out.mkdir(parents=True)
    began = time.monotonic()
    found: dict[tuple[str, str], list[list[StepTimeline]]] = {}
    for workload in WORKLOADS:
        if workload.shape is not None:
            write_models(models_of(out, workload), workload.shape, (), 1, jobs=1)
    for turn in range(rounds):
        for workload in WORKLOADS:
            for cell in workload.cells if turn < workload.rounds else ():
                run_dir = out.resolve() / f"round{turn}" / f"{workload.name}_{cell.name}"
                train(overrides(workload, cell, run_dir, models_of(out, workload), steps), run_dir, cell.apart)
                timeline = load(run_dir)
                if [step.step for step in timeline] != list(range(1, steps + 1)):
                    raise UserError(f"throughput: no timeline of {steps} steps in {run_dir}")
                found.setdefault((workload.name, cell.name), []).append(timeline)
                minutes = (time.monotonic() - began) / 60
                print(f"{minutes:5.1f} min  {run_dir.name}: {numbers(timeline)['step_s']:.2f} s a step", flush=True)
    command = ["python", "bench/throughput.py", "--out", str(out)]
    command += ["--rounds", str(rounds)] if rounds != ROUNDS else []
    command += ["--steps", str(steps)] if steps != STEPS else []
    return {
        "command": shlex.join(command),
        "environment": environment(),
        "rounds": rounds,
        "steps": steps,
        "warm_up_steps": WARM_UP_STEPS,
        "seconds": time.monotonic() - began,
        "workloads": [workload_record(workload, found, steps) for workload in WORKLOADS],
    }


def models_of(out: Path, workload: Workload) -> Path:
    """Where a workload's random model lies."""
    return out.resolve() / "models" / workload.name


def workload_record(
    workload: Workload, found: Mapping[tuple[str, str], Sequence[Sequence[StepTimeline]]], steps: int
) -> dict[str, Any]:
    """A workload as it goes into the JSON."""
    rounds = {cell.name: [numbers(run) for run in found[workload.name, cell.name]] for cell in workload.cells}
    strict, ahead = (rounds[cell.name] for cell in (STRICT, AHEAD))
    return {
        "name": workload.name,
        "title": workload.title,
        "overlap": asdict(overlap(strict, ahead)),
        "cells": [
            {
                "name": cell.name,
                "title": cell.title,
                "overrides": overrides(workload, cell, Path("RUN"), Path("MODELS"), steps),
                "rounds": rounds[cell.name],
                "median": over_rounds(rounds[cell.name]),
                "timeline": shown(found[workload.name, cell.name][0]),
            }
            for cell in workload.cells
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/throughput", metavar="DIR", help="a new folder (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of all engines (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run (default %(default)s)")
    parser.add_argument("--only-report", action="store_true", help="start nothing, report on OUT/throughput.json")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    return ended_cleanly(
        lambda: make(out, arguments.rounds, arguments.steps, arguments.only_report),
        "interrupted; nothing is left running",
    )


def make(out: Path, rounds: int, steps: int, only_report: bool) -> int:
    """Measure unless told not to, and write; 0."""
    record = out / "throughput.json"
    if only_report:
        if not record.is_file():
            raise UserError(f"--only-report: {out} has no throughput.json; leave it out to make one")
        data = json.loads(record.read_text())
    else:
        check_arguments(out, rounds, steps)
        data = json.loads(json.dumps(measure(out, rounds, steps)))
        write_atomically(record, json.dumps(data) + "\n")
    whole = data["rounds"] >= ROUNDS and data["steps"] >= STEPS
    folder = RESULTS if whole else out
    name = "throughput.json" if whole else "throughput_table.json"
    outputs = Outputs(folder / name, folder / "throughput.svg", DOC if whole else None)
    from throughput_figure import draw

    write_outputs(data, outputs, DOC, (BEGIN, END), draw, markdown)
    if whole:
        text = check_markers(README, BEGIN, END)
        write_atomically(README, replace_block(text, summary(data, link_from(README, outputs.json)), BEGIN, END))
    return 0


def check_arguments(out: Path, rounds: int, steps: int) -> None:
    """Everything that can be refused before anything starts. Raises UserError."""
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: must be at least 1")
    if steps < WARM_UP_STEPS + 3:
        raise UserError(f"--steps {steps}: the first {WARM_UP_STEPS} and the last do not count; give more")
    if out.exists():
        raise UserError(f"--out {out}: exists; give a new folder, or remove it")
    cores()
    for document in (DOC, README):
        check_markers(document, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
