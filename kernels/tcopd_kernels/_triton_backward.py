"""Triton backward of linear_logprob: dlogits in a bounded workspace, then plain matrix products.

With p = softmax(z), entropy H, and upstream gradients g (logprob), l (lse) and e (entropy) of a row:

    dL/dz_v = g·(1[v = y] − p_v) + l·p_v − e·p_v·(log p_v + H)
            = g·1[v = y] + p_v·(c_1 + c_2·log p_v)        c_1 = l − g − e·H,  c_2 = −e

and a logit x before softcap and temperature T gets dL/dx = dL/dz · (1 − tanh²(x / softcap)) / T.

The vocabulary is walked in chunks. For each, one kernel recomputes the logits tile by tile and writes dL/dx
[N, Vc] in the input dtype; two matrix products then give the chunk's share of grad_hidden, summed in fp32,
and its rows of grad_weight, each written once. The order of every sum is fixed: the result is deterministic.

float16 would flush dL/dx to zero (a mean over 8192 tokens makes it 1e-4·p, and the smallest subnormal is
6e-8). The kernel therefore writes it times a power of two, the largest that keeps the bound of |dL/dx| under
2^15, and the products are divided by it in fp32 before they are rounded. One factor for all rows, since
grad_weight sums over rows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._torch import gemm_dtype, matmul
from ._triton_common import (
    Head,
    Tile,
    check_operands,
    grouped_block,
    input_precision,
    launch_options,
    logits_tile,
    on_device,
    operands,
    pick_tile,
    power_of_two_above,
    rows_contiguous,
    tma_usable,
)
from ._triton_tiles import dlogits_tiles

WORKSPACE_BYTES = 256 << 20
MIN_CHUNK = 1024  # columns: below this the products would spend their time on the fp32 accumulator
CHUNK_MULTIPLE = 128


class RowTerms(NamedTuple):
    """Per-row inputs of the dlogits kernel, [N]: target int64, the others fp32 as in the module docstring."""

    target: torch.Tensor
    lse: torch.Tensor
    g: torch.Tensor
    c_1: torch.Tensor
    c_2: torch.Tensor | None

    @classmethod
    def of(
        cls,
        targets: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor | None,
        grad_logprob: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
    ) -> RowTerms:
        g = torch.zeros_like(lse) if grad_logprob is None else grad_logprob.contiguous()
        c_1 = -g if grad_lse is None else grad_lse - g
        c_2 = None
        if grad_entropy is not None and entropy is not None:
            c_1 = c_1 - grad_entropy * entropy
            c_2 = -grad_entropy
        return cls(targets.contiguous(), lse.contiguous(), g, c_1.contiguous(), c_2)

    def rows(self, chosen: slice | torch.Tensor) -> RowTerms:
        c_2 = None if self.c_2 is None else self.c_2[chosen]
        return RowTerms(self.target[chosen], self.lse[chosen], self.g[chosen], self.c_1[chosen], c_2)


@triton.jit(do_not_specialize=["N", "chunk_start", "chunk_end"])
def dlogits_kernel(
    hidden, weight, bias, targets, lse, g, c_1, c_2, dlogits, bias_parts, mass_parts,
    N, V, D, hidden_stride, weight_stride, dlogits_stride, chunk_start, chunk_end,
    inv_temperature, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BIAS_GRAD: tl.constexpr, ROW_MASS: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of scale·dL/dx for columns [chunk_start, chunk_end), with its column sums of dL/dx and row sums of p.

    Grid: row blocks × column blocks of the chunk. bias_parts: [row blocks, chunk width] fp32, if BIAS_GRAD.
    mass_parts: [column blocks, N] fp32, if ROW_MASS.
    """
    width = chunk_end - chunk_start
    row_block, col_block = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_ROWS)
    row0 = row_block * BLOCK_M
    col0 = chunk_start + col_block * BLOCK_N
    x = logits_tile(
        hidden, weight, bias, row0, col0, N, V, D, hidden_stride, weight_stride, softcap,
        HAS_BIAS, HAS_SOFTCAP, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    col_ok = cols < chunk_end
    row_target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)
    row_lse = tl.load(lse + rows, mask=row_ok, other=0.0)
    row_g = tl.load(g + rows, mask=row_ok, other=0.0)
    row_c_1 = tl.load(c_1 + rows, mask=row_ok, other=0.0)

    log_p = inv_temperature * x - row_lse[:, None]
    if ROW_MASS:
        log_p = tl.where(col_ok[None, :], log_p, float("-inf"))
    p = tl.exp(log_p)
    if ROW_MASS:
        tl.store(mass_parts + col_block.to(tl.int64) * N + rows, tl.sum(p, axis=1), mask=row_ok)
    dx = p * row_c_1[:, None]
    if HAS_ENTROPY:
        row_c_2 = tl.load(c_2 + rows, mask=row_ok, other=0.0)
        dx += tl.where(p > 0, p * log_p, 0.0) * row_c_2[:, None]
    dx += tl.where(cols[None, :] == row_target[:, None], row_g[:, None], 0.0)
    if HAS_SOFTCAP:
        ratio = x / softcap
        dx *= 1.0 - ratio * ratio
    dx *= inv_temperature

    tile_ok = row_ok[:, None] & col_ok[None, :]
    if BIAS_GRAD:
        column_sum = tl.sum(tl.where(tile_ok, dx, 0.0), axis=0)
        part = bias_parts + row_block.to(tl.int64) * width + (cols - chunk_start)
        tl.store(part, column_sum, mask=col_ok)
    out = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + (cols - chunk_start)[None, :]
    tl.store(out, (dx * scale).to(dlogits.dtype.element_ty), mask=tile_ok)


def chunk_columns(N: int, V: int, itemsize: int) -> int:
    """Columns per chunk: equal chunks, a multiple of 128 wide, whose [N, Vc] workspace is at most 256 MiB.

    Never under 1024 columns, so the bound grows past N·itemsize = 256 KiB (131072 rows in bf16).
    """
    most = max(MIN_CHUNK, WORKSPACE_BYTES // (N * itemsize) // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    chunks = triton.cdiv(V, most)
    return triton.cdiv(triton.cdiv(V, chunks), CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of Σ_n (grad_logprob·logprob + grad_lse·lse + grad_entropy·entropy); equations in the module.

    Args:
        hidden [N, D], weight [V, D], targets [N], bias, temperature, softcap: as given to `forward`. A target
            outside [0, V) belongs to another part of the vocabulary.
        lse, entropy: [N] fp32, of the whole vocabulary; entropy may be None if grad_entropy is.
        grad_logprob, grad_lse, grad_entropy: [N] fp32 upstream gradients, None meaning zero.
        need_hidden, need_weight, need_bias: which gradients to compute; the others cost nothing.

    Returns:
        (grad_hidden [N, D], grad_weight [V, D], grad_bias [V]) in the dtypes of their inputs, or None where
        not needed. Rows whose upstream gradients are all zero cost as much as others: the caller drops them.

    Memory beside the outputs: the [N, Vc] workspace of `chunk_columns`; with need_hidden two fp32 [N, D]; for
    float16 an fp32 [Vc, D]; a copy of a matrix whose last dimension is not contiguous.

    p_v is exp(z_v − lse) with lse in fp32, so its relative error is up to half an ulp of lse: 4e-6 at
    |lse| = 100, 5e-4 at 1e4.
    """
    check_operands(hidden, weight)
    if grad_entropy is not None and entropy is None:
        raise ValueError("grad_entropy needs the entropy that the forward computes with entropy=True; got None")
    N, V = hidden.shape[0], weight.shape[0]
    allocate = torch.empty_like if N > 0 else torch.zeros_like
    layout = torch.contiguous_format
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32, memory_format=layout) if need_hidden else None
    grad_weight = allocate(weight, memory_format=layout) if need_weight else None
    grad_bias = allocate(bias, memory_format=layout) if need_bias and bias is not None else None
    if N > 0:
        hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
        terms = RowTerms.of(targets, lse, entropy, grad_logprob, grad_lse, grad_entropy)
        scale = fp16_scale(terms, temperature) if hidden.dtype == torch.float16 else 1.0
        head = Head(hidden, weight, None if bias is None else bias.contiguous(), temperature, softcap)
        chunk = chunk_columns(N, V, hidden.itemsize)
        workspace = torch.empty(N, chunk, dtype=hidden.dtype, device=hidden.device)
        for start in range(0, V, chunk):
            end = min(start + chunk, V)
            dlogits = workspace[:, : end - start]
            bias_parts, _ = fill_dlogits(dlogits, head, terms, start, end, scale, bias_grad=grad_bias is not None)
            if grad_hidden is not None:
                grad_hidden += matmul_fp32(dlogits, weight[start:end])
            if grad_weight is not None:
                _weight_rows_into(grad_weight[start:end], dlogits, hidden, scale)
            if grad_bias is not None and bias_parts is not None:
                grad_bias[start:end] = bias_parts.sum(0)
        if grad_hidden is not None and scale != 1.0:
            grad_hidden /= scale
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def fp16_scale(terms: RowTerms, temperature: float) -> float:
    """Largest power of two that keeps every |scale·dL/dx| under 2^15; reads one number from the device.

    |dL/dx| ≤ (|g| + |c_1| + |c_2|/2) / T, since p ≤ 1 and p·|log p| ≤ 1/e.
    """
    bound = terms.g.abs() + terms.c_1.abs()
    if terms.c_2 is not None:
        bound = bound + 0.5 * terms.c_2.abs()
    exponent = power_of_two_above(bound.amax().item() / temperature)
    return 2.0 ** max(-100, min(100, 15 - exponent))


def fill_dlogits(
    dlogits: torch.Tensor,
    head: Head,
    terms: RowTerms,
    start: int,
    end: int,
    scale: float,
    *,
    bias_grad: bool = False,
    row_mass: bool = False,
    vocab: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write scale·dL/dx of columns [start, end) into dlogits [N, end − start].

    vocab: V of the problem where the head holds some of its columns.

    Returns: with bias_grad dL/dx summed over each row block, fp32 [row blocks, end − start]; with row_mass p summed
    over each column block, fp32 [column blocks, N].
    """
    hidden, weight, bias, temperature, softcap = head
    N, D = hidden.shape
    use_tma = tma_usable(hidden, weight)

    def launch(tile: Tile) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        row_blocks, col_blocks = triton.cdiv(N, tile.block_m), triton.cdiv(end - start, tile.block_n)
        bias_parts = torch.empty(row_blocks, end - start, device=hidden.device) if bias_grad else None
        mass_parts = torch.empty(col_blocks, N, device=hidden.device) if row_mass else None
        hidden_arg, weight_arg = operands(hidden, weight, tile, use_tma)
        dlogits_kernel[(row_blocks * col_blocks,)](
            hidden_arg, weight_arg, bias, *terms, dlogits, bias_parts, mass_parts,
            N, weight.shape[0], D, hidden.stride(0), weight.stride(0), dlogits.stride(0), start, end,
            1.0 / temperature, 1.0 if softcap is None else softcap, scale,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_ENTROPY=terms.c_2 is not None,
            BIAS_GRAD=bias_grad, ROW_MASS=row_mass, USE_TMA=use_tma, PRECISION=input_precision(),
            **launch_options(tile),
        )  # fmt: skip
        return bias_parts, mass_parts

    name = "dlogits with row mass" if row_mass else "dlogits"
    tiles = partial(dlogits_tiles, row_mass=row_mass)
    with on_device(hidden):
        return launch(pick_tile(name, hidden, weight, terms.c_2 is not None, launch, tiles=tiles, vocab=vocab))


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in fp32; half types go through fp32 copies where torch has no such product."""
    operand = gemm_dtype(a)
    return matmul(a.to(operand), b.to(operand))


def _weight_rows_into(out: torch.Tensor, dlogits: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
    """out [Vc, D] = dlogits.T @ hidden / scale. fp16 is rounded last: its scaled sums may exceed 65504."""
    if out.dtype == torch.float16:
        out.copy_(matmul_fp32(dlogits.t(), hidden).div_(scale))
    else:
        torch.mm(dlogits.t(), hidden, out=out)
