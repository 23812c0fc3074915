"""A run that is left alone for 200 steps while things go wrong: does it go on, learn, and keep its memory?

    python bench/soak.py --out runs/soak [--steps 200] [--seed 0] [--only-report]

The miniature is trained by `tcopd train` on two ranks with a vLLM engine in a process of its own, one batch ahead. From
outside, at random moments (--seed), engines and ranks are killed and stopped, the run is told to end, a checkpoint is
damaged, the judge hangs, checkpoints find no room (soak_plan.py has the schedule). A run that was ended is resumed.
Memory of every process is sampled each second. Then the same training runs once without engine processes and faults,
for comparison. JSON, figure and the table of docs/faults.md are written; with fewer steps they stay in OUT. The exit
status is 1 when something that docs/faults.md promises did not hold.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soak_plan import (
    CONFIG,
    MIN_STEPS,
    RANKS,
    ROOT,
    STEPS,
    UNBROKEN,
    overrides,
    schedule,
    soak_overrides,
    train_command,
)
from soak_report import BEGIN, END, assess, markdown
from soak_run import Soak, launch
from table1 import RESULTS, Outputs, ended_cleanly, write_outputs
from table1_report import check_markers

from tcopd_fast.errors import UserError
from tcopd_fast.rundir import environment, write_atomically

DOC = ROOT / "docs" / "faults.md"


def unbroken(out: Path, steps: int, seed: int, token: str) -> None:
    """The same training on one rank, embedded engine, nothing going wrong. Raises UserError when it fails."""
    words = ["--config", str(CONFIG), *overrides(steps, out / "unbroken", seed), "rollout.engine=hf"]
    process = launch(train_command(words, 1), out / "unbroken.log", token, out / "no_order")
    if status := process.wait():
        raise UserError(f"soak: the unbroken run ended with status {status}: {out / 'unbroken.log'}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measure(out: Path, steps: int, seed: int) -> dict[str, Any]:
    """Soak and unbroken run; what was seen, without judgement."""
    out.mkdir(parents=True)
    soak = Soak(out.resolve(), steps, seed)
    try:
        status = soak.run(schedule(seed, steps))
        seconds = soak.watch.now()
        print(f"{seconds:6.1f} s  ended with status {status}; the unbroken run", flush=True)
        unbroken(out.resolve(), steps, seed, soak.token)
    finally:
        soak.kill_all()
    command = ["python", "bench/soak.py", "--out", str(out)]
    command += ["--steps", str(steps)] if steps != STEPS else []
    command += ["--seed", str(seed)] if seed else []
    return {
        "command": shlex.join(command),
        "environment": environment(seed),
        "steps": steps,
        "ranks": RANKS,
        "overrides": [*overrides(steps, Path("RUN"), seed), *soak_overrides()],
        "seconds": seconds,
        "total_seconds": soak.watch.now(),
        "planned": len(schedule(seed, steps)),
        "faults": [asdict(outcome) for outcome in soak.outcomes],
        "starts": soak.starts,
        "memory": [
            {"name": life.name, "samples": [[round(s.t, 2), s.step, s.resident, s.anonymous] for s in life.samples]}
            for life in soak.watch.lives
        ]
        + [{"name": UNBROKEN, "samples": peaks(read_lines(out / "unbroken" / "metrics.jsonl"))}],
        "rows": [shown(row) for row in read_lines(soak.run_dir / "metrics.jsonl")],
        "accuracy": {
            name: {record["step"]: [record["mean_at_k"], record["standard_error"]] for record in records}
            for name, records in (
                ("soak", read_lines(soak.run_dir / "eval.jsonl")),
                ("unbroken", read_lines(out / "unbroken" / "eval.jsonl")),
            )
        },
    }


def peaks(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The largest resident set of every step, as `Sample`s; of its anonymous part nothing is known."""
    largest = [max(size for name, size in row.items() if name.startswith("peak_memory_bytes/")) for row in rows]
    return [[0.0, row["step"], size, size] for row, size in zip(rows, largest, strict=True)]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """What the checks look at."""
    names = ("step", "loss/value", "learner/grad_norm", "rollout/version", "rollout/accuracy", "time_s/step")
    return {name: row[name] for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/soak", metavar="DIR", help="a new folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' moments and of the training")
    parser.add_argument("--only-report", action="store_true", help="start nothing, report on OUT/soak.json")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    return ended_cleanly(
        lambda: make(out, arguments.steps, arguments.seed, arguments.only_report),
        "interrupted; nothing is left running",
    )


def make(out: Path, steps: int, seed: int, only_report: bool) -> int:
    """Measure unless told not to, judge, write; 0 when every check holds."""
    record = out / "soak.json"
    if only_report:
        if not record.is_file():
            raise UserError(f"--only-report: {out} has no soak.json; leave it out to make one")
        data = json.loads(record.read_text())
    else:
        if steps < MIN_STEPS:
            raise UserError(f"--steps {steps}: the faults need at least {MIN_STEPS}")
        if out.exists():
            raise UserError(f"--out {out}: exists; give a new folder, or remove it")
        check_markers(DOC, BEGIN, END)
        data = json.loads(json.dumps(measure(out, steps, seed)))
        write_atomically(record, json.dumps(data) + "\n")
    table = assess(data)
    whole = data["steps"] == STEPS
    folder = RESULTS if whole else out
    name = "soak.json" if whole else "soak_table.json"
    outputs = Outputs(folder / name, folder / "soak.svg", DOC if whole else None)
    from soak_figure import draw

    write_outputs(table, outputs, DOC, (BEGIN, END), draw, markdown)
    for check in table["checks"]:
        print(f"{'holds' if check['holds'] else 'FAILS'}  {check['name']}: {check['seen']}")
    return 0 if all(check["holds"] for check in table["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
