"""The run that a soak torments: started, watched, hit, resumed."""

from __future__ import annotations

import json
import os
import re
import resource
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from soak_judge import FILE
from soak_plan import (
    CONFIG,
    ENDING,
    ENGINE_KILLED,
    ENGINE_STOPPED,
    JUDGE_EXITS,
    JUDGE_HANGS,
    NO_ROOM,
    RANK_KILLED_DAMAGED,
    RANKS,
    ROOT,
    TERMINATED,
    Fault,
    overrides,
    soak_overrides,
    train_command,
)
from soak_watch import ENGINE, MARK, RANK, Member, Watch, marked, members, tree

from tcopd_fast.checkpoints import FILES, checkpoint_dir, checkpoint_steps
from tcopd_fast.errors import UserError
from tcopd_fast.rundir import write_atomically

STEP_LIMIT_S = 400.0
"""Longest wait for the next step to be logged, engines and launchers starting meanwhile."""
END_LIMIT_S = 120.0
POLL_S = 0.05
# Below the size of a checkpoint's files, above that of the logs.
FILE_LIMIT = 1_200_000
RESUMING = re.compile(r"resuming after step (\d+) of")


@dataclass
class Outcome:
    """One injected fault and what happened after it. Seconds count from the soak's beginning.

    recovered_s: from the fault until it was over: a step logged with a new engine, by the resumed run, or after the
    judge's verdict; or a checkpoint saved again. resumed_from: the step a resumed run began after; repeated: steps that
    had been logged and were done again. said: what the run said about it.
    """

    fault: Fault
    at: float
    logged: int
    recovered_s: float | None = None
    exit_status: int | None = None
    resumed_from: int | None = None
    repeated: int | None = None
    said: str = ""


@dataclass
class Soak:
    """The run under test. life: how often it was started, minus one."""

    out: Path
    steps: int
    seed: int
    life: int = -1
    process: subprocess.Popen | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.run_dir, self.order = self.out / "run", self.out / "judge_order"
        self.watch = Watch(lambda: self.process.pid if self.process else None, self.logged)

    @property
    def log(self) -> Path:
        """What the present life prints."""
        return self.out / f"life_{self.life}.log"

    def logged(self) -> int:
        """Steps in metrics.jsonl."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def last_row(self) -> dict[str, Any]:
        """The newest complete line of metrics.jsonl, {} before the first."""
        metrics = self.run_dir / "metrics.jsonl"
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def start(self) -> None:
        """Start or resume the run."""
        words = ["--resume", str(self.run_dir)]
        if not checkpoint_or_config(self.run_dir):
            words = ["--config", str(CONFIG), *overrides(self.steps, self.run_dir, self.seed), *soak_overrides()]
        self.life += 1
        self.starts.append({"at": self.watch.now(), "from": 0})
        self.process = launch(train_command(words, RANKS), self.log, self.token, self.order)

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = STEP_LIMIT_S) -> None:
        """Raises UserError when the run ends or the limit passes before the condition holds."""
        assert self.process is not None
        end = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None:
                raise UserError(f"soak: the run ended with status {self.process.returncode} before {what}: {self.log}")
            if time.monotonic() > end:
                raise UserError(f"soak: {limit_s:.0f} s without {what}: {self.log}")
            time.sleep(POLL_S)

    def run(self, faults: Sequence[Fault]) -> int:
        """All of it; returns the last exit status."""
        with self.watch:
            self.start()
            for fault in faults:
                self.wait(lambda step=fault.step: self.logged() >= step, f"step {fault.step}")
                time.sleep(fault.delay_s)
                self.inject(fault)
            self.wait(lambda: self.logged() == self.steps, "the last step", STEP_LIMIT_S * 4)
            return self.ended()

    def inject(self, fault: Fault) -> None:
        """One fault, from its moment until the run is over it."""
        outcome = Outcome(fault, self.watch.now(), self.logged())
        self.outcomes.append(outcome)
        print(f"{outcome.at:6.1f} s  after step {outcome.logged}: {fault.kind}", flush=True)
        if fault.kind in ENDING:
            self._end(fault, outcome)
        elif fault.kind in (ENGINE_KILLED, ENGINE_STOPPED):
            self._hit_engine(fault)
        elif fault.kind in (JUDGE_HANGS, JUDGE_EXITS):
            self._order_judge(fault)
        elif fault.kind == NO_ROOM:
            self._take_room()
        outcome.recovered_s = self.watch.now() - outcome.at
        print(f"{self.watch.now():6.1f} s  over it after {outcome.recovered_s:.1f} s", flush=True)

    def _end(self, fault: Fault, outcome: Outcome) -> None:
        assert self.process is not None
        if fault.kind == TERMINATED:
            self.process.terminate()
        else:
            self._members(RANK)[fault.rank].process.kill()
        outcome.exit_status = self.ended()
        logged = self.logged()
        if fault.kind == RANK_KILLED_DAMAGED:
            flip_a_bit(self.run_dir)
        self.start()
        self.wait(lambda: RESUMING.search(self.log.read_text(errors="replace")), "its resumption")
        text = self.log.read_text(errors="replace")
        found = RESUMING.search(text)
        assert found is not None
        outcome.resumed_from = self.starts[-1]["from"] = int(found[1])
        outcome.repeated = logged - outcome.resumed_from
        said = "; ".join(line.strip() for line in text.splitlines() if " is damaged" in line)
        outcome.said = said.replace(str(self.run_dir), "RUN")
        # The logs were cut to the checkpoint before the message.
        self.wait(lambda: self.logged() > outcome.resumed_from, "a step of the resumed run")

    def _hit_engine(self, fault: Fault) -> None:
        before = self.last_row()["rollout/engine_restarts"]
        [engine] = self._members(ENGINE)
        os.killpg(engine.process.pid, signal.SIGKILL if fault.kind == ENGINE_KILLED else signal.SIGSTOP)
        self.wait(lambda: self.last_row()["rollout/engine_restarts"] > before, "a new engine")

    def _order_judge(self, fault: Fault) -> None:
        write_atomically(self.order, "hang" if fault.kind == JUDGE_HANGS else "exit")
        self.wait(lambda: not self.order.exists(), "the judge misbehaving")
        self.order.with_suffix(".taken").unlink()
        logged = self.logged()
        self.wait(lambda: self.logged() > logged, "a step after it")

    def _take_room(self) -> None:
        ranks = [member.process.pid for member in self._members(RANK)]
        for pid in ranks:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
        self.wait(lambda: self.last_row()["learner/failed_saves"] > 0, "a checkpoint that is not saved")
        for pid in ranks:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.wait(lambda: self.last_row()["learner/failed_saves"] == 0, "a checkpoint that is saved")

    def _members(self, kind: str) -> list[Member]:
        assert self.process is not None
        return [member for member in members(tree(self.process.pid)) if member.kind == kind]

    def ended(self) -> int:
        """Wait for the run's end and for that of all its processes; the exit status."""
        assert self.process is not None
        try:
            status = self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"soak: the run did not end within {END_LIMIT_S:.0f} s: {self.log}") from None
        left = left_after(self.token, 10.0)
        self.starts[-1] |= {"status": status, "ended": self.watch.now(), "left": [name_of(p) for p in left]}
        self.starts[-1]["engine_restarts"] = self.last_row().get("rollout/engine_restarts", 0)
        self.starts[-1]["engine_faults"] = sum(
            one.at >= self.starts[-1]["at"] and one.fault.kind in (ENGINE_KILLED, ENGINE_STOPPED)
            for one in self.outcomes
        )
        self.process = None
        return status

    def kill_all(self) -> None:
        """Nothing of the soak stays, whatever happened."""
        for process in marked(self.token):
            with suppress(psutil.Error):
                process.kill()


def checkpoint_or_config(run_dir: Path) -> bool:
    """Whether there is a run to resume."""
    return (run_dir / "config.yaml").exists()


def launch(command: Sequence[str], log: Path, token: str, order: Path) -> subprocess.Popen:
    """A training command in a process group of its own, one thread per process, output in `log`."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, MARK: token, FILE: str(order), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("wb") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def left_after(token: str, seconds: float) -> list[psutil.Process]:
    """Processes of the soak that are still there after some seconds."""
    end = time.monotonic() + seconds
    while (left := marked(token)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return "gone meanwhile"


def flip_a_bit(run_dir: Path) -> None:
    """Damage the newest checkpoint."""
    newest = checkpoint_steps(run_dir)[-1]
    [file] = (checkpoint_dir(run_dir, newest) / FILES).glob("*model_states.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
