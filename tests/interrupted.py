"""Small runs to be interrupted, and whether what they leave is what an unbroken run leaves."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from running import learning, lines, write_config

from tcopd_fast.checkpoints import FILES, checkpoint_dir, checkpoint_steps

COMMON = {
    "steps": 40,
    "rollout": {"prompts_per_step": 4, "max_new_tokens": 8},
    "learner": {"minibatches": 2, "warmup_steps": 3},
    "checkpoint": {"every": 1},
    "logging": {"tensorboard": False, "token_samples": 4},
}
LOGS = ("metrics.jsonl", "eval.jsonl", "token_samples.jsonl")


def tree(tiny, run_dir: Path, **sections) -> dict:
    evaluation = {"data": [{"path": str(tiny.prompts), "limit": 4}], "every": 7}
    return tiny.tree(run_dir, **{**COMMON, "eval": evaluation, **sections})


def config_of(tiny, run_dir: Path, **sections) -> list[str]:
    run_dir.parent.mkdir(exist_ok=True)
    file = run_dir.with_name(run_dir.name + ".yaml")
    return ["--config", str(write_config(file, tree(tiny, run_dir, **sections)))]


def same_training(one: Path, other: Path) -> None:
    """Equal metrics, evaluations, prompts and sampled tokens, every step once; equal weights and optimizer state."""
    for name in LOGS:
        assert [learning(row) for row in lines(one / name)] == [learning(row) for row in lines(other / name)], name
    [last] = {checkpoint_steps(run)[-1] for run in (one, other)}
    for file in sorted(path.name for path in (checkpoint_dir(one, last) / FILES).iterdir()):
        left, right = (torch.load(checkpoint_dir(run, last) / FILES / file, weights_only=False) for run in (one, other))
        assert equal(left, right), file


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return not isinstance(left, int | float | str) or left == right


def wait_until(condition, process, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.is_alive(), "the run has ended"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.0005)


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(run_dir: Path, since_ns: int = 0) -> bool:
    """Whether a checkpoint is half-written that was begun after `since_ns`: an earlier crash may have left another."""
    for path in run_dir.glob("checkpoints/step_*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            if path.stat().st_ctime_ns > since_ns:
                return True
    return False
