"""Triton single pass of a loss: the head's GEMM runs once, its probabilities are kept for the gradients.

Rows are walked in chunks. For each chunk of n rows

1. `keep_kernel` computes the logits tile by tile like the forward, and keeps e = exp(z − m) of every tile, m being
   the row's maximum within the tile, as [n, V] in the input dtype, with m as [tiles, n] in fp32;
2. the token loss gives the upstream gradient g [n] of the logprobs, and the rows where it is 0 leave;
3. `dlogits_kernel` turns e into the gradient of the raw logits, in place:

       dx_v = −g·e_v·exp(m − max − log Σ)·slope_v/T      dx_y = −g·expm1(logprob)·slope_y/T

   with slope = 1 − tanh²(x/softcap), or 1: the target's own probability is the fp32 one of the forward;
4. two matrix products give dH of these rows, and their share of dW.

Rounding. e is rounded to the input dtype and so is dx: two roundings of half a unit in the last place each, where
one that materialises the logits in that dtype has an error of |z| half units in z, hence in p, besides its own
rounding of dx. Both of ours are relative to the element (e of fp16 is kept times 2^15, so that it loses precision
only below 2^-29 of the largest in its tile), and neither occurs at the target, where 1 − p would cancel.

Cost for N rows, of 2·N·V·D FLOP per GEMM ("G"), b bytes per element and C chunks:

    this form          3 G    5·b·N·V + 8·C·V·D bytes   (e written; read, dx written; dx read by two GEMMs; dW in fp32)
    recomputing        4 G    3·b·N·V +   b·V·D bytes   (dx written; read by two GEMMs)
    plain torch, 3 G   3 G  about 40·N·V + 16·C'·V·D bytes, C' = 2C for b = 2   (each operation walks fp32 tiles)

At N=8192, V=151936, D=4096 in bf16 (C = 5) on a GPU of 750 TFLOP/s and 3.3 TB/s that predicts 41 ms of products and
up to 11 ms of memory traffic, which overlaps with them in part, against 54 + 3 ms and 41 + 45 ms. Predicted, not
measured.

fp16 would flush dx to zero; as in `_triton_backward` it is written times a power of two, one for all rows of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._torch import gemm_dtype
from ._torch_grads import Grads, Needs
from ._triton_backward import matmul_fp32
from ._triton_common import (
    check_operands,
    compile_options,
    grouped_block,
    input_precision,
    launch_options,
    logits_tile,
    on_device,
    operands,
    power_of_two_above,
    rows_contiguous,
    tma_usable,
)
from ._triton_forward import vocab_splits
from ._triton_tiles import INTERPRETED, INTERPRETER_TILE, Tile, candidate_tiles, device_limits
from .types import Partials

# Bound of the kept [rows, V] elements; but dW is read and written once per chunk, in fp32, and below about a
# thousand rows that takes longer than the product.
KEPT_BYTES = 512 << 20
MIN_CHUNK_ROWS = 1024
ROW_MULTIPLE = 128
# Kept rows begin at multiples of this many elements, whatever V is.
KEPT_COLUMN_MULTIPLE = 128
DLOGITS_ROWS, DLOGITS_COLUMNS = 32, 128
LEAST_SHARED_TILE = Tile(64, 128, 32, 4, 4)  # with a staged tile within the 99 KiB of consumer GPUs after Ampere
# Stands for −inf in maxima, where differences must not be NaN.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["N", "num_splits", "tiles_per_split"])
def keep_kernel(
    hidden, weight, bias, targets, kept, tile_max, split_max, split_sum, split_dot, target_logit,
    N, V, D, hidden_stride, weight_stride, kept_stride, num_splits, tiles_per_split,
    inv_temperature, softcap, keep_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """keep_scale·e·slope [N, V], its tiles' maxima [tiles, N], partial (max, sum, dot) [num_splits, N], and the
    target's logit [N] where this head has it. Grid: row blocks × num_splits.
    """
    row_block, split = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)

    m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    s = tl.zeros([BLOCK_M], dtype=tl.float32)
    t = tl.zeros([BLOCK_M], dtype=tl.float32)
    z_target = tl.zeros([BLOCK_M], dtype=tl.float32)
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, V)
    for col0 in range(first_col, end_col, BLOCK_N):
        x = logits_tile(
            hidden, weight, bias, row0, col0, N, V, D, hidden_stride, weight_stride, softcap,
            HAS_BIAS, HAS_SOFTCAP, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        cols = col0 + tl.arange(0, BLOCK_N)
        col_ok = cols < V
        z = tl.where(col_ok[None, :], inv_temperature * x, float("-inf"))
        z_target += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
        m_tile = tl.maximum(tl.max(z, axis=1), LOWEST)
        d = z - m_tile[:, None]
        e = tl.exp(d)
        s_tile = tl.sum(e, axis=1)
        m_new = tl.maximum(m, m_tile)
        alpha, beta = tl.exp(m - m_new), tl.exp(m_tile - m_new)
        if HAS_ENTROPY:
            t_tile = tl.sum(tl.where(e > 0, e * d, 0.0), axis=1)
            # alpha · s first: the step from LOWEST times a sum above 1 would be −inf, not 0.
            t = alpha * t + (alpha * s) * (m - m_new) + beta * t_tile + (beta * s_tile) * (m_tile - m_new)
        s = alpha * s + beta * s_tile
        m = m_new
        if HAS_SOFTCAP:
            ratio = x / softcap
            e *= 1.0 - ratio * ratio
        e *= keep_scale
        if USE_TMA:
            kept.store([row0, col0], e.to(kept.dtype))
        else:
            tile = kept + row0.to(tl.int64) * kept_stride + col0
            offsets = tl.arange(0, BLOCK_M)[:, None] * kept_stride + tl.arange(0, BLOCK_N)[None, :]
            tl.store(tile + offsets, e.to(kept.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])
        tl.store(tile_max + tl.cast(col0 // BLOCK_N, tl.int64) * N + rows, m_tile, mask=row_ok)

    out = split.to(tl.int64) * N + rows
    tl.store(split_max + out, m, mask=row_ok)
    tl.store(split_sum + out, s, mask=row_ok)
    if HAS_ENTROPY:
        tl.store(split_dot + out, t, mask=row_ok)
    tl.store(target_logit + rows, z_target, mask=row_ok & (target >= first_col) & (target < end_col))


@triton.jit(do_not_specialize=["n_active", "N"])
def dlogits_kernel(
    kept, tile_max, active, targets, row_max, log_sum, coefficient, at_target, grad_bias,
    n_active, N, V, kept_stride, bias_scale,
    TILE: tl.constexpr, SOME_ROWS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows active[i] of e, times their factors, become rows i of dx, in place. Grid: blocks of columns.

    A program owns its columns. It walks the rows in ascending order and active[i] >= i, so that no row is
    overwritten before it was read; within a block of rows the barrier sees to that.
    """
    col0 = tl.program_id(0) * BLOCK_N
    cols = col0 + tl.arange(0, BLOCK_N)
    col_ok = cols < V
    tile_row = tile_max + tl.cast(col0 // TILE, tl.int64) * N
    column_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, n_active, BLOCK_M):
        out_rows = first + tl.arange(0, BLOCK_M)
        row_ok = out_rows < n_active
        rows = out_rows.to(tl.int64)
        if SOME_ROWS:
            rows = tl.load(active + out_rows, mask=row_ok, other=0)
        log_share = tl.load(tile_row + rows, mask=row_ok, other=0.0) - tl.load(row_max + rows, mask=row_ok, other=0.0)
        share = tl.exp(log_share - tl.load(log_sum + rows, mask=row_ok, other=0.0))
        factor = share * tl.load(coefficient + rows, mask=row_ok, other=0.0)
        row_target = tl.load(targets + rows, mask=row_ok, other=-1)
        row_at_target = tl.load(at_target + rows, mask=row_ok, other=0.0)
        tile_ok = row_ok[:, None] & col_ok[None, :]
        e = tl.load(kept + rows[:, None] * kept_stride + cols[None, :], mask=tile_ok, other=0.0)
        dx = e.to(tl.float32) * factor[:, None]
        dx = tl.where(cols[None, :] == row_target[:, None], row_at_target[:, None], dx)
        if BIAS_GRAD:
            column_sum += tl.sum(tl.where(tile_ok, dx, 0.0), axis=0)
        tl.debug_barrier()
        out = kept + out_rows.to(tl.int64)[:, None] * kept_stride + cols[None, :]
        tl.store(out, dx.to(kept.dtype.element_ty), mask=tile_ok)
    if BIAS_GRAD:
        before = tl.load(grad_bias + cols, mask=col_ok, other=0.0)
        tl.store(grad_bias + cols, before + column_sum * bias_scale, mask=col_ok)


class TritonChunks:
    """The head of `_torch_loss.single_pass` for CUDA tensors (or Triton's interpreter); see the module.

    Memory beside the results: the kept elements of `chunk_rows` rows; with a weight gradient and more than one chunk,
    or in fp16, that gradient in fp32; an fp32 gradient of one chunk's rows.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        needs: Needs,
        sharded: bool = False,
    ) -> None:
        """sharded: the gradient of hidden is a part that is yet to be summed, and stays in fp32."""
        check_operands(hidden, weight)
        self.hidden, self.weight = rows_contiguous(hidden), rows_contiguous(weight)
        self.bias = None if bias is None else bias.contiguous()
        self.targets = targets.contiguous()
        self.temperature, self.softcap, self.entropy, self.needs = temperature, softcap, entropy, needs
        n_rows, vocab = hidden.shape[0], weight.shape[0]
        self.rows_per_chunk = chunk_rows(n_rows, vocab, hidden.itemsize)
        stride = triton.cdiv(vocab, KEPT_COLUMN_MULTIPLE) * KEPT_COLUMN_MULTIPLE
        self.kept = torch.empty(min(self.rows_per_chunk, n_rows), stride, dtype=hidden.dtype, device=hidden.device)
        # fp16 holds 2^15, and 2^-14 is its smallest number of full precision.
        self.keep_scale = 2.0**15 if hidden.dtype == torch.float16 else 1.0
        # fp16 gradients stay in fp32 for the caller's loss scale, which arrives only in the backward.
        result = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        in_parts = n_rows > self.rows_per_chunk
        part = torch.float32 if sharded else result
        self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=part) if needs.hidden else None
        self.grad_weight = (
            torch.empty(weight.shape, dtype=torch.float32 if in_parts else result, device=weight.device)
            if needs.weight
            else None
        )
        self.grad_bias = weight.new_zeros(vocab, dtype=torch.float32) if needs.bias else None
        self.untouched = True

    def forward(self, rows: slice) -> Partials:
        """Statistics of a chunk of rows; their e stay behind until the next chunk."""
        if rows.start == rows.stop:
            empty = self.hidden.new_empty(0, dtype=torch.float32)
            return Partials(empty, empty, empty if self.entropy else None, empty)
        hidden, weight, bias = self.hidden[rows], self.weight, self.bias
        self.rows, (n, dim), vocab = rows, hidden.shape, weight.shape[0]
        use_tma = tma_usable(hidden, weight)
        self.target_logit = torch.zeros(n, dtype=torch.float32, device=hidden.device)
        tile = keep_tile(hidden)
        row_blocks, vocab_tiles = triton.cdiv(n, tile.block_m), triton.cdiv(vocab, tile.block_n)
        splits, tiles_per_split = vocab_splits(row_blocks, vocab_tiles, device_limits(hidden.device)[1])
        parts = torch.empty(3 if self.entropy else 2, splits, n, dtype=torch.float32, device=hidden.device)
        self.tile_max = torch.empty(vocab_tiles, n, dtype=torch.float32, device=hidden.device)
        self.tile_columns = tile.block_n
        hidden_arg, weight_arg = operands(hidden, weight, tile, use_tma)
        kept = self.kept[:n, :vocab]
        with on_device(hidden):
            keep_kernel[(row_blocks * splits,)](
                hidden_arg, weight_arg, bias, self.targets[rows],
                TensorDescriptor.from_tensor(kept, [tile.block_m, tile.block_n]) if use_tma else kept,
                self.tile_max, parts[0], parts[1], parts[2] if self.entropy else None, self.target_logit,
                n, vocab, dim, hidden.stride(0), weight.stride(0), kept.stride(0), splits, tiles_per_split,
                1.0 / self.temperature, 1.0 if self.softcap is None else self.softcap, self.keep_scale,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=self.softcap is not None, HAS_ENTROPY=self.entropy,
                USE_TMA=use_tma, PRECISION=input_precision(), **launch_options(tile),
            )  # fmt: skip
        return _merge_splits(parts, self.target_logit)

    def backward(self, active: torch.Tensor, dlogprob: torch.Tensor, whole: Partials, logprob: torch.Tensor) -> None:
        """Adds the gradients of the rows `active` of the last chunk, given d loss / d logprob of all n of them.

        whole: statistics of the whole vocabulary.   logprob: [n] of the targets.
        """
        some_rows = len(active) < len(dlogprob)
        dlogits, scale = self._dlogits(active if some_rows else None, len(active), dlogprob, whole, logprob)
        h = self.hidden[self.rows]
        h = h[active] if some_rows else h
        if self.grad_hidden is not None:
            part = matmul_fp32(dlogits, self.weight).div_(scale).to(self.grad_hidden.dtype)
            self.grad_hidden[self.rows].index_copy_(0, active, part)
        if self.grad_weight is not None:
            _add_product_(self.grad_weight, dlogits.T, h, 1.0 / scale, fresh=self.untouched)
        self.untouched = False

    def _dlogits(
        self,
        active: torch.Tensor | None,
        n_active: int,
        dlogprob: torch.Tensor,
        whole: Partials,
        logprob: torch.Tensor,
    ) -> tuple[torch.Tensor, float]:
        """scale·dx [n_active, V] over the kept elements, and scale."""
        vocab, g = self.weight.shape[0], dlogprob / self.temperature
        scale = 1.0
        if self.kept.dtype == torch.float16:
            exponent = power_of_two_above(g.abs().amax().item())  # |dx| ≤ |g|
            scale = 2.0 ** max(-100, min(100, 15 - exponent))
        at_target = -torch.expm1(logprob) * g * scale
        if self.softcap is not None:
            at_target *= 1.0 - (self.target_logit * (self.temperature / self.softcap)).square_()
        block_n = min(DLOGITS_COLUMNS, self.tile_columns)
        with on_device(g):
            dlogits_kernel[(triton.cdiv(vocab, block_n),)](
                self.kept, self.tile_max, active, self.targets[self.rows], whole.max, whole.sum.log(),
                g * (-scale / self.keep_scale), at_target, self.grad_bias,
                n_active, len(g), vocab, self.kept.stride(0), 1.0 / scale,
                TILE=self.tile_columns, SOME_ROWS=active is not None, BIAS_GRAD=self.grad_bias is not None,
                BLOCK_M=DLOGITS_ROWS, BLOCK_N=block_n, **compile_options(4, 1),
            )  # fmt: skip
        return self.kept[:n_active, :vocab], scale

    def gradients(self) -> Grads:
        """Of hidden [N, D] and weight [V, D] in their dtype, but fp32 for fp16; of bias [V] in fp32."""
        del self.kept  # frees it before dW is copied to its own dtype
        weight = self.grad_weight
        if weight is not None and self.untouched:
            weight.zero_()
        if weight is not None and self.weight.dtype == torch.bfloat16:
            weight = weight.to(torch.bfloat16)
        return self.grad_hidden, weight, self.grad_bias


def chunk_rows(n_rows: int, vocab: int, itemsize: int) -> int:
    """Rows of equal chunks, a multiple of 128, whose kept elements take at most 512 MiB, or else 1024 rows."""
    most = max(MIN_CHUNK_ROWS, KEPT_BYTES // (vocab * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    chunks = max(1, triton.cdiv(n_rows, most))
    return triton.cdiv(triton.cdiv(max(n_rows, 1), chunks), ROW_MULTIPLE) * ROW_MULTIPLE


def keep_tile(hidden: torch.Tensor) -> Tile:
    """The tile of `keep_kernel` for these rows, which also stages a tile of e in shared memory."""
    if INTERPRETED:
        return INTERPRETER_TILE
    arch, _, shared_limit = device_limits(hidden.device)
    for tile in keep_tiles(arch, hidden.itemsize, hidden.shape[0]):
        staged = tile.block_m * tile.block_n * hidden.itemsize
        if isinstance(arch, str) or tile.shared_bytes(hidden.itemsize) + staged <= shared_limit - 4096:
            return tile
    return LEAST_SHARED_TILE


def keep_tiles(arch: int | str, itemsize: int, n_rows: int) -> list[Tile]:
    """In order of preference. At 256 columns the kernel spills; on Ampere at 128 x 128 too, with Triton before 3.9."""
    if isinstance(arch, int) and arch < 90:
        n_rows = min(n_rows, 64)
    return [tile for tile in candidate_tiles(arch, itemsize, n_rows, True) if tile.block_n <= 128]


def _merge_splits(parts: torch.Tensor, target_logit: torch.Tensor) -> Partials:
    """(max, sum, and dot if there is one) [2 or 3, splits, n] of the splits -> those of all their columns."""
    # A split without any probability has LOWEST as its maximum, so that its products are 0, not NaN.
    new_max = parts[0].amax(0)
    step = parts[0] - new_max
    decay = step.exp()
    grown = decay * parts[1]
    dot = (decay * parts[2] + step * grown).sum(0) if len(parts) == 3 else None
    return Partials(new_max, grown.sum(0), dot, target_logit)


def _add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, *, fresh: bool) -> None:
    """out += alpha·a @ b, accumulated in fp32; with `fresh` out = alpha·a @ b, whatever out holds.

    Half types go through fp32 copies where torch has no such product, as in `matmul_fp32`.
    """
    beta, operand = 0 if fresh else 1, gemm_dtype(a)
    if operand == a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out, beta=beta, alpha=alpha)
    elif a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        out.addmm_(a.to(operand), b.to(operand), beta=beta, alpha=alpha)
