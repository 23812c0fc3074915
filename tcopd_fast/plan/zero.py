"""What DeepSpeed 0.19 holds for the learner with this project's settings, by ZeRO stage.

Read from its sources (`bf16_optimizer.py`, `stage_1_and_2.py`, `stage3.py`) with `managed_gradient_accumulation`
off, float32 gradient accumulation and communication, and its default buckets; checked against measured runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tcopd_fast.plan.shapes import Shape

BUCKET = 500_000_000  # reduce_bucket_size
LIVE = 1_000_000_000  # stage3_max_live_parameters
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
PERSISTENT = 100_000  # stage3_param_persistence_threshold
INFERENCE_LIVE = 50_000_000  # stage3_max_live_parameters of `tcopd_fast.scoring.sharded`


@dataclass(frozen=True)
class ZeroBytes:
    """Bytes of one rank.

    held: always there. accumulated: gradients kept between the micro-batches of a step. per_gradient: bytes per
    element that a finished gradient leaves behind during the first of them. gathered: weights gathered for a forward
    or backward. arriving: the buffer in which the last of them come for a forward. backward: buffers there while
    gradients arrive. reduce: at the end of a backward or of a step, while the gradients of all ranks are summed.
    update: during the optimizer's step. sync: while weights are copied out. host: pinned in host memory.
    """

    held: Mapping[str, int]
    accumulated: int = 0
    per_gradient: int = 0
    gathered: int = 0
    arriving: int = 0
    backward: int = 0
    reduce: int = 0
    update: int = 0
    sync: int = 0
    host: Mapping[str, int] = field(default_factory=dict)


def zero_bytes(
    shape: Shape, stage: int, itemsize: int, ranks: int, *, accumulating: bool, on_cpu: bool, offload: str = "none"
) -> ZeroBytes:
    """accumulating: several micro-batches per optimizer step. offload: `learner.offload`.

    on_cpu: host memory is the rank's own, of a bucket only what was written to counts, and AdamW has two temporaries
    per weight, not one.
    """
    parameters, trained = shape.weights + sum(shape.adapter), shape.trained
    share = -(-trained // ranks)
    # torch.optim.AdamW: √v, and on a CPU √v divided by its bias correction beside it.
    update = (8 if on_cpu else 4) * share
    held = {"weights": parameters * itemsize, "float32 weights": 4 * share, "Adam moments": 8 * share}
    fill = min(BUCKET, trained)
    # An adapter's bucket is as large as the adapter.
    bucket = fill if on_cpu or shape.adapter else BUCKET
    # The largest sum of a weight and its factors, in float32 and rounded; embedding and head have none.
    merged = max((n for n in shape.tensors if n not in (shape.embedding, shape.head)), default=0)
    merging = merged * (4 + (4 + itemsize if itemsize < 4 else 0)) if shape.adapter else 0
    if stage == 1 and itemsize < 4 and offload == "none":
        # BF16_Optimizer: float32 gradients of all weights, summed over the ranks bucket by bucket.
        held["gradients"] = 4 * trained
        found = ZeroBytes(held, reduce=4 * fill, update=update, sync=merging)
    elif stage == 1:
        # Gradients stay whole; step() moves them into a bucket and sums a flat copy of it.
        found = ZeroBytes(
            held,
            accumulated=4 * trained if accumulating else 0,
            per_gradient=0 if accumulating else 4,
            backward=0 if on_cpu else 4 * bucket,
            # bfloat16 comes here with an offloaded optimizer, and is put together in float32 before it leaves.
            reduce=4 * trained + 4 * fill + (0 if on_cpu else 4 * bucket) + (4 * share if itemsize < 4 else 0),
            update=4 * share + update,
            sync=merging,
        )
    elif stage == 2:
        # Two buckets in the weights' dtype, which overlap_comm fills in turn; each is flattened, and widened to the
        # float32 that it is summed in. What is summed is kept in float32 from the first sum on.
        buffers = bucket * itemsize if on_cpu else 2 * bucket * itemsize
        widened = 4 * fill + 4 * share if itemsize < 4 else 4 * share if accumulating else 0
        found = ZeroBytes(
            held,
            accumulated=4 * share if accumulating else 0,
            per_gradient=itemsize if on_cpu else 0,
            backward=0 if on_cpu else buffers,
            reduce=buffers + fill * itemsize + widened,
            update=4 * share + update,
            sync=merging,
        )
    else:
        persistent = sum(n for n in (*shape.tensors, *shape.adapter) if n <= PERSISTENT) if ranks > 1 else 0
        held["weights"] = (-(-parameters // ranks) + persistent) * itemsize
        found = ZeroBytes(
            held | {"gradients": 4 * share, "reduction bucket": 4 * bucket},
            gathered=min(parameters, LIVE + PREFETCH) * itemsize if ranks > 1 else 0,
            # Held until the last parameter in it is used; the embedding comes by itself.
            arriving=min(parameters - shape.embedding, PREFETCH) * itemsize if ranks > 1 else 0,
            # The input of the reduce-scatter, flattened, and its output.
            reduce=4 * fill + 4 * -(-fill // ranks),
            update=4 * share + update,
            # A parameter, and the buffer it was gathered in.
            sync=2 * shape.largest * itemsize + merging,
        )
    if offload == "none":
        return found
    apart = _offloaded(found, shape, itemsize, stage, offload, ranks)
    if not on_cpu:
        return apart
    return replace(apart, held={**apart.held, **{f"{name} (host)": n for name, n in apart.host.items()}}, host={})


def _offloaded(found: ZeroBytes, shape: Shape, itemsize: int, stage: int, offload: str, ranks: int) -> ZeroBytes:
    """What moves to host memory: the optimizer with its gradients, and with optimizer_and_weights ZeRO-3's shards.

    The update runs there in one fused pass, without temporaries.
    """
    away = {"float32 weights", "Adam moments"} | ({"gradients"} if stage == 3 else set())
    away |= {"weights"} if offload == "optimizer_and_weights" else set()
    host = {name: found.held[name] for name in found.held if name in away}
    held = {name: size for name, size in found.held.items() if name not in away}
    share = -(-shape.trained // ranks)
    if stage == 3:
        # Summed over micro-batches, and once more for the update.
        return replace(found, held=held, host=host | {"gradients": 8 * share}, update=0)
    # Float32 gradients of this rank's share; on the way back its weights pass through a buffer.
    host |= {"gradients": 4 * share, "updated weights": itemsize * share}
    # A gradient crosses through a buffer on either side.
    staging = itemsize * max(shape.adapter or shape.tensors)
    held, host = held | {"staging": staging}, host | {"staging": staging}
    if stage == 1 or itemsize < 4:
        return replace(found, held=held, host=host, update=0)
    # Summed over micro-batches in host memory, not on the device.
    host["gradients of micro-batches"] = 4 * share
    return replace(found, held=held, host=host, accumulated=0, reduce=found.reduce - found.accumulated, update=0)


def sharded_bytes(shape: Shape, itemsize: int, ranks: int) -> tuple[int, int]:
    """(held, gathered) of a frozen model of placement `sharded`."""
    held = -(-shape.weights // ranks) * itemsize
    # The last term: the buffer that the largest parameter is gathered in, beside the parameter.
    live = min(shape.weights, max(INFERENCE_LIVE, shape.largest) + PREFETCH) + shape.largest
    return held, live * itemsize if ranks > 1 else 0
