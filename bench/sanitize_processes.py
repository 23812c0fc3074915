"""The processes of bench/sanitize.py: some cases each, under a tool or without one, within a budget of time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_profile_launches import entry_kernels, function_name
from sanitize_control import control_kernel

TOOLS = ("memcheck", "racecheck")
CONTROL = control_kernel.fn.__name__
NO_FAULT = "none"
ERROR_EXIT = 86
PRINT_LIMIT = 1000
OPTIONS = {"memcheck": ["--padding", "4096"], "racecheck": []}  # of one tool alone
SCRIPT = Path(__file__).resolve().parent / "sanitize.py"


class Runner:
    """Starts child processes within the budget."""

    def __init__(self, sanitizer: str | None, folder: Path, budget_s: float, all_tiles: bool) -> None:
        """sanitizer: the program, where tools are run."""
        self.sanitizer, self.folder, self.all_tiles = sanitizer, folder, all_tiles
        self.deadline = time.monotonic() + budget_s
        self.children = 0

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def command(self, tool: str | None, cases: Sequence[str], out: Path) -> list[str]:
        own = [sys.executable, str(SCRIPT), "--case", ",".join(cases), "--json", str(out)]
        own += ["--control", tool or NO_FAULT, *["--all-tiles"] * self.all_tiles]
        if tool is None or self.sanitizer is None:
            return own
        kernels = [word for name in checked_names() for word in ("--kernel-name", f"kns={name}")]
        return [
            self.sanitizer, "--tool", tool, *OPTIONS[tool], "--error-exitcode", str(ERROR_EXIT),
            "--destroy-on-device-error", "kernel", "--report-api-errors", "no", "--show-backtrace", "device",
            "--target-processes", "application-only", "--launch-timeout", "0", "--print-limit", str(PRINT_LIMIT),
            *kernels, *own,
        ]  # fmt: skip

    def start(self, tool: str | None, cases: Sequence[str]) -> Child:
        self.children += 1
        stem = self.folder / f"{self.children}"
        return Child(self.command(tool, cases, stem.with_suffix(".json")), stem)

    def run(self, tool: str | None, cases: Sequence[str], share: float = 1.0) -> Child:
        """share: of the time that is left."""
        child = self.start(tool, cases)
        child.wait(share * self.left_s())
        return child


class Child:
    """A child process, its output and the rows that it got to write."""

    def __init__(self, command: list[str], stem: Path) -> None:
        self.command, self.stem = command, stem
        self.began = time.monotonic()
        self.timed_out = False
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        with open(stem.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, limit_s: float) -> None:
        try:
            self.process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            self.timed_out = True
            os.killpg(self.process.pid, signal.SIGKILL)  # a tool's program and the one that it watches
            self.process.wait()
        self.seconds = time.monotonic() - self.began

    def log(self) -> str:
        return self.stem.with_suffix(".log").read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        path = self.stem.with_suffix(".json")
        return json.loads(path.read_text())["rows"] if path.exists() else []

    def end(self) -> str:
        """How the process ended, with the last line of its output where it failed or came to no case."""
        if self.timed_out:
            return "out of time"
        if self.process.returncode in (0, 1, ERROR_EXIT) and self.rows():
            return "ended"
        lines = [line for line in self.log().splitlines() if line.strip()]
        return f"status {self.process.returncode}: {lines[-1] if lines else 'no output'}"


def checked_names() -> list[str]:
    return sorted({function_name(kernel) for kernel in entry_kernels()} | {CONTROL})


def shown_command(command: Sequence[str]) -> str:
    """As a reader would type it: programs by name, the filter's many names and the hand-over between processes out."""
    text = " ".join(Path(word).name if os.path.isabs(word) else word for word in command)
    text = re.sub(r"( --kernel-name kns=\S+)+", " --kernel-name kns=…", text)
    text = re.sub(r" --json \S+\.json", "", text)
    return text.replace("sanitize.py", "bench/sanitize.py")
