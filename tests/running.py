"""Starting training processes the way a launcher does, and reading what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tcopd_fast.dist import free_port

ROOT = Path(__file__).resolve().parent.parent


def write_config(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }


def start(words: list[str], size: int = 1) -> list[subprocess.Popen]:
    """One `tcopd_fast.train` process per rank."""
    port = free_port()
    command = [sys.executable, "-m", "tcopd_fast.train", *words]
    return [
        subprocess.Popen(
            command, env=environment(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(size)
    ]


def run(words: list[str], size: int = 1) -> str:
    """Run to the end; the output of rank 0. Fails when any rank fails."""
    processes = start(words, size)
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)
    return outputs[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learning(row: dict[str, Any]) -> dict[str, Any]:
    """A metrics row without what a clock or an allocator says."""
    measured = ("time_s/", "peak_memory_bytes/")
    rates = ("/tokens_per_s", "/engine_busy_share", "/overlap_share")
    return {key: value for key, value in row.items() if not key.startswith(measured) and not key.endswith(rates)}
