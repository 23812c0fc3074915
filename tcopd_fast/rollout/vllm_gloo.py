"""Weight transfer to vLLM servers over gloo, for machines without NCCL; registered with vLLM as backend `tcopd_gloo`.

vLLM has transfers over NCCL and CUDA IPC only. This one follows their protocol: the trainer's rank 0 and every vLLM
worker form a group; a round's parameters are announced in one request and broadcast in buckets of bounded size.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BACKEND = "tcopd_gloo"
# Engines and trainer are all there when they meet: one that does not come cannot reach the other.
MEETING_S = 120.0


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join: the rendezvous, its server's first rank, how the stream is cut, longest wait."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Every parameter of a round, in the order of the stream; dtypes are torch's names."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """world_size: rank 0 of the trainer and all workers. bucket_bytes: most bytes of one broadcast (a larger tensor
    goes alone). timeout_s: longest wait for another member."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


class GlooWorkerEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The end in a vLLM worker: weights are loaded in place, bucket by bucket."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None
    bucket_bytes = 0
    timeout_s = 0.0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.bucket_bytes, self.timeout_s = init_info.bucket_bytes, init_info.timeout_s
        self.group = join(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def finish_weight_update(self) -> None:
        """Nothing to finish: every bucket was loaded when it came."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Take part in the broadcasts of one round. Raises RuntimeError when a parameter received nothing."""
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        items = list(zip(update_info.names, dtypes, [tuple(s) for s in update_info.shapes], strict=True))
        loaded: set[str] = set()
        for bucket in buckets(items, self.bucket_bytes):
            flat = torch.empty(sum(nbytes(dtype, shape) for _, dtype, shape in bucket), dtype=torch.uint8)
            broadcast(self.group, flat, self.timeout_s)
            loaded |= self.model.load_weights(unpack(flat, bucket))  # type: ignore[operator]
        missing = {name for name, _ in self.model.named_parameters()} - loaded
        if missing:
            raise RuntimeError(f"weight transfer: no weights for {', '.join(sorted(missing))}")

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


class GlooTrainerEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The end in the trainer. Every rank iterates the source (ZeRO-3 gathers), rank 0 sends."""

    init_info_cls = GlooTrainerInitInfo
    group: Any = None
    bucket_bytes = 0
    timeout_s = 0.0

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainerEngine:
        """Meet the workers. Called on every rank; all but rank 0 return at once."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.bucket_bytes, engine.timeout_s = init_info.bucket_bytes, init_info.timeout_s
        if engine.is_sender:
            shared = {key: value for key, value in asdict(init_info).items() if key != "rank"}
            worker = GlooInitInfo(rank_offset=1, **shared)
            with ThreadPoolExecutor(1) as pool:
                # The servers answer when their workers have joined, which they do when this process has.
                joined = pool.submit(client.init_weight_transfer_engine, asdict(worker))
                engine.group = join(
                    init_info.master_address, init_info.master_port, 0, init_info.world_size, init_info.timeout_s
                )
                joined.result()
        return engine

    def send_weights(self) -> None:
        """One round: announce, broadcast, finish. Called on every rank."""
        assert self.source is not None
        items = [(meta.name, meta.dtype, tuple(meta.shape)) for meta in self.source.metadata()]
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        announced = GlooUpdateInfo(
            names=[name for name, _, _ in items],
            dtype_names=[str(dtype).removeprefix("torch.") for _, dtype, _ in items],
            shapes=[list(shape) for _, _, shape in items],
        )
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            received = pool.submit(self.client.update_weights, asdict(announced))
            self._broadcast(iter(self.source), items)
            received.result()
        finally:
            # After a failed broadcast the servers may never answer; waiting for them would turn an error into a hang.
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def _broadcast(self, weights: Iterator[tuple[str, Tensor]], items: Sequence[Item]) -> None:
        for bucket in buckets(items, self.bucket_bytes):
            flat = torch.empty(sum(nbytes(dtype, shape) for _, dtype, shape in bucket), dtype=torch.uint8)
            start = 0
            for name, dtype, shape in bucket:
                found, tensor = next(weights)
                if (found, tensor.dtype, tuple(tensor.shape)) != (name, dtype, shape):
                    raise RuntimeError(f"weight transfer: announced {name} {dtype} {shape}, the source gave {found}")
                stop = start + nbytes(dtype, shape)
                flat[start:stop] = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
                start = stop
            broadcast(self.group, flat, self.timeout_s)
        # Exhausted here, so that a source that gathers from all ranks ends on all of them.
        for name, _ in weights:
            raise RuntimeError(f"weight transfer: {name} was not announced")

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


Item = tuple[str, torch.dtype, tuple[int, ...]]


def buckets(items: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    """Consecutive parameters of at most `limit` bytes together; a larger one alone. Both ends cut alike."""
    bucket: list[Item] = []
    size = 0
    for item in items:
        own = nbytes(item[1], item[2])
        if bucket and size + own > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += own
    if bucket:
        yield bucket


def unpack(flat: Tensor, bucket: Sequence[Item]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter in a received bucket."""
    start = 0
    for name, dtype, shape in bucket:
        stop = start + nbytes(dtype, shape)
        # A copy: a slice may begin where its dtype may not.
        yield name, flat[start:stop].clone().view(dtype).view(shape)
        start = stop


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def join(address: str, port: int, rank: int, size: int, timeout_s: float) -> Any:
    """A gloo group of its own, apart from any default process group; rank 0 holds the store, on that address only.

    timeout_s: longest wait for another member, here and in a broadcast; here MEETING_S at most.
    """
    timeout = timedelta(seconds=min(timeout_s, MEETING_S))
    if rank == 0:
        # Left to itself the store would listen on every interface.
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
        store = dist.TCPStore(
            address, port, size, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        store = dist.TCPStore(address, port, size, False, timeout=timeout)
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, size, timeout)


def broadcast(group: Any, flat: Tensor, timeout_s: float) -> None:
    """`flat` of rank 0 into `flat` of every rank."""
    options = dist.BroadcastOptions()
    options.timeout = timedelta(seconds=timeout_s)
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([flat], options).wait()
