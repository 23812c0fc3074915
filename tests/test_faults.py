"""Faults that really happen to a run: kills, signals, missing ranks, a second run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import end_all, run_forked, start_forked
from interrupted import config_of, is_saving, same_training, steps_logged, tree, wait_until
from running import ROOT, learning, lines, write_config

from tcopd_fast.checkpoints import checkpoint_steps
from tcopd_fast.cli import main
from tcopd_fast.dist import World, free_port


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


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
