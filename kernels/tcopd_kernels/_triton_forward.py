"""Triton forward of linear_logprob: log-probability, log-sum-exp and entropy without the [N, V] logits.

A program holds one row block and walks the vocabulary tiles of one split. It keeps, per row, the running
maximum m of the logits z, s = Σ e^(z−m) and, for the entropy, t = Σ e^(z−m)·(z−m). A second kernel merges
the splits:

    lse = m + log s        logprob = (z_y − m) − log s        entropy = log s − t / s

Sums relative to the maximum keep the logprob and the entropy exact where |z| is large. There are no atomics
and no locks: every output element is written by exactly one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._triton_common import (
    Tile,
    check_operands,
    compile_options,
    device_limits,
    grouped_block,
    input_precision,
    launch_options,
    logits_tile,
    on_device,
    operands,
    pick_tile,
    rows_contiguous,
    tma_usable,
)


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
    hidden, weight, bias, targets, split_max, split_sum, split_dot, target_logit,
    N, V, D, hidden_stride, weight_stride, num_splits, tiles_per_split, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial (m, s, t) of [num_splits, N], and the target logit [N]. Grid: row blocks × num_splits."""
    row_block, split = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    s = tl.zeros([BLOCK_M], dtype=tl.float32)
    t = tl.zeros([BLOCK_M], dtype=tl.float32)
    z_target = tl.zeros([BLOCK_M], dtype=tl.float32)
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, V)
    for col0 in range(first_col, end_col, BLOCK_N):
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
        m = m_new

    out = split.to(tl.int64) * N + rows
    tl.store(split_max + out, m, mask=row_ok)
    tl.store(split_sum + out, s, mask=row_ok)
    if HAS_ENTROPY:
        tl.store(split_dot + out, t, mask=row_ok)
    tl.store(target_logit + rows, z_target, mask=row_ok & (target >= first_col) & (target < end_col))


@triton.jit(do_not_specialize=["N", "num_splits"])
def combine_kernel(
    split_max, split_sum, split_dot, target_logit, logprob, lse, entropy, N, num_splits,
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
    log_s = tl.log(s)
    z_target = tl.load(target_logit + rows, mask=row_ok, other=0.0)
    tl.store(logprob + rows, (z_target - m) - log_s, mask=row_ok)
    tl.store(lse + rows, m + log_s, mask=row_ok)
    if HAS_ENTROPY:
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


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """log softmax(z)[y], log-sum-exp(z) and, on request, the entropy of softmax(z).

        z = softcap·tanh((hidden @ weight.T + bias) / softcap) / temperature     (no tanh if softcap is None)

    Args:
        hidden: [N, D] fp16, bf16 or fp32. weight: [V, D], same dtype. targets: [N] int64 in [0, V).
        bias: [V], any float dtype, or None. temperature and softcap: positive.
        entropy: whether to compute the entropy.

    Returns:
        logprob [N], lse [N], entropy [N] or None; fp32, nats. Deterministic: equal inputs give equal bits on
        one GPU model as long as the tile stays the same (see `pick_tile`).

    Memory beside the outputs: at most 12 bytes per (row, vocabulary split), plus a copy of a matrix whose
    last dimension is not contiguous.
    """
    check_operands(hidden, weight)
    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    bias = None if bias is None else bias.contiguous()
    targets = targets.contiguous()
    (N, D), V = hidden.shape, weight.shape[0]
    logprob, lse, target_logit = torch.empty(3, N, dtype=torch.float32, device=hidden.device)
    row_entropy = torch.empty_like(lse) if entropy else None
    if N == 0:
        return logprob, lse, row_entropy

    use_tma = tma_usable(hidden, weight)

    def launch(tile: Tile) -> None:
        row_blocks = triton.cdiv(N, tile.block_m)
        splits, tiles_per_split = vocab_splits(
            row_blocks, triton.cdiv(V, tile.block_n), device_limits(hidden.device)[1]
        )
        parts = torch.empty(3 if entropy else 2, splits, N, dtype=torch.float32, device=hidden.device)
        split_dot = parts[2] if entropy else None
        hidden_arg, weight_arg = operands(hidden, weight, tile, use_tma)
        forward_kernel[(row_blocks * splits,)](
            hidden_arg, weight_arg, bias, targets, parts[0], parts[1], split_dot, target_logit,
            N, V, D, hidden.stride(0), weight.stride(0), splits, tiles_per_split,
            1.0 / temperature, 1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=entropy,
            USE_TMA=use_tma, PRECISION=input_precision(), **launch_options(tile),
        )  # fmt: skip
        combine_kernel[(triton.cdiv(N, 128),)](
            parts[0], parts[1], split_dot, target_logit, logprob, lse, row_entropy, N, splits,
            HAS_ENTROPY=entropy, BLOCK=128, **compile_options(4, 1),
        )  # fmt: skip

    with on_device(hidden):
        launch(pick_tile("forward", hidden, weight, entropy, launch))
    return logprob, lse, row_entropy
