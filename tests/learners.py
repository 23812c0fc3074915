"""Pieces of work on real learners, in processes of their own (DeepSpeed and torch.distributed are process-wide)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from forked import context
from running import write_config

from tcopd_fast.dist import free_port


def on_learner(
    work: Callable[..., Any], tree: dict[str, Any], folder: Path, size: int = 1, **environment: str
) -> list[Any]:
    """What `work(learner, world, config, inputs)` returns on every rank, for a learner of this configuration tree."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder / "config.yaml", tree)
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(size):
        variables = {**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context().Process(target=_rank, args=(work, config, folder, variables))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(200)
    for process in processes:
        if process.is_alive():
            process.kill()
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.log")))
    assert [process.exitcode for process in processes] == [0] * size, logs
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(work: Callable[..., Any], config_file: Path, folder: Path, variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    rank = variables["RANK"]
    output = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    from tcopd_fast.config_io import load_config
    from tcopd_fast.dist import init_world
    from tcopd_fast.inputs import read_inputs
    from tcopd_fast.learner import Learner

    config = load_config(str(config_file), [])
    world = init_world()
    inputs = read_inputs(config, world.size)
    torch.manual_seed(config.seed)
    learner = Learner(config, inputs.models, world)
    torch.save(work(learner, world, config, inputs), folder / f"rank{rank}.pt")
    world.leave()
