"""Real trainer processes that start in a second: forked from one that has imported everything and done nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tcopd_fast.dist import free_port

PRELOAD = [
    "deepspeed.runtime.zero.muon.muon_optimizer",  # deepspeed.initialize imports it, and torch.compile with it
    "transformers.models.qwen3.modeling_qwen3",
    "tcopd_fast.trainer",
    "tcopd_fast.train",
    "forked",
]


started: list[ForkServerProcess] = []


def end_all() -> None:
    """Kill what a failed test has left running."""
    while started:
        process = started.pop()
        if process.is_alive():
            process.kill()
            process.join()


def context() -> ForkServerContext:
    """Its processes are children of a bystander that has imported PRELOAD, not of pytest."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


def start_forked(
    words: Sequence[str], log: Path, size: int = 1, folders: Sequence[Path] = (), **environment: str
) -> list[ForkServerProcess]:
    """`python -m tcopd_fast.train WORDS` on every rank, as far as its processes can tell; output goes to `log`.

    folders: working directory of each rank.
    """
    ranks: list[Mapping[str, str]] = [environment]
    if size > 1:
        meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    log.touch()
    processes = []
    for rank, variables in enumerate(ranks):
        folder = str(folders[rank]) if folders else None
        process = context().Process(target=_train, args=(list(words), str(log), variables, folder))
        process.start()
        processes.append(process)
    started.extend(processes)
    return processes


def run_forked(words: Sequence[str], log: Path, size: int = 1, status: int = 0, **options) -> str:
    """Run to the end; what was printed. Fails when a rank does not exit with `status`."""
    processes = start_forked(words, log, size, **options)
    for process in processes:
        process.join(300)
    text = log.read_text()
    assert [process.exitcode for process in processes] == [status] * size, text
    assert "Traceback" not in text, text
    return text


def _train(words: list[str], log: str, environment: Mapping[str, str], folder: str | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    import torch

    from tcopd_fast.train import main

    torch.set_num_threads(1)
    sys.exit(main(words))
