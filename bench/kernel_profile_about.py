"""What a measurement on a GPU says of itself: device, driver, versions, commit and command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcopd_fast.machine import driver_version
from tcopd_fast.rundir import environment


def about(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """script: as a reader calls it, "bench/sanitize.py"."""
    found: dict[str, Any] = environment(0)
    found["command"] = command_line(script, arguments)
    return found | {"cuda": torch.version.cuda, "driver": driver_version()}


def command_line(script: str, arguments: Sequence[str]) -> str:
    return " ".join(["python", script, *map(without_folder, arguments)])


def without_folder(word: str) -> str:
    """An absolute path relative to the working directory, or its last part alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
