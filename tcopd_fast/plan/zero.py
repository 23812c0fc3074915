"""What DeepSpeed 0.19 holds for the learner with this project's settings, by ZeRO stage.

Read from its sources (`bf16_optimizer.py`, `stage_1_and_2.py`, `stage3.py`) with `managed_gradient_accumulation`
off, float32 gradient accumulation and communication, and its default buckets; checked against measured runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    or backward. backward: buffers there while gradients arrive. reduce: at the end of a backward or of a step, while
    the gradients of all ranks are summed. update: during the optimizer's step. sync: while weights are copied out.
    """

    held: Mapping[str, int]
    accumulated: int = 0
    per_gradient: int = 0
    gathered: int = 0
    backward: int = 0
    reduce: int = 0
    update: int = 0
    sync: int = 0


def zero_bytes(shape: Shape, stage: int, itemsize: int, ranks: int, *, accumulating: bool, on_cpu: bool) -> ZeroBytes:
    """accumulating: several micro-batches per optimizer step.

    on_cpu: of a bucket only what was written to counts, and AdamW has two temporaries per weight, not one.
    """
    share = -(-shape.weights // ranks)
    # torch.optim.AdamW: √v, and on a CPU √v divided by its bias correction beside it.
    update = (8 if on_cpu else 4) * share
    held = {"weights": shape.weights * itemsize, "float32 weights": 4 * share, "Adam moments": 8 * share}
    fill = min(BUCKET, shape.weights)
    bucket = fill if on_cpu else BUCKET
    if stage == 1 and itemsize < 4:
        # BF16_Optimizer: float32 gradients of all weights, summed over the ranks bucket by bucket.
        held["gradients"] = 4 * shape.weights
        return ZeroBytes(held, reduce=4 * fill, update=update)
    if stage == 1:
        # Gradients stay whole; step() moves them into a bucket and sums a flat copy of it.
        return ZeroBytes(
            held,
            accumulated=4 * shape.weights if accumulating else 0,
            per_gradient=0 if accumulating else 4,
            backward=0 if on_cpu else 4 * bucket,
            reduce=4 * shape.weights + 4 * fill + (0 if on_cpu else 4 * bucket),
            update=4 * share + update,
        )
    if stage == 2:
        # Two buckets in the weights' dtype, which overlap_comm fills in turn; each is flattened, and widened to the
        # float32 that it is summed in. What is summed is kept in float32 from the first sum on.
        buffers = bucket * itemsize if on_cpu else 2 * bucket * itemsize
        widened = 4 * fill + 4 * share if itemsize < 4 else 4 * share if accumulating else 0
        return ZeroBytes(
            held,
            accumulated=4 * share if accumulating else 0,
            per_gradient=itemsize if on_cpu else 0,
            backward=0 if on_cpu else buffers,
            reduce=buffers + fill * itemsize + widened,
            update=4 * share + update,
        )
    persistent = sum(n for n in shape.tensors if n <= PERSISTENT) if ranks > 1 else 0
    held["weights"] = (share + persistent) * itemsize
    return ZeroBytes(
        held | {"gradients": 4 * share, "reduction bucket": 4 * bucket},
        gathered=min(shape.weights, LIVE + PREFETCH) * itemsize if ranks > 1 else 0,
        # The input of the reduce-scatter, flattened, and its output.
        reduce=4 * fill + 4 * -(-fill // ranks),
        update=4 * share + update,
        # A parameter, and the buffer it was gathered in.
        sync=2 * shape.largest * itemsize,
    )


def sharded_bytes(shape: Shape, itemsize: int, ranks: int) -> tuple[int, int]:
    """(held, gathered) of a frozen model of placement `sharded`."""
    held = -(-shape.weights // ranks) * itemsize
    # The last term: the buffer that the largest parameter is gathered in, beside the parameter.
    live = min(shape.weights, max(INFERENCE_LIVE, shape.largest) + PREFETCH) + shape.largest
    return held, live * itemsize if ranks > 1 else 0
