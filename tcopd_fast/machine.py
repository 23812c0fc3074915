"""What a program runs on: device, driver, commit. Needs torch alone."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent.parent


def device_name() -> str:
    """The GPU's name, or the processor's with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"CPU: {model}, {os.cpu_count()} cores"


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def source_commit() -> str | None:
    """Commit of the source tree this package runs from. '+' marks local changes.

    A tree without .git may be told by the variable GIT_SHA; for an installed wheel the commit is not known.
    """
    if not (SOURCE / ".git").exists():
        return os.environ.get("GIT_SHA")

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(SOURCE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "HEAD")
    return (sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) if sha else None
