"""Full disks, damaged checkpoints, resumes that cannot be, and which checkpoints are kept."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest
from forked import end_all, run_forked, start_forked
from interrupted import config_of, is_saving, same_training, tree, wait_until
from running import learning, lines, write_config

from tcopd_fast.checkpoints import FILES, checkpoint_dir, checkpoint_steps
from tcopd_fast.cli import main


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


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
