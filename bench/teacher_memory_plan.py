"""The cells of the teachers' memory benchmark, and how their processes are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError

HERE = Path(__file__).resolve().parent
CHILD = HERE / "teacher_memory_child.py"
PROMPTS = "miniature:train"
# Series -> (folder of teacher k, `scoring.placement`).
SERIES = {
    "resident": ("full", "resident"),
    "offload": ("full", "offload"),
    "delta": ("delta", "auto"),
    "lora": ("lora", "auto"),
    "sharded": ("full", "sharded"),
    "merged": ("merged", "resident"),
}
PLACEMENTS = ("resident", "offload", "delta", "lora", "sharded")


@dataclass(frozen=True)
class Cell:
    """One measurement: K teachers of a series on so many ranks. teachers None: a process without frozen models."""

    series: str
    teachers: int | None
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.series}_{self.teachers}_{self.ranks}"


def plan(placements: Sequence[str], counts: Sequence[int], ranks: Sequence[int]) -> list[Cell]:
    """Every cell; with those that others are compared with, which come first."""
    cells = [Cell("none", None), *(Cell("merged", 1) for name in placements if name == "lora")]
    for name in PLACEMENTS:
        if name == "resident" or name in placements:
            cells += [Cell(name, count, size) for size in (ranks if name == "sharded" else (1,)) for count in counts]
    return cells


def config_tree(folder: Path, series: str, count: int, prompts: int, tokens: int) -> dict[str, Any]:
    """The configuration whose Scorer is measured. With count 0 the one teacher is the reference, so it loads once.

    A delta's base is the resident reference; elsewhere the reference is placed like the teachers.
    """
    kind, placement = SERIES[series]
    base = str(folder / "base")
    paths = [str(folder / f"{kind}_{k}") for k in range(1, count + 1)] or [base]
    reference = {"path": base} | ({"placement": "resident"} if placement == "auto" else {})
    return {
        "run_dir": str(folder / "unused"),
        "steps": 1,
        "model": {"path": base, "dtype": "bfloat16"},
        "reference": reference,
        "teachers": {f"teacher_{k}": {"path": path} for k, path in enumerate(paths, 1)},
        "data": {"train": [{"path": PROMPTS}], "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": prompts, "max_new_tokens": tokens},
        "scoring": {"placement": placement},
        "objective": {"lambdas": {f"teacher_{k}": 1.0 for k in range(1, len(paths) + 1)}, "normalizer": "none"},
    }


def child_environment(device: str, threads: int) -> dict[str, str]:
    """Of every measured process: the source tree on its path, and no GPU unless it is what is measured."""
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env


def run_child(cell: dict[str, Any], file: Path, ranks: int, env: dict[str, str]) -> None:
    """One process per rank, to the end. Raises UserError with the end of what a failed one printed."""
    file.write_text(json.dumps(cell))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    group = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **size, **meeting} for rank in range(ranks)]
    if ranks == 1:
        group = [{}]  # a single process makes its own group, which opens no port
    logs = [file.with_suffix(f".{rank}.log") for rank in range(ranks)]
    processes = []
    for extra, log in zip(group, logs, strict=True):
        with log.open("w") as out:
            command = [sys.executable, str(CHILD), str(file)]
            processes.append(subprocess.Popen(command, env=env | extra, stdout=out, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for status, log in zip(statuses, logs, strict=True):
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise UserError(f"{file.stem}: its process ended with status {status}; see {log}:\n{tail}")


def measure_cell(
    cell: Cell, folder: Path, tree: dict[str, Any] | None, passes: int, env: dict[str, str]
) -> dict[str, Any]:
    """What the ranks of one cell measured; its scores stay in `folder`."""
    out = folder / "cells" / cell.name
    out.parent.mkdir(exist_ok=True)
    spec = {"config": tree, "rollouts": str(folder / "rollouts.json"), "passes": passes, "out": str(out)}
    run_child(spec | {"scores": f"{out}.pt"}, out.with_suffix(".cell.json"), cell.ranks, env)
    found = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(cell.ranks)]
    return {"series": cell.series, "teachers": cell.teachers, "ranks": cell.ranks, "processes": found}


def largest_difference(folder: Path, cell: Cell, most: int) -> float | None:
    """max |Δ logprob| in nats to the same teachers, resident (of `lora` the first one, merged).

    most: teachers of the largest resident cell. None for a cell that nothing is compared with.
    """
    yardstick = {"lora": Cell("merged", 1), **dict.fromkeys(("offload", "delta", "sharded"), Cell("resident", most))}
    if cell.series not in yardstick:
        return None
    expected, got = (
        torch.load(folder / "cells" / f"{one.name}.pt", weights_only=True) for one in (yardstick[cell.series], cell)
    )
    # Without teachers, the one in the configuration is the base itself.
    roles = {"reference"} if cell.teachers == 0 else expected.keys() & got.keys()
    return max(float((got[role] - expected[role]).abs().max()) for role in roles)
