"""Triton forward of linear_logprob: log-probability, log-sum-exp and entropy without the [N, V] logits.

A program holds one row block and walks the vocabulary tiles of one split. It keeps, per row, the running
maximum m of the logits z, s = Σ e^(z−m) and, for the entropy, t = Σ e^(z−m)·(z−m). A second kernel merges
the splits, a third gives

    lse = m + log s        logprob = (z_y − m) − log s        entropy = log s − t / s

Sums relative to the maximum keep the logprob and the entropy exact where |z| is large. There are no atomics
and no locks: every output element is written by exactly one program.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ._triton_common import (
    Head,
    Tile,
    check_operands,
    compile_options,
    device_limits,
    grouped_block,
    input_precision,
    launch_options,
    logits_tile,
    loop_options,
    on_device,
    operands,
    pick_tile,
    rows_contiguous,
    tanh,
    tma_usable,
)
from ._triton_tiles import forward_tiles
from .types import Partials

BOUND_ROWS = 128  # rows that share a column bound: those of one tile
FLOOR_COLUMNS = 1024  # columns that the lower bound of lse is taken over: under 1% of a large vocabulary


@triton.jit
def rescale(m_old, m_new, s, t):
    """(reference, s, t) of sums taken relative to m_old, re-expressed relative to m_new >= m_old.

    The reference equals m_new, or 0 while every logit so far is -inf, which keeps -inf − -inf away.
    """
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    shift = tl.where(m_old == float("-inf"), 0.0, m_old - reference)
    alpha = tl.exp(m_old - reference)
    return reference, alpha * s, alpha * (t + s * shift)


@triton.jit(do_not_specialize=["N", "num_splits", "tiles_per_split"])
def forward_kernel(
    hidden, weight, bias, targets, split_max, split_sum, split_dot, target_logit, lse_floor, bounds,
    N, V, D, hidden_stride, weight_stride, num_splits, tiles_per_split, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Partial (m, s, t) of [num_splits, N], and the target logit [N]. Grid: row blocks × num_splits.

    bounds: [row blocks, V], of each column the largest exp(z − c) in a row block, where c is the larger of
    lse_floor [N] and the log-sum-exp of this split so far.
    """
    row_block, split = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)
    target = tl.where((target >= 0) & (target < V), target, -1)

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    s = tl.zeros([BLOCK_M], dtype=tl.float32)
    t = tl.zeros([BLOCK_M], dtype=tl.float32)
    z_target = tl.zeros([BLOCK_M], dtype=tl.float32)
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, V)
    for col0 in tl.range(first_col, end_col, BLOCK_N, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        z = inv_temperature * logits_tile(
            hidden, weight, bias, row0, col0, N, V, D, hidden_stride, weight_stride, softcap,
            HAS_BIAS, HAS_SOFTCAP, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        cols = col0 + tl.arange(0, BLOCK_N)
        z = tl.where((cols < V)[None, :], z, float("-inf"))
        z_target += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        reference, s, t = rescale(m, m_new, s, t)
        d = z - reference[:, None]
        e = tl.exp(d)
        s += tl.sum(e, axis=1)
        if HAS_ENTROPY:
            t += tl.sum(tl.where(e > 0, e * d, 0.0), axis=1)
        if HAS_BOUNDS:
            # +inf for the rows that are not there keeps them out of the maximum.
            floor = tl.load(lse_floor + rows, mask=row_ok, other=float("inf"))
            share = tl.minimum(tl.exp(reference - floor), 1.0 / tl.maximum(s, 1.0))
            bound = tl.max(e * share[:, None], axis=0)
            tl.store(bounds + row_block.to(tl.int64) * V + cols, bound, mask=cols < V)
        m = m_new

    out = split.to(tl.int64) * N + rows
    tl.store(split_max + out, m, mask=row_ok)
    tl.store(split_sum + out, s, mask=row_ok)
    if HAS_ENTROPY:
        tl.store(split_dot + out, t, mask=row_ok)
    # The first split also writes the 0 of a target that is not among these columns.
    lowest = tl.where(split == 0, -1, first_col)
    tl.store(target_logit + rows, z_target, mask=row_ok & (target >= lowest) & (target < end_col))


@triton.jit(do_not_specialize=["N"])
def target_logit_kernel(
    hidden, weight, bias, targets, lse_floor,
    N, V, D, hidden_stride, weight_stride, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Raises lse_floor [N] to the target's logit z_y, where the target is in [0, V)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=-1)
    here = row_ok & (target >= 0) & (target < V)
    h_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    w_rows = weight + target[:, None] * weight_stride
    z = tl.zeros([BLOCK_M], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        ok = here[:, None] & (ks < D)[None, :]
        h = tl.load(h_rows + ks[None, :], mask=ok, other=0.0).to(tl.float32)
        z += tl.sum(h * tl.load(w_rows + ks[None, :], mask=ok, other=0.0).to(tl.float32), axis=1)
    if HAS_BIAS:
        z += tl.load(bias + target, mask=here, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    floor = tl.load(lse_floor + rows, mask=here, other=0.0)
    tl.store(lse_floor + rows, tl.maximum(floor, inv_temperature * z), mask=here)


@triton.jit(do_not_specialize=["N", "num_splits"])
def combine_kernel(
    split_max, split_sum, split_dot, row_max, row_sum, row_dot, N, num_splits,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of each row, in order. Grid: blocks of rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    m = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    s = tl.zeros([BLOCK], dtype=tl.float32)
    t = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        offset = tl.cast(split, tl.int64) * N + rows
        m_split = tl.load(split_max + offset, mask=row_ok, other=0.0)
        s_split = tl.load(split_sum + offset, mask=row_ok, other=1.0)
        t_split = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_ENTROPY:
            t_split = tl.load(split_dot + offset, mask=row_ok, other=0.0)
        m_new = tl.maximum(m, m_split)
        _, s, t = rescale(m, m_new, s, t)
        _, s_split, t_split = rescale(m_split, m_new, s_split, t_split)
        m, s, t = m_new, s + s_split, t + t_split
    tl.store(row_max + rows, m, mask=row_ok)
    tl.store(row_sum + rows, s, mask=row_ok)
    if HAS_ENTROPY:
        tl.store(row_dot + rows, t, mask=row_ok)


@triton.jit(do_not_specialize=["N"])
def finish_kernel(
    row_max, row_sum, row_dot, target_logit, logprob, lse, entropy, N,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logprob, lse and entropy [N] from the statistics of the whole vocabulary. Grid: blocks of rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    m = tl.load(row_max + rows, mask=row_ok, other=0.0)
    s = tl.load(row_sum + rows, mask=row_ok, other=1.0)
    z_target = tl.load(target_logit + rows, mask=row_ok, other=0.0)
    log_s = tl.log(s)
    tl.store(logprob + rows, (z_target - m) - log_s, mask=row_ok)
    tl.store(lse + rows, m + log_s, mask=row_ok)
    if HAS_ENTROPY:
        t = tl.load(row_dot + rows, mask=row_ok, other=0.0)
        tl.store(entropy + rows, log_s - t / s, mask=row_ok)


def vocab_splits(row_blocks: int, vocab_tiles: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, tiles per split) that need the fewest tile steps when one program runs per multiprocessor.

    Among equals the larger number of splits wins: more splits side by side mean fewer row blocks side by
    side, whose part of `hidden` then stays in L2. No split is empty.
    """
    most = min(vocab_tiles, max(1, 8 * multiprocessors // row_blocks))
    best = (vocab_tiles * row_blocks + 1, 1, vocab_tiles)
    for wanted in range(1, most + 1):
        tiles = triton.cdiv(vocab_tiles, wanted)
        splits = triton.cdiv(vocab_tiles, tiles)
        steps = triton.cdiv(row_blocks * splits, multiprocessors) * tiles
        if steps <= best[0]:
            best = (steps, splits, tiles)
    return best[1], best[2]


def new_bounds(n_rows: int, weight: torch.Tensor) -> torch.Tensor:
    """Storage [⌈n_rows / BOUND_ROWS⌉, V] fp32 for the bounds that `partials` fills."""
    blocks = triton.cdiv(n_rows, BOUND_ROWS)
    return torch.empty(blocks, weight.shape[0], dtype=torch.float32, device=weight.device)


def partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    bounds: torch.Tensor | None = None,
) -> Partials:
    """Softmax statistics of each row's logits z, [N] fp32.

        z = softcap·tanh((hidden @ weight.T + bias) / softcap) / temperature     (no tanh if softcap is None)

    Args:
        hidden: [N, D] fp16, bf16 or fp32. weight: [V, D], same dtype. targets: [N] int64; one outside [0, V) has
            the target logit 0.
        bias: [V], any float dtype, or None. temperature and softcap: positive.
        entropy: whether to compute `dot`.
        bounds: from `new_bounds`, filled with an upper bound of the probability that each column has in any row of
            each block of BOUND_ROWS rows, exp(z_v − c) with c ≤ lse: the larger of some logits that are computed
            beforehand (so this holds up to rounding) and the log-sum-exp of the columns that the program has seen.

    Deterministic: equal inputs give equal bits on one GPU model as long as the tile stays the same (see
    `pick_tile`). Memory beside the outputs: at most 12 bytes per (row, vocabulary split), the bounds once more
    where the tile has fewer than BOUND_ROWS rows, and a copy of a matrix whose last dimension is not contiguous.
    """
    check_operands(hidden, weight)
    bias = None if bias is None else bias.contiguous()
    head = Head(rows_contiguous(hidden), rows_contiguous(weight), bias, temperature, softcap)
    targets = targets.contiguous()
    N = len(targets)
    stats = torch.empty(4 if entropy else 3, N, dtype=torch.float32, device=hidden.device)
    result = Partials(stats[0], stats[1], stats[3] if entropy else None, stats[2])
    if N > 0:
        with on_device(hidden):
            lse_floor = None if bounds is None else _lse_floor(head, targets)
            outputs = [stats] if bounds is None else [stats, bounds]
            launch = partial(_launch, head, targets, result, lse_floor, bounds)
            name = "forward" if bounds is None else "forward with bounds"
            tiles = partial(forward_tiles, bounds=bounds is not None)
            launch(pick_tile(name, head.hidden, head.weight, entropy, launch, tiles=tiles, outputs=outputs))
    return result


def _launch(
    head: Head,
    targets: torch.Tensor,
    result: Partials,
    lse_floor: torch.Tensor | None,
    bounds: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Fills `result` and, where they are given, the bounds."""
    hidden, weight, bias, temperature, softcap = head
    (N, D), V = hidden.shape, weight.shape[0]
    entropy = result.dot is not None
    use_tma = tma_usable(hidden, weight)
    row_blocks = triton.cdiv(N, tile.block_m)
    splits, tiles_per_split = vocab_splits(row_blocks, triton.cdiv(V, tile.block_n), device_limits(hidden.device)[1])
    parts = torch.empty(3 if entropy else 2, splits, N, dtype=torch.float32, device=hidden.device)
    split_dot = parts[2] if entropy else None
    hidden_arg, weight_arg = operands(hidden, weight, tile, use_tma)
    tile_bounds = bounds
    if bounds is not None and len(bounds) < row_blocks:
        tile_bounds = torch.empty(row_blocks, V, dtype=torch.float32, device=hidden.device)
    forward_kernel[(row_blocks * splits,)](
        hidden_arg, weight_arg, bias, targets, parts[0], parts[1], split_dot, result.target_logit,
        lse_floor, tile_bounds,
        N, V, D, hidden.stride(0), weight.stride(0), splits, tiles_per_split,
        1.0 / temperature, 1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=entropy,
        HAS_BOUNDS=bounds is not None, USE_TMA=use_tma, PRECISION=input_precision(),
        **launch_options(tile), **loop_options(tile),
    )  # fmt: skip
    if bounds is not None and tile_bounds is not None and tile_bounds is not bounds:
        for block, of_tiles in enumerate(tile_bounds.split(BOUND_ROWS // tile.block_m)):
            torch.amax(of_tiles, 0, out=bounds[block])
    combine_kernel[(triton.cdiv(N, 128),)](
        parts[0], parts[1], split_dot, result.max, result.sum, result.dot, N, splits,
        HAS_ENTROPY=entropy, BLOCK=128, **compile_options(4, 1),
    )  # fmt: skip


def _lse_floor(head: Head, targets: torch.Tensor) -> torch.Tensor:
    """[N] lower bounds of lse: the largest logit of the row's own target and of FLOOR_COLUMNS other rows' targets.

    A row whose own target is improbable would else have bounds far above its probabilities, until the columns that
    hold its mass have been seen.
    """
    hidden, weight, bias, temperature, softcap = head
    (N, D), V = hidden.shape, weight.shape[0]
    K = min(N, FLOOR_COLUMNS)
    sample = targets[torch.arange(K, device=targets.device) * N // K].clamp(0, V - 1)
    few = Head(hidden, weight[sample], None if bias is None else bias[sample], temperature, softcap)
    stats = torch.empty(3, N, dtype=torch.float32, device=hidden.device)
    result = Partials(stats[0], stats[1], None, stats[2])
    launch = partial(_launch, few, targets, result, None, None)
    # One choice for all numbers of rows up to the next power of two, as everywhere.
    launch(pick_tile("floor", hidden, few.weight, False, launch, vocab=FLOOR_COLUMNS))
    floor = result.max
    target_logit_kernel[(triton.cdiv(N, 4),)](
        hidden, weight, bias, targets, floor, N, V, D, hidden.stride(0), weight.stride(0),
        1.0 / temperature, 1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, BLOCK_M=4, BLOCK_K=512, **compile_options(4, 1),
    )  # fmt: skip
    return floor


def finish(partials: Partials) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """logprob, lse and, if `partials.dot` is there, entropy of the whole vocabulary: [N] fp32, nats."""
    stats = [None if x is None else x.contiguous() for x in (partials.max, partials.sum, partials.dot)]
    N = len(partials.max)
    logprob, lse = torch.empty(2, N, dtype=torch.float32, device=partials.max.device)
    entropy = None if partials.dot is None else torch.empty_like(lse)
    if N > 0:
        with on_device(lse):
            finish_kernel[(triton.cdiv(N, 128),)](
                *stats, partials.target_logit.contiguous(), logprob, lse, entropy, N,
                HAS_ENTROPY=entropy is not None, BLOCK=128, **compile_options(4, 1),
            )  # fmt: skip
    return logprob, lse, entropy


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    bounds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """log softmax(z)[y], log-sum-exp(z) and, on request, the entropy of softmax(z); arguments as in `partials`."""
    return finish(
        partials(
            hidden, weight, targets,
            bias=bias, temperature=temperature, softcap=softcap, entropy=entropy, bounds=bounds,
        )
    )  # fmt: skip
