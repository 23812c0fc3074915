"""What a measurement on a GPU says of itself: device, driver, versions, commit and command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcopd_fast.rundir import environment


def about(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """script: as a reader calls it, "bench/sanitize.py"."""
    found: dict[str, Any] = environment(0)
    found["git_sha"] = found["git_sha"] or os.environ.get("GIT_SHA")
    found["command"] = " ".join(["python", script, *map(without_folder, arguments)])
    return found | {"cuda": torch.version.cuda, "driver": driver_version()}


def without_folder(word: str) -> str:
    """An absolute path relative to the working directory, or its last part alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
