"""A signal during an evaluation: it is abandoned, the trained step is saved, and a resumed run evaluates first."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from forked import end_all, run_forked, start_forked
from interrupted import same_training, steps_logged, wait_until
from running import lines, write_config

from tcopd_fast.checkpoints import checkpoint_dir, checkpoint_steps

STEPS, EVERY = 4, 2


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def words(tiny, run_dir: Path) -> list[str]:
    """Evaluations of a small set, then of one that takes a second or two."""
    rows = tiny.prompts.read_text().splitlines(keepends=True)
    for name, count in (("few", 3), ("many", 24)):
        (run_dir.parent / f"{name}.jsonl").write_text("".join(rows[:count]))
    sets = [{"path": str(run_dir.parent / f"{name}.jsonl")} for name in ("few", "many")]
    tree = tiny.tree(
        run_dir,
        steps=STEPS,
        rollout={"prompts_per_step": 4, "max_new_tokens": 8},
        eval={"data": sets, "samples": 64, "every": EVERY},
        checkpoint={"every": 2, "keep_best": 1},
        judge={"default": "exact"},
        logging={"tensorboard": False, "token_samples": 4},
    )
    return ["--config", str(write_config(run_dir.with_name(run_dir.name + ".yaml"), tree))]


def evaluated(run_dir: Path) -> list[tuple[int, str]]:
    path = run_dir / "eval.jsonl"
    return [(row["step"], row["set"]) for row in lines(path)] if path.exists() else []


def all_sets(*steps: int) -> list[tuple[int, str]]:
    return [(step, name) for step in steps for name in ("few", "many")]


def score(run_dir: Path, step: int) -> float | None:
    return json.loads((checkpoint_dir(run_dir, step) / "manifest.json").read_text())["score"]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 rank", "2 ranks"])
def whole(tiny, tmp_path_factory, request) -> tuple[Path, int]:
    """A run that nothing happened to, and its number of ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_forked(words(tiny, run_dir), run_dir.with_name("log"), size=request.param)
    assert evaluated(run_dir) == all_sets(0, 2, 4)
    return run_dir, request.param


@pytest.mark.parametrize("moment", ["step 2, first set", "step 2, second set", "last step"])
def test_a_stopped_evaluation_is_made_up_for(tiny, whole, tmp_path, moment):
    step = STEPS if moment == "last step" else 2
    before = {"step 2, first set": all_sets(0), "step 2, second set": [*all_sets(0), (2, "few")]}
    expected = before.get(moment, all_sets(0, 2))
    unbroken, size = whole
    run_dir, log = tmp_path / "run", tmp_path / "log"
    processes = start_forked(words(tiny, run_dir), log, size=size)
    wait_until(lambda: steps_logged(run_dir) >= step and evaluated(run_dir) == expected, processes[0])
    os.kill(processes[-1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size, log.read_text()
    assert evaluated(run_dir) == expected, "the evaluation was to be cut short"
    assert checkpoint_steps(run_dir)[-1] == step and score(run_dir, step) is None
    assert log.read_text().count(f"stopped as asked: saved after step {step} of {STEPS}") == 1
    run_forked(["--resume", str(run_dir)], log, size=size)
    same_training(run_dir, unbroken)
    assert [score(run_dir, s) for s in (2, 4)] == [score(unbroken, s) for s in (2, 4)]
    assert sorted(p.name for p in (run_dir / "eval").iterdir()) == sorted(p.name for p in (unbroken / "eval").iterdir())
    run_forked(["--resume", str(run_dir)], log, size=size)
    assert evaluated(run_dir) == all_sets(0, 2, 4), "nothing is evaluated twice"


def test_a_stop_in_the_first_evaluation_saves_nothing(tiny, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    [process] = start_forked(words(tiny, run_dir), log)
    wait_until(lambda: evaluated(run_dir) == [(0, "few")], process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0 and "stopped as asked: nothing trained yet" in log.read_text()
    assert evaluated(run_dir) == [(0, "few")] and not checkpoint_steps(run_dir)
    run_forked(["--resume", str(run_dir), "steps=1"], log)
    assert evaluated(run_dir) == all_sets(0, 1)
