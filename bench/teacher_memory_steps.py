"""What one more teacher adds to a training step: `tcopd train` with 1, 2 and 4 teachers in three placements."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from teacher_memory_models import SHAPES, Shape, write_models
from teacher_memory_plan import child_environment, config_tree

from tcopd_fast.errors import UserError
from tcopd_fast.scoring.weights import CheckpointFolder

PLACEMENTS = ("resident", "offload", "delta")
COUNTS = (1, 2, 4)
SHAPE = Shape(16000, 384, 1024, 8, sequences=16, response_tokens=64)
# The first steps of a process warm caches and are not counted.
WARM_UP_STEPS = 1
MEASURED_STEPS = 4
ROUNDS = 2


def measure_steps(folder: Path, tiny: bool) -> dict[str, Any]:
    """Every run of every round, round by round; its steps' seconds, warm-up left out. CPU, one thread."""
    shape = SHAPES["tiny"] if tiny else SHAPE
    counts, rounds, steps = ((1, 2), 1, 2) if tiny else (COUNTS, ROUNDS, MEASURED_STEPS)
    models = folder / "models"
    write_models(models, shape, PLACEMENTS, max(counts), jobs=1)
    runs = []
    for turn in range(rounds):
        for placement in PLACEMENTS:
            for count in counts:
                tree = run_tree(models, folder / "run", placement, count, shape, WARM_UP_STEPS + steps)
                runs.append({"round": turn, "placement": placement, "teachers": count, **train_seconds(folder, tree)})
                print(f"steps, {placement}, {count} teachers: {runs[-1]['time_s/step'][-1]:.2f} s each", flush=True)
    return {
        "weights": CheckpointFolder(models / "base").weights(),
        "sequences": shape.sequences,
        "response_tokens": shape.response_tokens,
        "measured_steps": steps,
        "rounds": rounds,
        "runs": runs,
    }


def run_tree(models: Path, run_dir: Path, placement: str, count: int, shape: Shape, steps: int) -> dict[str, Any]:
    """Configuration of a training run whose teachers share a reward of Σλ = 1."""
    tree = config_tree(models, placement, count, shape.sequences, shape.response_tokens)
    tree |= {"run_dir": str(run_dir), "steps": steps, "learner": {"lr": 1e-6}, "logging": {"tensorboard": False}}
    tree["objective"]["lambdas"] = {name: 1 / count for name in tree["teachers"]}
    return tree


def train_seconds(folder: Path, tree: dict[str, Any]) -> dict[str, list[float]]:
    """`time_s/*` of every step after the warm-up. Raises UserError when the run fails."""
    shutil.rmtree(tree["run_dir"], ignore_errors=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "tcopd_fast.cli", "train", "--ranks", "1", "--config", str(file)]
    done = subprocess.run(command, env=child_environment("cpu", 1), capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise UserError(f"{' '.join(command[1:])}: ended with status {done.returncode}:\n{tail}")
    lines = (Path(tree["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    names = sorted({key for row in rows for key in row if key.startswith("time_s/")})
    return {name: [row[name] for row in rows] for name in names}
