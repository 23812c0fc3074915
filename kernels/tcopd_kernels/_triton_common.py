"""Parts shared by the Triton kernels: operands, launch options, and the logits tile itself.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._backend import gpu_obstacle
from ._triton_tiles import INTERPRETED as INTERPRETED
from ._triton_tiles import Tile as Tile
from ._triton_tiles import candidate_tiles as candidate_tiles
from ._triton_tiles import device_limits as device_limits
from ._triton_tiles import pick_tile as pick_tile

GROUP_ROWS = 16  # row blocks that run side by side, so that their slice of `hidden` stays in L2


class Head(NamedTuple):
    """hidden [N, D] and weight [V, D], rows of stride 1; bias [V] contiguous, or None; softcap or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    softcap: float | None


def on_device(tensor: torch.Tensor) -> Any:
    """Context in which Triton launches on the GPU that holds `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` itself if its last dimension has stride 1, whatever its row stride; else a packed copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def tma_usable(*matrices: torch.Tensor) -> bool:
    """Whether all `matrices` can be read through TMA: sm_90 or later, base and row stride multiples of 16
    bytes, rows that do not overlap."""
    return all(
        matrix.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(matrix.device) >= (9, 0)
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        for matrix in matrices
    )


def operands(hidden: torch.Tensor, weight: torch.Tensor, tile: Tile, use_tma: bool) -> tuple[Any, Any]:
    """(hidden, weight) as the kernels take them: TMA descriptors for this tile, or the tensors."""
    if not use_tma:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
    )


def launch_options(tile: Tile) -> dict[str, Any]:
    """Keyword arguments that all large kernels take from a tile."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return blocks | {"GROUP_ROWS": GROUP_ROWS} | compile_options(tile.num_warps, tile.num_stages)


def loop_options(tile: Tile) -> dict[str, bool]:
    """Keyword arguments of the kernels whose loops a tile may flatten or specialise."""
    return {"FLATTEN": tile.flatten, "WARP_SPECIALIZE": tile.warp_specialize}


def compile_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Compiler options. Fused multiply-add is asked for: the default is to change after Triton 3.9."""
    if INTERPRETED:
        return {}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def input_precision() -> str:
    """tl.dot mode for fp32 inputs: TF32 only where torch's own matmul may use it. Half types ignore it."""
    tf32 = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def check_operands(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse what the kernels cannot compute; shapes and targets are the caller's to check."""
    supported = (torch.float16, torch.bfloat16, torch.float32)
    if hidden.dtype not in supported or weight.dtype != hidden.dtype:
        raise TypeError(
            f"the triton backend needs hidden and weight of one dtype out of float16, bfloat16, float32; got "
            f"{hidden.dtype} and {weight.dtype}: cast one of them or use backend='torch'"
        )
    obstacle = gpu_obstacle(hidden.device) if hidden.is_cuda else None
    if obstacle:
        raise RuntimeError(f"{obstacle}; got {torch.cuda.get_device_name(hidden.device)}: use backend='torch'")
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float16 or float32 there")


def power_of_two_above(value: float) -> int:
    """Least exponent e with value < 2**e; 0 for zero, infinity and NaN."""
    return math.frexp(value)[1] if math.isfinite(value) else 0


@triton.jit
def grouped_block(pid, row_blocks, columns, GROUP_ROWS: tl.constexpr):
    """(row block, column block) of a program: row fastest inside groups of GROUP_ROWS row blocks."""
    group_size = GROUP_ROWS * columns
    first_row = (pid // group_size) * GROUP_ROWS
    rows_here = tl.minimum(row_blocks - first_row, GROUP_ROWS)
    within = pid % group_size
    return first_row + within % rows_here, within // rows_here


@triton.jit
def tanh(x):
    """tanh from one exponential, absolute error about 1e-7; exp(-2|x|) cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def logits_tile(
    hidden, weight, bias, row0, col0, N, V, D, hidden_stride, weight_stride, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits before the temperature, fp32 [BLOCK_M, BLOCK_N], of the tile at (row0, col0).

    Rows >= N and columns >= V read zeros (plus no bias): the caller masks them.
    """
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if USE_TMA:
        for k in range(0, D, BLOCK_K):
            h = hidden.load([row0, k])
            w = weight.load([col0, k])
            acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, BLOCK_K)
        h_ptrs = hidden + rows.to(tl.int64)[:, None] * hidden_stride + ks[None, :]
        w_ptrs = weight + cols.to(tl.int64)[:, None] * weight_stride + ks[None, :]
        for k in range(0, D, BLOCK_K):
            k_ok = (ks + k < D)[None, :]
            h = tl.load(h_ptrs + k, mask=(rows < N)[:, None] & k_ok, other=0.0)
            w = tl.load(w_ptrs + k, mask=(cols < V)[:, None] & k_ok, other=0.0)
            acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        acc = softcap * tanh(acc / softcap)
    return acc
