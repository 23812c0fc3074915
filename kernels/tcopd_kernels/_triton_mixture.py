"""Triton kernels of the full-vocabulary reverse KL to a signed mixture, without the logits of any model.

Student logits z and mixture y = Σ_j a_j z_j over the frozen models (reference included) exist tile by tile:

    L = Σ_v p_v d_v − lse(z) + Σ_j a_j lse(z_j),   d = z − y,   d̄ = Σ_v p_v d_v,   dL/dz_v = p_v (d_v − d̄)

A program of the forward holds one row block, walks the vocabulary tiles of one split and keeps per row the running
maximum m and sum s = Σ e^(z−m) of every model, and of the student also Σ e^(z−m)·(z−m) and the first two moments of
d − c, c = m − Σ_j a_j m_j, so that L = Σ p (d − c) − log s + Σ_j a_j log s_j. A second kernel merges the splits in
order. A kernel of the backward recomputes tiles of dL/dx, x the raw output of the student's head. Every logit enters
relative to its row's maximum: differences of numbers near 1e3 would lose digits.

Rows in which a_j = 0 may hold anything, NaN included. Deterministic: no atomics, every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_common import grouped_block, logits_tile

MAX_FROZEN = 4


@triton.jit
def model_logits(
    hidden, weight, bias, D, hidden_stride, weight_stride, softcap, row0, col0, N, V, inv_temperature,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tempered logits of one model, fp32 [BLOCK_M, BLOCK_N]; bias and softcap may be None."""
    return inv_temperature * logits_tile(
        hidden, weight, bias, row0, col0, N, V, D, hidden_stride, weight_stride, softcap,
        bias is not None, softcap is not None, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def pinned(x, PIN: tl.constexpr):
    """x, computed here. Otherwise LLVM defers a sum to its use and keeps every summand's tile in registers till then.

    PIN: "ptx" or "gcn", the assembler that is understood, or "" to leave it (the interpreter knows none).
    """
    if PIN == "ptx":
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    if PIN == "gcn":
        x = tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit(do_not_specialize=["N", "num_splits", "tiles_per_split"])
def mixture_forward_kernel(
    hidden, weight, bias, D, hidden_stride, weight_stride, softcap,
    m0_hidden, m0_weight, m0_bias, m0_D, m0_hidden_stride, m0_weight_stride, m0_softcap,
    m1_hidden, m1_weight, m1_bias, m1_D, m1_hidden_stride, m1_weight_stride, m1_softcap,
    m2_hidden, m2_weight, m2_bias, m2_D, m2_hidden_stride, m2_weight_stride, m2_softcap,
    m3_hidden, m3_weight, m3_bias, m3_D, m3_hidden_stride, m3_weight_stride, m3_softcap,
    coefficients, lse_floor, parts, bounds, N, V, num_splits, tiles_per_split, inv_temperature,
    J: tl.constexpr, HAS_BOUNDS: tl.constexpr, USE_TMA: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [5 + 2J, num_splits, N]: m, s, Σe(z−m), Σe(d−c), Σe(d−c)², then m_j and s_j. Grid: row blocks × splits.

    coefficients: [J, N].   bounds: [row blocks, V], of each column the largest exp(z − b) in a row block, with b the
    larger of lse_floor [N] and the log-sum-exp of this split so far.
    """
    hiddens, weights = (m0_hidden, m1_hidden, m2_hidden, m3_hidden), (m0_weight, m1_weight, m2_weight, m3_weight)
    biases, dims = (m0_bias, m1_bias, m2_bias, m3_bias), (m0_D, m1_D, m2_D, m3_D)
    hidden_strides = (m0_hidden_stride, m1_hidden_stride, m2_hidden_stride, m3_hidden_stride)
    weight_strides = (m0_weight_stride, m1_weight_stride, m2_weight_stride, m3_weight_stride)
    softcaps = (m0_softcap, m1_softcap, m2_softcap, m3_softcap)
    row_block, split = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ok = rows < N

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    s = tl.zeros([BLOCK_M], dtype=tl.float32)
    dot_z = tl.zeros([BLOCK_M], dtype=tl.float32)
    dot_d = tl.zeros([BLOCK_M], dtype=tl.float32)
    dot_dd = tl.zeros([BLOCK_M], dtype=tl.float32)
    frozen_m = (tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),) * J
    frozen_s = (tl.zeros([BLOCK_M], dtype=tl.float32),) * J
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, V)
    for col0 in range(first_col, end_col, BLOCK_N):
        started = col0 > first_col
        cols = col0 + tl.arange(0, BLOCK_N)
        col_ok = (cols < V)[None, :]
        y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        y_shift = tl.zeros([BLOCK_M], dtype=tl.float32)
        next_m = ()
        next_s = ()
        for j in tl.static_range(J):
            a = tl.load(coefficients + j * N.to(tl.int64) + rows, mask=row_ok, other=0.0)
            z_j = model_logits(
                hiddens[j], weights[j], biases[j], dims[j], hidden_strides[j], weight_strides[j], softcaps[j],
                row0, col0, N, V, inv_temperature, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            m_j = tl.maximum(frozen_m[j], tl.max(tl.where(col_ok, z_j, float("-inf")), axis=1))
            z_j = z_j - m_j[:, None]
            y = pinned(y + tl.where((a != 0)[:, None], a[:, None] * z_j, 0.0), PIN)
            e_sum = tl.sum(tl.where(col_ok, tl.exp(z_j), 0.0), axis=1)
            next_m = next_m + (m_j,)  # type: ignore[assignment]  # noqa: RUF005
            next_s = next_s + (tl.exp(frozen_m[j] - m_j) * frozen_s[j] + e_sum,)  # type: ignore[assignment]  # noqa: RUF005
            y_shift += tl.where((a != 0) & started, a * (frozen_m[j] - m_j), 0.0)
        frozen_m = next_m
        frozen_s = next_s

        z = model_logits(
            hidden, weight, bias, D, hidden_stride, weight_stride, softcap,
            row0, col0, N, V, inv_temperature, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(tl.where(col_ok, z, float("-inf")), axis=1))
        shift_z = tl.where(started, m - m_new, 0.0)
        shift_d = shift_z - y_shift
        alpha = tl.exp(m - m_new)
        # alpha first: it may be 0 where a shift is large
        s, dot_z, dot_d, dot_dd = alpha * s, alpha * dot_z, alpha * dot_d, alpha * dot_dd
        dot_dd += shift_d * (2.0 * dot_d + shift_d * s)
        dot_d += shift_d * s
        dot_z += shift_z * s
        z = z - m_new[:, None]
        d = z - y
        e = tl.where(col_ok, tl.exp(z), 0.0)
        s += tl.sum(e, axis=1)
        dot_z += tl.sum(e * z, axis=1)
        dot_d += tl.sum(e * d, axis=1)
        dot_dd += tl.sum(e * d * d, axis=1)
        if HAS_BOUNDS:
            # +inf for the rows that are not there keeps them out of the maximum.
            floor = tl.load(lse_floor + rows, mask=row_ok, other=float("inf"))
            above = tl.maximum(floor - m_new, tl.log(s))
            bound = tl.exp(tl.max(z - above[:, None], axis=0))
            tl.store(bounds + row_block.to(tl.int64) * V + cols, bound, mask=cols < V)
        m = m_new

    plane = num_splits.to(tl.int64) * N
    out = parts + split.to(tl.int64) * N + rows
    tl.store(out, m, mask=row_ok)
    tl.store(out + plane, s, mask=row_ok)
    tl.store(out + 2 * plane, dot_z, mask=row_ok)
    tl.store(out + 3 * plane, dot_d, mask=row_ok)
    tl.store(out + 4 * plane, dot_dd, mask=row_ok)
    for j in tl.static_range(J):
        tl.store(out + (5 + 2 * j) * plane, frozen_m[j], mask=row_ok)
        tl.store(out + (6 + 2 * j) * plane, frozen_s[j], mask=row_ok)


@triton.jit(do_not_specialize=["N", "num_splits"])
def mixture_combine_kernel(
    parts, coefficients, out, tops, N, num_splits, J: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Merges the splits of each row, in order. Grid: blocks of rows.

    tops: [1 + J, N], m of the student and every m_j.   out: [5, N], L, the entropy, log s, Σ p (d−c) and
    Σ p (d−c)² − (Σ p (d−c))².
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    stride = N.to(tl.int64)
    plane = num_splits.to(tl.int64) * N
    m = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for split in range(num_splits):
        m = tl.maximum(m, tl.load(parts + split * stride + rows, mask=row_ok, other=0.0))
    tl.store(tops + rows, m, mask=row_ok)
    frozen_m = ()
    log_mixture = tl.zeros([BLOCK], dtype=tl.float32)  # Σ_j a_j log s_j
    for j in tl.static_range(J):
        a = tl.load(coefficients + j * stride + rows, mask=row_ok, other=0.0)
        m_j = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        s_j = tl.zeros([BLOCK], dtype=tl.float32)
        for split in range(num_splits):
            part = parts + (5 + 2 * j) * plane + split * stride + rows
            m_split = tl.load(part, mask=row_ok, other=0.0)
            m_new = tl.maximum(m_j, m_split)
            s_split = tl.load(part + plane, mask=row_ok, other=1.0)
            s_j = tl.exp(m_j - m_new) * s_j + tl.exp(m_split - m_new) * s_split
            m_j = m_new
        tl.store(tops + (1 + j) * stride + rows, m_j, mask=row_ok)
        frozen_m = frozen_m + (m_j,)  # type: ignore[assignment]  # noqa: RUF005
        log_mixture += tl.where(a != 0, a * tl.log(s_j), 0.0)

    s = tl.zeros([BLOCK], dtype=tl.float32)
    dot_z = tl.zeros([BLOCK], dtype=tl.float32)
    dot_d = tl.zeros([BLOCK], dtype=tl.float32)
    dot_dd = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        part = parts + split * stride + rows
        shift_z = tl.load(part, mask=row_ok, other=0.0) - m
        shift_d = shift_z
        for j in tl.static_range(J):
            a = tl.load(coefficients + j * stride + rows, mask=row_ok, other=0.0)
            m_j = tl.load(part + (5 + 2 * j) * plane, mask=row_ok, other=0.0)
            shift_d -= tl.where(a != 0, a * (m_j - frozen_m[j]), 0.0)
        alpha = tl.exp(shift_z)
        s_split = alpha * tl.load(part + plane, mask=row_ok, other=1.0)
        d_split = alpha * tl.load(part + 3 * plane, mask=row_ok, other=0.0)
        dd_split = alpha * tl.load(part + 4 * plane, mask=row_ok, other=0.0)
        s += s_split
        dot_z += alpha * tl.load(part + 2 * plane, mask=row_ok, other=0.0) + shift_z * s_split
        dot_dd += dd_split + shift_d * (2.0 * d_split + shift_d * s_split)
        dot_d += d_split + shift_d * s_split
    log_s = tl.log(s)
    mean = dot_d / s
    variance = tl.maximum(dot_dd / s - mean * mean, 0.0)
    tl.store(out + rows, mean - log_s + log_mixture, mask=row_ok)
    tl.store(out + stride + rows, log_s - dot_z / s, mask=row_ok)
    tl.store(out + 2 * stride + rows, log_s, mask=row_ok)
    tl.store(out + 3 * stride + rows, mean, mask=row_ok)
    tl.store(out + 4 * stride + rows, variance, mask=row_ok)


@triton.jit(do_not_specialize=["N", "V", "chunk_start", "chunk_end"])
def mixture_dlogits_kernel(
    hidden, weight, bias, D, hidden_stride, weight_stride, softcap,
    m0_hidden, m0_weight, m0_bias, m0_D, m0_hidden_stride, m0_weight_stride, m0_softcap,
    m1_hidden, m1_weight, m1_bias, m1_D, m1_hidden_stride, m1_weight_stride, m1_softcap,
    m2_hidden, m2_weight, m2_bias, m2_D, m2_hidden_stride, m2_weight_stride, m2_softcap,
    m3_hidden, m3_weight, m3_bias, m3_D, m3_hidden_stride, m3_weight_stride, m3_softcap,
    coefficients, tops, log_sum, mean, upstream, dlogits, sum_parts,
    N, V, chunk_start, chunk_end, dlogits_stride, inv_temperature,
    J: tl.constexpr, ROW_SUMS: tl.constexpr, USE_TMA: tl.constexpr, PIN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of upstream·dL/dx for columns [chunk_start, chunk_end). Grid: row blocks × column blocks.

    tops, log_sum, mean: as mixture_combine_kernel gives them.
    sum_parts: [2, column blocks, N], of each row Σ p (d − d̄)² and Σ p over the columns of a block.
    """
    hiddens, weights = (m0_hidden, m1_hidden, m2_hidden, m3_hidden), (m0_weight, m1_weight, m2_weight, m3_weight)
    biases, dims = (m0_bias, m1_bias, m2_bias, m3_bias), (m0_D, m1_D, m2_D, m3_D)
    hidden_strides = (m0_hidden_stride, m1_hidden_stride, m2_hidden_stride, m3_hidden_stride)
    weight_strides = (m0_weight_stride, m1_weight_stride, m2_weight_stride, m3_weight_stride)
    softcaps = (m0_softcap, m1_softcap, m2_softcap, m3_softcap)
    col_blocks = tl.cdiv(chunk_end - chunk_start, BLOCK_N)
    row_block, col_block = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), col_blocks, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    col0 = chunk_start + col_block * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    col_ok = cols < chunk_end

    y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for j in tl.static_range(J):
        a = tl.load(coefficients + j * N.to(tl.int64) + rows, mask=row_ok, other=0.0)
        m_j = tl.load(tops + (1 + j) * N.to(tl.int64) + rows, mask=row_ok, other=0.0)
        z_j = model_logits(
            hiddens[j], weights[j], biases[j], dims[j], hidden_strides[j], weight_strides[j], softcaps[j],
            row0, col0, N, V, inv_temperature, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = pinned(y + tl.where((a != 0)[:, None], a[:, None] * (z_j - m_j[:, None]), 0.0), PIN)
    z = model_logits(
        hidden, weight, bias, D, hidden_stride, weight_stride, softcap,
        row0, col0, N, V, inv_temperature, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    above_top = z - tl.load(tops + rows, mask=row_ok, other=0.0)[:, None]
    row_log_sum = tl.load(log_sum + rows, mask=row_ok, other=0.0)
    row_mean = tl.load(mean + rows, mask=row_ok, other=0.0)
    p = tl.where(col_ok[None, :], tl.exp(above_top - row_log_sum[:, None]), 0.0)
    d = above_top - y - row_mean[:, None]
    dx = p * d
    if ROW_SUMS:
        part = sum_parts + col_block.to(tl.int64) * N + rows
        tl.store(part, tl.sum(dx * d, axis=1), mask=row_ok)
        tl.store(part + col_blocks.to(tl.int64) * N, tl.sum(p, axis=1), mask=row_ok)
    if softcap is not None:
        ratio = z / (inv_temperature * softcap)
        dx *= 1.0 - ratio * ratio
    row_upstream = tl.load(upstream + rows, mask=row_ok, other=0.0)
    dx *= (inv_temperature * row_upstream)[:, None]
    out = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + (cols - chunk_start)[None, :]
    tl.store(out, dx.to(dlogits.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])
