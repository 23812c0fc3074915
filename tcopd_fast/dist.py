"""The process group, as much of it as the trainer needs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among the others. device is where models and batches live."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0

    @property
    def ranks_here(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sum of every value over the ranks; keys must agree."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: dict[str, float]) -> dict[str, float]:
        """Maximum of every value over the ranks; keys must agree."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """The object of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def gather_to_main(self, value: T) -> list[T] | None:
        """The object of every rank, in rank order, on the main process; None elsewhere."""
        if self.size == 1:
            return [value]
        out: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, out)
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def _reduce(self, values: dict[str, float], operation: Any) -> dict[str, float]:
        if self.size == 1 or not values:
            return dict(values)
        keys = sorted(values)
        tensor = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return dict(zip(keys, tensor.tolist(), strict=True))


def init_world() -> World:
    """Join (or make) the process group: nccl on CUDA, gloo elsewhere.

    Started by a launcher it reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without one it is
    a group of one process. A group of one opens no port.
    """
    use_cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_cuda else "cpu")
    import deepspeed

    if not use_cuda:
        # Its shared-memory all-reduce is compiled on first use; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            port = str(free_port())
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if os.environ["WORLD_SIZE"] == "1":
            # torch's rendezvous store listens on every interface; one process needs none.
            dist.init_process_group("nccl" if use_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if use_cuda:
            torch.cuda.set_device(local)
        deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", timeout=TIMEOUT, verbose=False)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def free_port() -> int:
    """A TCP port that was free on the loopback interface a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
