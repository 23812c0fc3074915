"""The process group, as much of it as the trainer needs."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tcopd_fast.errors import PeerError, UserError

T = TypeVar("T")
TIMEOUT_S = 1800.0
ROLL_CALL_S = 10.0
# gloo's threads release the tensors of a collective after it has returned, and need Python's lock for it. One that asks
# for the lock while the interpreter ends aborts the process.
RELEASE_S = 0.1
# The store lives in rank 0's process, which stays this long after an error for the others to see the same.
LINGER_S = 1.0


class LostRankError(UserError):
    """A collective failed or timed out because a rank is gone."""


@dataclass(frozen=True)
class World:
    """This process among the others. device is where models and batches live.

    group: what the methods talk over, None for the default group. store: the ranks' rendezvous, on rank 0.
    roll_call_s: how long a rank may take to say that it is there.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None
    store: Any = None
    roll_call_s: float = ROLL_CALL_S

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0

    @property
    def ranks_here(self) -> int:
        """Processes of this run on this machine, as torchrun or the deepspeed launcher says."""
        if self.size == 1:
            return 1
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))

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
        dist.all_gather_object(out, value, group=self.group)
        return out

    def gather_to_main(self, value: T) -> list[T] | None:
        """The object of every rank, in rank order, on the main process; None elsewhere."""
        if self.size == 1:
            return [value]
        out: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, out, group=self.group)
        return out

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, on every rank. A collective.

        Raises its UserError on the main process and PeerError on the others.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        refusal = None
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                refusal, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise refusal or PeerError(outcome[1])
        return outcome[0]

    def together(self, work: Callable[[], T]) -> T:
        """What `work`, which holds no collective, returns on this rank. A collective.

        When it raises UserError on some rank, all ranks raise: each message is the UserError of the first rank that met
        it, and PeerError on the others.
        """
        mine: UserError | None = None
        try:
            out = work()
        except UserError as error:
            mine = error
        messages = self.gather(None if mine is None else str(mine))
        if mine is not None:
            raise mine if messages.index(str(mine)) == self.rank else PeerError(str(mine)) from mine
        for message in messages:
            if message is not None:
                raise PeerError(message)
        return out

    def agreed(self, message: str) -> UserError:
        """An error that every rank meets alike, to be raised on all of them: the main process alone reports it."""
        return UserError(message) if self.is_main else PeerError(message)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def leave(self) -> None:
        """End the process group when every rank has come this far. A collective, the last one of a process."""
        import deepspeed

        self.barrier()
        time.sleep(RELEASE_S)
        # DeepSpeed's own, which also drops the groups that it has made.
        deepspeed.comm.destroy_process_group()

    @contextmanager
    def watching_ranks(self) -> Iterator[None]:
        """Turns the failure of a collective inside the block into a LostRankError that names the missing ranks.

        Every rank that meets such a failure answers a roll call over the rendezvous store; one that does not answer in
        time is gone or hangs. Other errors, and one that no missing rank explains, are raised as they are, but a
        UserError that another rank has met already as a PeerError.
        """
        try:
            yield
        except PeerError:
            raise
        except UserError as error:
            raise self._said_once(error, str(error)) from error
        except RuntimeError as error:
            missing = _roll_call(self, "lost", self.roll_call_s) if _is_of_a_collective(error) else []
            if not missing:
                raise
            lost = LostRankError(
                f"{_ranks(missing)} of {self.size} ended or hung and the others cannot go on without; read the output "
                f"of the missing rank first, then continue with --resume ({str(error).strip().splitlines()[0]})"
            )
            # What the collective says of it differs from rank to rank.
            raise self._said_once(lost, f"lost {_ranks(missing)}") from error

    def _said_once(self, error: UserError, about: str) -> UserError:
        """The error itself on the first rank that meets it, PeerError on others; itself where that cannot be known.

        about: what is the same on all ranks that meet it.
        """
        if self.size == 1:
            return error
        try:
            first = self.store.add(f"tcopd/error/{sha256(about.encode()).hexdigest()}", 1) == 1
        except RuntimeError:
            return error  # the store went with rank 0
        if self.is_main:
            time.sleep(LINGER_S)
        return error if first else PeerError(str(error))

    def _reduce(self, values: dict[str, float], operation: Any) -> dict[str, float]:
        if self.size == 1 or not values:
            return dict(values)
        keys = sorted(values)
        tensor = torch.tensor([values[k] for k in keys], dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self.group)
        return dict(zip(keys, tensor.tolist(), strict=True))


def init_world(timeout_s: float = TIMEOUT_S) -> World:
    """Join (or make) the process group: nccl on CUDA, gloo elsewhere.

    Started by a launcher it reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without one it is
    a group of one process. A group of one opens no port. timeout_s: longest wait for another rank, here and in every
    collective. Raises LostRankError naming the ranks that did not come.
    """
    use_cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_cuda else "cpu")
    import deepspeed

    # DeepSpeed calls by their old names what torch 2.13 has renamed, on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not use_cuda:
        # Its shared-memory all-reduce is compiled on first use; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        port = str(free_port())
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=timeout_s)
    store = None
    if not dist.is_initialized():
        store = _meet(rank, size, timeout)
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
        deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", timeout=timeout, verbose=False)
    # gloo's failures raise errors; nccl's end the process.
    group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda and size > 1 else None
    return World(dist.get_rank(), dist.get_world_size(), device, group, store, min(ROLL_CALL_S, timeout_s))


def _meet(rank: int, size: int, timeout: timedelta) -> Any:
    """The rendezvous store, once every rank has come to it."""
    if size == 1:
        # torch's rendezvous store listens on every interface; one process needs none.
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun holds the store itself.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, size, is_host, timeout, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LostRankError(
            f"rank {rank} does not reach the first machine at {address}:{port}; start rank 0, or check MASTER_ADDR, "
            "MASTER_PORT and the firewall between the machines"
        ) from error
    missing = _roll_call(World(rank, size, torch.device("cpu"), store=store), "start", timeout.total_seconds())
    if missing:
        raise LostRankError(
            f"{_ranks(missing)} of {size} did not start within {timeout.total_seconds():g} s; read the output of those "
            "processes, or check that every machine got the same number of ranks and the same MASTER_ADDR"
        )
    return store


def _is_of_a_collective(error: RuntimeError) -> bool:
    # gloo's errors are plain RuntimeErrors.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "caused pair closure" in str(error)


def _roll_call(world: World, name: str, wait_s: float) -> list[int]:
    """Ranks that have not answered call `name` within `wait_s` seconds."""
    try:
        world.store.set(f"tcopd/{name}/{world.rank}", "here")
        missing = set(range(world.size))
        deadline = time.monotonic() + wait_s
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not world.store.check([f"tcopd/{name}/{rank}"])}
            if missing:
                time.sleep(0.1)
    except RuntimeError:
        return [0]  # the store lives in rank 0's process
    if world.is_main and missing:
        time.sleep(LINGER_S)
    return sorted(missing)


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that was free at this machine's `address` a moment ago. Raises OSError when it has no such address."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return probe.getsockname()[1]
