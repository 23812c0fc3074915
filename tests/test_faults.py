"""Faults that really happen to a run: kills, signals, full disks, damaged files, NaN, missing ranks, a second run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from forked import end_all, run_forked, start_forked
from running import ROOT, learning, lines, write_config

from tcopd_fast.checkpoints import FILES, checkpoint_dir, checkpoint_steps
from tcopd_fast.cli import main
from tcopd_fast.diagnosis import in_words, keys_to_look_at, non_finite
from tcopd_fast.dist import World, free_port
from tcopd_fast.types import Prompt, RewardedRollout, Rollout, ScoredRollout

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


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_forked(config_of(tiny, run_dir), run_dir.with_name("log"))
    assert [row["step"] for row in lines(run_dir / "metrics.jsonl")] == list(range(1, 41))
    return run_dir


def test_equal_seeds_give_equal_runs(tiny, whole, tmp_path):
    run_forked(config_of(tiny, tmp_path / "again"), tmp_path / "log")
    same_training(tmp_path / "again", whole)
    run_forked(config_of(tiny, tmp_path / "other", seed=4, steps=1), tmp_path / "log")
    assert learning(lines(tmp_path / "other" / "metrics.jsonl")[0]) != learning(lines(whole / "metrics.jsonl")[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_killed_at_24_random_moments_is_the_unbroken_run(tiny, whole, tmp_path):
    """SIGKILL while starting, while at work on a step, and while saving, 8 times each, in random order."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    chance = random.Random(20)
    moments = chance.sample(["starting", "at work", "saving"] * 8, 24)
    words, hits = config_of(tiny, run_dir), {"starting": 0, "at work": 0, "saving": 0}
    for moment in moments:
        done, since = steps_logged(run_dir), time.time_ns()
        [process] = start_forked(words, log)
        if moment == "starting":
            time.sleep(chance.uniform(0.0, 0.8))
        elif moment == "at work":
            wait_until(lambda done=done: steps_logged(run_dir) > done, process)
            time.sleep(chance.uniform(0.0, 0.15))
        else:
            wait_until(lambda since=since: is_saving(run_dir, since), process)
            time.sleep(chance.uniform(0.0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        at_work = "at work" if steps_logged(run_dir) > done else "starting"
        hits["saving" if is_saving(run_dir, since) else at_work] += 1
        words = ["--resume", str(run_dir)] if (run_dir / "config.yaml").exists() else words
    assert hits["starting"] >= 3 and hits["at work"] >= 3 and hits["saving"] >= 3, hits
    run_forked(words, log)
    assert not is_saving(run_dir), "what a crash left half-written must not stay"
    same_training(run_dir, whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_killed_are_the_unbroken_run(tiny, tmp_path):
    log, settings = tmp_path / "log", {"steps": 8, "learner": {"zero_stage": 3}}
    run_forked(config_of(tiny, tmp_path / "whole", **settings), log, size=2)
    run_dir, chance = tmp_path / "run", random.Random(2)
    words = config_of(tiny, run_dir, **settings)
    for _ in range(3):
        done = steps_logged(run_dir)
        processes = start_forked(words, log, size=2)
        wait_until(lambda done=done: steps_logged(run_dir) > done, processes[0])
        time.sleep(chance.uniform(0.0, 0.2))
        for process in chance.sample(processes, 2):
            process.kill()
            process.join()
        words = ["--resume", str(run_dir)]
    run_forked(words, log, size=2)
    same_training(run_dir, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0(tiny, whole, tmp_path, number):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    [process] = start_forked(config_of(tiny, run_dir, checkpoint={"every": 0}), log)
    wait_until(lambda: steps_logged(run_dir) >= 3, process)
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # a launcher passes on what the process group got already
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    [step] = checkpoint_steps(run_dir)
    assert step >= 3 and f"stopped as asked: saved after step {step} of 40" in log.read_text()
    run_forked(["--resume", str(run_dir), "checkpoint.every=1"], log)
    same_training(run_dir, whole)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    processes = start_forked(config_of(tiny, run_dir), log, size=2)
    wait_until(lambda: steps_logged(run_dir) >= 1, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], log.read_text()
    assert checkpoint_steps(run_dir)[-1] == steps_logged(run_dir)


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    hang = {"default": "user_judges:never", "timeout_s": 3600.0}
    words = config_of(tiny, run_dir, judge=hang, eval={"data": []})
    [process] = start_forked(words, log, JUDGING=str(tmp_path / "judging"))
    wait_until((tmp_path / "judging").exists, process)
    process.terminate()
    process.join(4)
    assert process.exitcode is None, "it waits for the end of the step"
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "ranks"), [("tcopd train", 2), ("its process group", 1)])
def test_a_signal_to_the_command_stops_all_ranks_under_the_launcher(tiny, tmp_path, whom, ranks):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tcopd_fast.cli", "train", *config_of(tiny, run_dir, steps=1000)]
    command += ["--ranks", str(ranks)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    process.is_alive = lambda: process.poll() is None
    wait_until(lambda: steps_logged(run_dir) >= 2, process)
    (os.kill if whom == "tcopd train" else os.killpg)(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    assert checkpoint_steps(run_dir)[-1] == steps_logged(run_dir)
    text = (tmp_path / "log").read_text()
    assert text.count("SIGTERM: saving a checkpoint") == 1 and "stopped as asked" in text and "Traceback" not in text


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(tiny, tmp_path, capsys):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = config_of(tiny, run_dir)
    [first] = start_forked(words, log)
    wait_until(lambda: steps_logged(run_dir) >= 1, first)
    for attempt in (words, ["--resume", str(run_dir)]):
        text = run_forked(attempt, tmp_path / "second", status=2)
        assert f"in use by process {first.pid} on " in text and "scoring by" not in text
        assert main(["train", *attempt]) == 2
        assert f"in use by process {first.pid} on " in capsys.readouterr().err
    first.kill()
    first.join()
    os.kill(os.getpid(), 0)
    run_forked(["--resume", str(run_dir), "steps=2"], log)


def test_nan_from_a_teacher_skips_steps_and_ends_with_a_diagnosis(tiny, tmp_path):
    """Every ZeRO stage in both dtypes: no weight moves, and the message names the teacher."""
    broken = tmp_path / "broken"
    damage(tiny.expert, broken)
    for dtype, stage in product(("float32", "bfloat16"), (1, 2, 3)):
        run_dir = tmp_path / f"{dtype}-{stage}"
        words = config_of(
            tiny,
            run_dir,
            steps=9,
            model={"dtype": dtype},
            teachers={"expert": {"path": str(broken)}, "anti": {"path": str(tiny.anti)}},
            learner={"zero_stage": stage, "max_skipped_steps": 3},
            eval={"data": []},
        )
        text = run_forked(words, tmp_path / f"log-{dtype}-{stage}", status=2)
        assert "3 optimizer steps in a row had a gradient that is not finite: teacher expert gave numbers" in text
        assert [row["learner/skipped_steps"] for row in lines(run_dir / "metrics.jsonl")] == [1, 1, 1]
        assert checkpoint_steps(run_dir) == [1, 2], "the step that ended the run must not be saved"
        record = json.loads((run_dir / "diagnosis.json").read_text())
        assert {r["source"] for r in record["responses"]} == {"teacher expert"} and len(record["responses"]) == 4
        assert record["responses"][0]["tokens"][0] | {"token_id": 0} == {"position": 0, "token_id": 0, "value": "nan"}
        assert record["look_at"]["teachers.expert.path"] == str(broken)
        weights = weights_of(run_dir, stage)
        for name, start in start_weights(tiny).items():
            expected = start.detach().to(getattr(torch, dtype)).to(weights[name].dtype)
            torch.testing.assert_close(weights[name], expected, atol=0, rtol=0)


def rewarded(**broken) -> tuple[RewardedRollout, torch.Tensor]:
    """One response of three tokens; each keyword puts a number into the third token of that source."""

    def values(source: str) -> torch.Tensor:
        return torch.tensor([-1.0, -2.0, broken.get(source, -3.0)])

    prompt = Prompt("p7", "math", (1,), "", "1", "")
    rollout = Rollout(prompt, 0, (4, 5, 6), values("rollout"), "stop", 0, "")
    teachers, bases = {"expert": values("teacher"), "anti": values("fine")}, {"expert": values("base")}
    scored = ScoredRollout(rollout, values("reference"), teachers, bases, None)
    return RewardedRollout(scored, values("reward"), values("reference"), {}, None), values("learner")


@pytest.mark.parametrize(
    ("source", "name", "key"),
    [
        ("rollout", "rollout", "rollout.engine"),
        ("learner", "learner", "learner.lr"),
        ("reference", "reference", "reference"),
        ("teacher", "teacher expert", "teachers.expert.path"),
        ("base", "base of expert", "teachers.expert.base"),
        ("reward", "reward", "objective.logratio_clamp"),
    ],
)
def test_every_source_of_a_number_that_is_not_finite_is_named(source, name, key):
    fine, broken = rewarded(), rewarded(**{source: float("-inf")})
    findings = non_finite(*zip(fine, broken, strict=True))
    token = {"position": 2, "token_id": 6, "value": "-inf"}
    common = {"prompt_id": "p7", "domain": "math", "sample": 0, "count": 1, "tokens": [token]}
    assert findings == [{"source": name, **common}] and key in keys_to_look_at(findings)
    assert in_words(findings) == f"{name} gave numbers that are not finite (1 response, first prompt p7)"


def test_weights_that_overflow_end_the_run_before_they_are_saved(tiny, tmp_path):
    huge = {"lr": 3e38, "weight_decay": 1.0, "betas": [0.0, 0.999], "warmup_steps": 0}
    words = config_of(tiny, tmp_path / "run", learner=huge, eval={"data": []})
    text = run_forked(words, tmp_path / "log", status=2)
    assert "step 1: the optimizer step left weights that are not finite" in text
    assert checkpoint_steps(tmp_path / "run") == []
    assert "learner.lr" in json.loads((tmp_path / "run" / "diagnosis.json").read_text())["look_at"]


def test_a_student_with_weights_that_are_not_finite_is_refused(tiny, tmp_path):
    damage(tiny.student, tmp_path / "broken")
    model = {"path": str(tmp_path / "broken"), "dtype": "float32"}
    text = run_forked(config_of(tiny, tmp_path / "run", model=model), tmp_path / "log", status=2)
    assert "holds weights that are not finite" in text


def damage(source: Path, target: Path) -> None:
    from tiny import make_tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)


def weights_of(run_dir: Path, stage: int) -> dict[str, torch.Tensor]:
    from tcopd_fast.export import checkpoint_weights

    return checkpoint_weights(checkpoint_dir(run_dir, checkpoint_steps(run_dir)[-1]), stage)


def start_weights(tiny) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(tiny.student).named_parameters())


def test_a_file_system_without_room_costs_no_checkpoint(tiny, whole, tmp_path):
    """Writes fail for real, by RLIMIT_FSIZE lowered and raised from outside: warned, counted, tried again."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    # Without the largest log, so that only checkpoint files meet the limit.
    [process] = start_forked(config_of(tiny, run_dir, logging={"tensorboard": False, "token_samples": 0}), log)
    wait_until(lambda: len(checkpoint_steps(run_dir)) == 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (140_000, resource.RLIM_INFINITY))
    wait_until(lambda: log.read_text().count("training goes on, the next save tries again") >= 2, process)
    assert len(checkpoint_steps(run_dir)) == 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert "not saved: File too large" in log.read_text()
    failed = [row.pop("learner/failed_saves") for row in map(learning, lines(run_dir / "metrics.jsonl"))]
    assert max(failed) >= 2 and failed[-1] == 0 and checkpoint_steps(run_dir)[-1] == 40
    rows = [
        [{key: value for key, value in learning(row).items() if key != "learner/failed_saves"} for row in lines(path)]
        for path in (run_dir / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


def test_a_log_that_cannot_be_written_is_one_message(tiny, whole, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    [process] = start_forked(config_of(tiny, run_dir), log)
    wait_until(lambda: len(checkpoint_steps(run_dir)) == 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    process.join(60)
    assert process.exitcode == 2 and "Traceback" not in log.read_text(), log.read_text()
    assert f"error: {run_dir}: File too large; make room, then continue with `tcopd train --resume" in log.read_text()
    run_forked(["--resume", str(run_dir)], log)
    same_training(run_dir, whole)


def test_a_full_disk_at_the_last_save_is_one_message(tiny, tmp_path):
    """A real full disk: a tmpfs with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs more rights than this process has")
    try:
        run_dir, log = disk / "run", tmp_path / "log"
        words = ["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, run_dir, steps=3)))]
        text = run_forked(words, log, status=2)
        assert checkpoint_steps(run_dir) == [1] and not is_saving(run_dir)
        assert text.count("No space left on device") == 2 and "WARNING: checkpoint" in text
        assert "make room, then `tcopd train --resume" in text
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        run_forked(["--resume", str(run_dir)], log.with_name("log2"))
        assert checkpoint_steps(run_dir) == [2, 3]
    finally:
        subprocess.run(["umount", disk], check=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (flip, "has not the SHA-256 it was written with"),
    "a truncated file": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "has 1000 bytes instead of"),
    "a missing file": (Path.unlink, "No such file"),
}


@pytest.fixture(scope="module")
def three_steps(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("three") / "run"
    run_forked(config_of(tiny, run_dir, steps=3), run_dir.with_name("log"))
    return run_dir


def test_damaged_checkpoints_are_set_aside_and_the_last_good_one_is_used(tiny, three_steps, whole, tmp_path):
    """Damage newest after newest, one kind after another; every resume continues to the same metrics."""
    run_dir, log = three_steps, tmp_path / "log"
    for steps, (harm, message) in zip((4, 5, 6), DAMAGE.values(), strict=True):
        newest = checkpoint_steps(run_dir)[-1]
        [file] = (checkpoint_dir(run_dir, newest) / FILES).glob("*model_states.pt")
        harm(file)
        log.unlink(missing_ok=True)
        text = run_forked(["--resume", str(run_dir), f"steps={steps}"], log)
        assert f"step_{newest:06d} is damaged: {file.name}" in text and message in text
        assert f"resuming after step {newest - 1} of {steps}" in text
        assert (run_dir / "checkpoints" / f"step_{newest:06d}.damaged").is_dir(), "damaged data is not deleted"
    expected = [learning(row) for row in lines(whole / "metrics.jsonl")][:6]
    assert [learning(row) for row in lines(run_dir / "metrics.jsonl")] == expected
    for step in checkpoint_steps(run_dir):
        (checkpoint_dir(run_dir, step) / "manifest.json").write_text("{")
    text = run_forked(["--resume", str(run_dir), "steps=7"], tmp_path / "log2", status=2)
    assert "no checkpoint is good (step 6: manifest.json cannot be read; step 5: " in text
    assert len(checkpoint_steps(run_dir)) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4", "seed: the run began with 3 and cannot go on with 4"),
        ("data.shuffle=false", "data.shuffle: the run began with True"),
        ("rollout.prompts_per_step=8", "rollout.prompts_per_step: the run began with 4"),
        ("learner.zero_stage=3", "learner.zero_stage: the run began with 2"),
    ],
)
def test_a_resume_that_would_break_the_data_order_is_refused(whole, capsys, override, message):
    assert main(["train", "--resume", str(whole), override]) == 2
    assert message in capsys.readouterr().err


def test_a_resume_with_other_data_in_the_file_is_refused(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(tiny.prompts.read_text())
    words = config_of(tiny, tmp_path / "run", steps=1, data={"train": [{"path": str(prompts)}]}, eval={"data": []})
    run_forked(words, tmp_path / "log")
    prompts.write_text("".join(reversed(tiny.prompts.read_text().splitlines(keepends=True))))
    text = run_forked(["--resume", str(tmp_path / "run"), "steps=2"], tmp_path / "log2", status=2)
    assert "the training prompts are not those that the run began with" in text
    moved = f"data.train=[{{path: {tiny.prompts}}}]"
    text = run_forked(["--resume", str(tmp_path / "run"), "steps=2", "learner.lr=0.5", moved], tmp_path / "log3")
    assert "changed since the run began: learner.lr: 0.001 -> 0.5" in text


def test_the_best_checkpoint_is_kept_and_exported(tiny, tmp_path, capsys):
    from tcopd_fast.checkpoints import best_step

    run_dir = tmp_path / "run"
    evaluation = {"data": [{"path": str(tiny.prompts)}], "samples": 2, "every": 1}
    keep = {"every": 0, "keep_last": 1, "keep_best": 1, "best_of": "prompts"}
    words = config_of(tiny, run_dir, steps=8, eval=evaluation, checkpoint=keep, learner={"lr": 0.02})
    run_forked(words, tmp_path / "log")
    scores = {row["step"]: row["mean_at_k"] for row in lines(run_dir / "eval.jsonl") if row["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best_step(run_dir) == best and checkpoint_steps(run_dir) == sorted({best, 8})
    assert main(["export", str(run_dir), "--best", "--out", str(tmp_path / "out")]) == 0
    assert f"exported step {best}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"keep_best": 1, "best_of": "promts"}, "checkpoint.best_of=promts: no such evaluation set; there are prompts"),
        ({"keep_best": 1}, "checkpoint.keep_best=1: nothing is evaluated"),
    ],
)
def test_impossible_keys_of_the_best_checkpoint_are_refused(tiny, tmp_path, capsys, keep, message):
    sections = {} if "best_of" in keep else {"eval": {"data": []}}
    assert main(["train", *config_of(tiny, tmp_path / "run", checkpoint=keep, **sections)]) == 2
    assert message in capsys.readouterr().err


LIMITS = {"learner": {"rank_timeout_s": 6.0}, "eval": {"data": []}}


def test_a_rank_that_never_starts_is_named(tiny, tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    text = run_forked(config_of(tiny, tmp_path / "run", **LIMITS), tmp_path / "log", status=2, **alone, **meeting)
    assert "error: rank 1 of 2 did not start within 6 s" in text


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_launchers_number_of_ranks_here_is_read(monkeypatch, variable):
    """torchrun's variable and the deepspeed launcher's: ranks of one machine share its memory."""
    monkeypatch.setenv(variable, "4")
    assert World(0, 8, torch.device("cpu")).ranks_here == 4


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(tiny, tmp_path, fault):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    processes = start_forked(config_of(tiny, run_dir, **LIMITS), log, size=2)
    wait_until(lambda: steps_logged(run_dir) >= 1, processes[0])
    os.kill(processes[1].pid, fault)
    processes[0].join(60)
    processes[1].kill()
    processes[1].join()
    assert processes[0].exitcode == 2, log.read_text()
    assert "error: rank 1 of 2 ended or hung and the others cannot go on without" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_ranks_that_do_not_share_the_run_directory_are_refused(tiny, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    words = ["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, Path("run"))))]
    text = run_forked(words, tmp_path / "log", size=2, status=2, folders=folders)
    assert "run_dir run: what rank 0 writes there is not seen by rank 1 on" in text and f"{folders[1]}/run" in text
    assert not list(folders[1].iterdir()), "rank 0 alone writes"
