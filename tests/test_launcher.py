"""The deepspeed launcher: one machine, and two machines played by two launchers on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import run_forked
from interrupted import steps_logged
from running import ROOT, learning, lines, write_config

from tcopd_fast.checkpoints import checkpoint_steps
from tcopd_fast.cli import main
from tcopd_fast.dist import free_port
from tcopd_fast.launcher import Launcher, read_options

pytestmark = pytest.mark.slow

DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
TRAIN = [sys.executable, "-m", "tcopd_fast.cli", "train"]


def start(command: Sequence[str], log: Path) -> subprocess.Popen:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as file:
        return subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)


def finish(processes: Sequence[subprocess.Popen], logs: Sequence[Path], status: int = 0) -> str:
    """Everything that was printed. Fails when a launcher does not end with `status`."""
    found = [process.wait(200) for process in processes]
    text = "\n".join(log.read_text() for log in logs)
    assert found == [status] * len(processes), text
    return text


def two_machines(tmp_path: Path, slots: Sequence[int] = (1, 1)) -> list[list[str]]:
    """What each of two machines gives to its launcher; both names are this machine's."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("".join(f"{n} slots={s}\n" for n, s in zip(("localhost", "127.0.0.1"), slots, strict=True)))
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node), *meeting] for node in (0, 1)]


def config_file(tiny, tmp_path: Path, name: str = "run", **sections) -> str:
    return str(write_config(tmp_path / f"{name}.yaml", tiny.tree(tmp_path / name, **sections)))


def check_run(run_dir: Path, size: int = 2) -> None:
    assert [row["step"] for row in lines(run_dir / "metrics.jsonl")] == [1, 2]
    manifest = json.loads((run_dir / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (2, size)


def test_ranks_know_how_many_share_their_machine_and_leave_together(tmp_path):
    nodes = two_machines(tmp_path, slots=(2, 1))
    logs = [tmp_path / "log0", tmp_path / "log1"]
    words = ["--module", "launched_world", str(tmp_path)]
    finish([start([*DEEPSPEED, *node, *words], log) for node, log in zip(nodes, logs, strict=True)], logs)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [each["ranks"] for each in seen] == [[0, 1, 2]] * 3
    assert [(each["ranks_here"], each["local_rank"]) for each in seen] == [(2, "0"), (2, "1"), (1, "0")]
    assert [(tmp_path / f"{rank}.left").read_text() for rank in range(3)] == ["3 False"] * 3, "none leaves early"


def test_two_machines_train_one_run(tiny, tmp_path):
    """ZeRO-2 over two launchers, one by `deepspeed`, one by `tcopd train`; the numbers are those of plain two ranks."""
    config = config_file(tiny, tmp_path)
    nodes, logs = two_machines(tmp_path), [tmp_path / "log0", tmp_path / "log1"]
    first = [*DEEPSPEED, *nodes[0], "--no_local_rank", "--module", "tcopd_fast.train", "--config", config]
    second = [*DEEPSPEED, *nodes[1], "--module", "tcopd_fast.train", "--config", config]
    text = finish([start(first, logs[0]), start(second, logs[1])], logs)
    assert "2 rank(s)" in text and "Traceback" not in text
    check_run(tmp_path / "run")
    run_forked(["--config", config_file(tiny, tmp_path, "plain")], tmp_path / "plain.log", size=2)
    rows = [[learning(row) for row in lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "plain")]
    assert rows[0] == rows[1]


def test_tcopd_train_gives_options_to_the_launcher(tiny, tmp_path):
    """A signal to the command on the second machine stops the whole run, saved."""
    config, run_dir = config_file(tiny, tmp_path, steps=1000), tmp_path / "run"
    nodes, logs = two_machines(tmp_path), [tmp_path / "log0", tmp_path / "log1"]
    commands = [[*TRAIN, "--config", config, f"--launcher={' '.join(node)}"] for node in nodes]
    processes = [start(command, log) for command, log in zip(commands, logs, strict=True)]
    while not steps_logged(run_dir):
        assert processes[0].poll() is None, logs[0].read_text()
        time.sleep(0.05)
    processes[1].terminate()
    text = finish(processes, logs)
    assert "stopped as asked" in text and checkpoint_steps(run_dir)[-1] == steps_logged(run_dir)


def test_a_second_machine_that_never_comes_is_named(tiny, tmp_path):
    config = config_file(tiny, tmp_path, learner={"rank_timeout_s": 5.0})
    node, log = two_machines(tmp_path)[0], tmp_path / "log0"
    text = finish([start([*TRAIN, "--config", config, f"--launcher={' '.join(node)}"], log)], [log], status=2)
    assert text.count("error: rank 1 of 2 did not start within 5 s") == 1
    assert "every machine got the same number of ranks and the same MASTER_ADDR" in text


def test_deepspeed_alone_on_one_machine(tiny, tmp_path):
    config, log = config_file(tiny, tmp_path), tmp_path / "log"
    meeting = ["--num_accelerators", "2", "--master_port", str(free_port())]
    finish([start([*DEEPSPEED, *meeting, "--module", "tcopd_fast.train", "--config", config], log)], [log])
    check_run(tmp_path / "run")


def test_a_config_error_is_said_once_under_the_launcher(tiny, tmp_path):
    config, log = config_file(tiny, tmp_path, learner={"zero_stge": 1}), tmp_path / "log"
    meeting = ["--num_accelerators", "2", "--master_port", str(free_port())]
    process = start([*DEEPSPEED, *meeting, "--module", "tcopd_fast.train", "--config", config], log)
    assert process.wait(60) != 0 and log.read_text().count("zero_stge: unknown key") == 1


def test_a_hostfiles_ranks_are_counted(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nnode0 slots=8\n\nnode1   slots=4 # smaller\n#node2 slots=8\n")
    for node, first in ((0, True), (1, False)):
        words = f"-H {hosts} --no_ssh --node_rank={node}"
        assert read_options(words, None) == Launcher(12, words.split(), first)
    assert read_options("--bind_cores_to_rank", 3).words[-1] == "--bind_cores_to_rank"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher=--hostfile /nowhere"], "--launcher: hostfile /nowhere: not found"),
        (["--launcher=--hostfile 'x"], "--launcher: cannot be split into words"),
        (["--launcher=--module x"], "--launcher: --module is refused"),
        (["--launcher=--hostfile h", "--ranks=2"], "--ranks: the hostfile says how many"),
    ],
)
def test_options_for_the_launcher_that_cannot_work_are_refused(tiny, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h").write_text("localhost slots=1\n")
    assert main(["train", "--config", config_file(tiny, tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
