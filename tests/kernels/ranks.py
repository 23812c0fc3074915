"""Running a function on several gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_ranks(function: Callable[[], Any], size: int, folder: Path, **environment: str) -> list[Any]:
    """What function() returns on each of `size` ranks (anything torch.save takes), in new processes.

    The process group is the default one. `environment` is set before the function's module is imported.
    """
    names = (function.__module__, function.__qualname__)
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        torch.multiprocessing.spawn(_rank, (size, folder, *names), nprocs=size)
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, module: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    torch.save(getattr(__import__(module), name)(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo's that still releases a tensor while the interpreter ends aborts the process.
    os._exit(0)
