"""What finished runs of the result tables leave on disk, with results of the caller's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

STEPS = 20
ENVIRONMENT = {
    "git_sha": "a" * 40,
    "device": "CPU: test",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13"},
}


def leave_run(run: Any, evaluations: Sequence[dict], results: dict | None) -> None:
    """Configuration, environment, evaluations, checkpoint and, unless None, the final results."""
    checkpoint = run.folder / "checkpoints" / f"step_{STEPS:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    (run.folder / "config.yaml").write_text(f"steps: {STEPS}\n")
    (run.folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run.folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "time_s/step": 0.5}}\n' for i in (1, 2)))
    (run.folder / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    if results is not None:
        leave_results(run.final, results)


def leave_baselines(out: Path, plan: ModuleType, results: Callable[[], dict]) -> None:
    """Final results of every model that a table shows without training it; plan: its module of runs."""
    for name in plan.BASELINES:
        file = plan.baseline_file(out, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        leave_results(file, results())


def leave_results(file: Path, results: dict) -> None:
    file.write_text(json.dumps({"environment": ENVIRONMENT, "results": results}))
