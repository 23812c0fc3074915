"""Parts shared by the Triton forward and backward: tile shapes, launch limits, and the logits tile itself.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
GROUP_ROWS = 16  # row blocks that run side by side, so that their slice of `hidden` stays in L2


@dataclass(frozen=True)
class Tile:
    """Block shape (block_m tokens, block_n vocabulary, block_k hidden) and launch options of a variant."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of shared memory that the software pipeline's operand buffers take."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


INTERPRETER_TILE = Tile(16, 16, 16, 4, 1)

# The first entry of each tuple is used where nothing may be timed. bench/offline_compile.py checks that the
# fp16 and bf16 entries spill no registers on the architectures that use them.
_FP32_TILES = (Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 8, 3))
_SMALL_N_TILES = (Tile(16, 128, 128, 4, 3), Tile(16, 64, 128, 4, 4))
_MEDIUM_N_TILES = (Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 8, 3))
_AMPERE_TILES = (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4))
_HOPPER_TILES = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3))
_LEAST_SHARED_TILE = _AMPERE_TILES[1]  # fits the 99 KiB of consumer GPUs


def candidate_tiles(capability: int, itemsize: int, N: int, entropy: bool) -> tuple[Tile, ...]:
    """Tiles worth timing for N rows on compute capability `capability` (80, 90, …); the first is the default.

    entropy: whether the kernel carries the entropy terms, which on sm_100 spill at 256 columns.
    """
    if itemsize == 4:
        return _FP32_TILES
    if N <= 16:
        return _SMALL_N_TILES
    if N <= 64:
        return _MEDIUM_N_TILES
    if capability >= 100 and entropy:
        return _HOPPER_TILES[:1]
    return _HOPPER_TILES if capability >= 90 else _AMPERE_TILES


@cache
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """(compute capability as 80, 90, …; multiprocessors; bytes of shared memory a block may take)."""
    if device.type != "cuda":
        return 80, 8, 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)  # the stub lacks the last field
    return (
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


_chosen_tiles: dict[Hashable, Tile] = {}


def pick_tile(
    kernel: str, hidden: torch.Tensor, weight: torch.Tensor, entropy: bool, launch: Callable[[Tile], Any]
) -> Tile:
    """The tile for this kernel and problem, timed once per device, dtype, N bucket, V, D and entropy.

    `launch` must be idempotent. Under the interpreter, inside a CUDA graph capture, and with
    `torch.use_deterministic_algorithms(True)` nothing is timed and the default tile is taken, so that in
    the last case a result depends on the input and the GPU model alone.
    """
    if INTERPRETED:
        return INTERPRETER_TILE
    N, D = hidden.shape
    capability, _, shared_limit = device_limits(hidden.device)
    candidates = candidate_tiles(capability, hidden.itemsize, N, entropy)
    tiles = [tile for tile in candidates if tile.shared_bytes(hidden.itemsize) <= shared_limit - 4096]
    tiles = tiles or [_LEAST_SHARED_TILE]
    if len(tiles) == 1 or torch.are_deterministic_algorithms_enabled():
        return tiles[0]
    key = (kernel, hidden.device, hidden.dtype, triton.next_power_of_2(N), weight.shape[0], D, entropy)
    if key not in _chosen_tiles:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        times_ms = [triton.testing.do_bench(lambda tile=tile: launch(tile), warmup=5, rep=20) for tile in tiles]
        _chosen_tiles[key] = tiles[times_ms.index(min(times_ms))]
    return _chosen_tiles[key]


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
        and device_limits(matrix.device)[0] >= 90
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
    """Keyword arguments that both large kernels take from a tile."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return blocks | {"GROUP_ROWS": GROUP_ROWS} | compile_options(tile.num_warps, tile.num_stages)


def compile_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Compiler options. Fused multiply-add is asked for: the default is to change after Triton 3.9."""
    if INTERPRETED:
        return {}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def input_precision() -> str:
    """tl.dot mode for fp32 inputs: TF32 only where torch's own matmul may use it. Half types ignore it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check_operands(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse what the kernels cannot compute; shapes and targets are the caller's to check."""
    supported = (torch.float16, torch.bfloat16, torch.float32)
    if hidden.dtype not in supported or weight.dtype != hidden.dtype:
        raise TypeError(
            f"the triton backend needs hidden and weight of one dtype out of float16, bfloat16, float32; got "
            f"{hidden.dtype} and {weight.dtype}: cast one of them or use backend='torch'"
        )
    if hidden.is_cuda and (torch.version.hip is not None or device_limits(hidden.device)[0] < 80):
        raise RuntimeError(
            "the triton backend needs an NVIDIA GPU of compute capability 8.0 or later; got "
            f"{torch.cuda.get_device_name(hidden.device)}: use backend='torch'"
        )
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
