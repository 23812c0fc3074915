"""What each Triton kernel must do at least, and how its grid falls on a GPU: pure arithmetic, nothing is measured.

floor = max(FLOP / peak, bytes / bandwidth), peaks from data sheets; bytes: every operand and result once. Registers and
shared memory come from the offline compile, and say how many programs (blocks) a multiprocessor holds at once. waves =
programs / multiprocessors: programs that share a multiprocessor share its rates, so what counts is how many each gets.
full = waves / ⌈waves⌉: the share of the multiprocessors' time that is not idle at the end, were all programs alike.

Shapes: N tokens, V vocabulary, D hidden size; 2 bytes per element (bfloat16). A product of N × V × D is 2·N·V·D FLOP,
one G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tcopd_kernels._triton_backward import chunk_columns
from tcopd_kernels._triton_forward import vocab_splits
from tcopd_kernels._triton_full_vocab import tile_for
from tcopd_kernels._triton_loss import chunk_rows, keep_tiles
from tcopd_kernels._triton_tiles import Tile, candidate_tiles, dlogits_tiles, forward_tiles

BYTES = 2
REGISTERS = 65536  # of a multiprocessor, allocated per warp in units of 256
WARP, WARP_REGISTER_UNIT, MOST_BLOCKS = 32, 256, 32


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet. flops: dense bfloat16 FLOP/s. bandwidth: bytes/s. shared: bytes per multiprocessor."""

    name: str
    arch: int
    flops: float
    bandwidth: float
    processors: int
    shared: int
    most_threads: int = 2048


GPUS = (
    Gpu("H100 SXM", 90, 989.4e12, 3.35e12, 132, 228 << 10),
    Gpu("A100 SXM 80 GB", 80, 312e12, 2.039e12, 108, 164 << 10),
)


@dataclass(frozen=True)
class Shape:
    """A head and a batch. frozen: models beside the student in the kernels that take several."""

    name: str
    N: int
    V: int
    D: int
    frozen: int = 2


SHAPES = (
    Shape("Qwen3-4B", 8192, 151936, 2560),
    Shape("Qwen3-4B, few tokens", 64, 151936, 2560),
    Shape("V 131072, D 4096", 8192, 131072, 4096),
)


@dataclass(frozen=True)
class Kernel:
    """One kind of launch in one operation. variant: its name in offline_compile.json. programs: of one launch."""

    name: str
    variant: str
    launches: int
    programs: int
    flops: float
    bytes: float


@dataclass(frozen=True)
class Fit:
    """A kernel on a GPU. floor_ms and bound of all its launches; the rest of one launch."""

    floor_ms: float
    bound: str
    registers: int
    shared_bytes: int
    programs_per_processor: int
    waves: float
    full: float


def label(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}/w{tile.num_warps}s{tile.num_stages}"


def product(shape: Shape, N: int | None = None) -> float:
    """FLOP of one G."""
    return 2.0 * (shape.N if N is None else N) * shape.V * shape.D


def kernels(shape: Shape, gpu: Gpu) -> Iterator[Kernel]:
    """Every kernel with its default tile, in the order of the operations that use them."""
    load = "tma" if gpu.arch >= 90 else "ptr"
    yield from _forward(shape, gpu, load)
    yield from _gradients(shape, gpu, load)
    yield from _loss(shape, gpu, load)
    yield from _several_models(shape, gpu, load)


def _operands(shape: Shape) -> float:
    return BYTES * float(shape.N * shape.D + shape.V * shape.D)


def _cut(shape: Shape, gpu: Gpu, tile: Tile, rows: int | None = None) -> tuple[int, int, int]:
    """(row blocks, splits of the vocabulary, tiles of the vocabulary)."""
    row_blocks = math.ceil((shape.N if rows is None else rows) / tile.block_m)
    tiles = math.ceil(shape.V / tile.block_n)
    splits, _ = vocab_splits(row_blocks, tiles, gpu.processors)
    return row_blocks, splits, tiles


def _forward(shape: Shape, gpu: Gpu, load: str) -> Iterator[Kernel]:
    for entropy, bounds, kind in ((False, False, "plain"), (True, False, "entropy"), (True, True, "compact")):
        tile = forward_tiles(gpu.arch, BYTES, shape.N, entropy, bounds)[0]
        row_blocks, splits, _ = _cut(shape, gpu, tile)
        sums = 4.0 * shape.N * (splits * (3 if entropy else 2) + 1)
        written = 4.0 * row_blocks * shape.V if bounds else 0.0
        yield Kernel(
            f"forward, {kind}", f"forward/bf16/{kind}/{load}/{label(tile)}", 1, row_blocks * splits,
            product(shape), _operands(shape) + sums + written,
        )  # fmt: skip
    yield Kernel("combine", "combine", 1, math.ceil(shape.N / 128), 0.0, 4.0 * shape.N * (2 * splits + 2))


def _gradients(shape: Shape, gpu: Gpu, load: str) -> Iterator[Kernel]:
    """The recomputing backward: dlogits by a kernel of ours, then two products by cuBLAS per chunk."""
    tile = dlogits_tiles(gpu.arch, BYTES, shape.N, False, False)[0]
    width = chunk_columns(shape.N, shape.V, BYTES)
    chunks = math.ceil(shape.V / width)
    dlogits = BYTES * float(shape.N * shape.V)
    # The chunk's rows of W once; hidden once per chunk.
    read = BYTES * float(shape.V * shape.D + chunks * shape.N * shape.D)
    yield Kernel(
        "dlogits", f"dlogits/bf16/plain/{load}/{label(tile)}", chunks,
        math.ceil(shape.N / tile.block_m) * math.ceil(width / tile.block_n), product(shape), read + dlogits,
    )  # fmt: skip
    # dH: dlogits and W, the fp32 sum read and written per chunk. dW: dlogits and hidden, its rows once.
    sums = 8.0 * chunks * shape.N * shape.D
    yield Kernel("products dH and dW (cuBLAS)", "", 2 * chunks, 0, 2 * product(shape), 2 * dlogits + read + sums)


def _loss(shape: Shape, gpu: Gpu, load: str) -> Iterator[Kernel]:
    """The single pass of a loss: e is kept in bfloat16, turned into dlogits in place."""
    rows = min(shape.N, chunk_rows(shape.N, shape.V, BYTES))
    chunks = math.ceil(shape.N / rows)
    tile = keep_tiles(gpu.arch, BYTES, rows)[0]
    row_blocks, splits, tiles = _cut(shape, gpu, tile, rows)
    kept = BYTES * float(shape.N * shape.V)
    read = BYTES * float(shape.N * shape.D + chunks * shape.V * shape.D)
    yield Kernel(
        "keep", f"keep/bf16/plain/{load}/{label(tile)}", chunks, row_blocks * splits, product(shape),
        read + kept + 4.0 * shape.N * tiles,
    )  # fmt: skip
    columns = min(128, tile.block_n)
    yield Kernel(
        "dlogits in place", "dlogits_in_place/bf16/all_rows", chunks, math.ceil(shape.V / columns), 0.0, 2 * kept
    )
    # dW is summed in fp32 over the chunks; of one chunk it is written once, in bfloat16.
    sums = 8.0 * chunks * shape.V * shape.D if chunks > 1 else BYTES * float(shape.V * shape.D)
    yield Kernel(
        "products dH and dW of the kept form (cuBLAS)", "", 2 * chunks, 0, 2 * product(shape), 2 * kept + read + sums
    )


def _several_models(shape: Shape, gpu: Gpu, load: str) -> Iterator[Kernel]:
    models = shape.frozen + 1
    tile = candidate_tiles(gpu.arch, BYTES, shape.N, True)[0]
    row_blocks, splits, _ = _cut(shape, gpu, tile)
    yield Kernel(
        f"{models} models in one launch", f"multi/bf16/plain/{load}/{label(tile)}/align16", 1,
        models * row_blocks * splits, models * product(shape), models * _operands(shape),
    )  # fmt: skip
    mixed = tile_for("forward", gpu.arch, BYTES, shape.N, shape.frozen)
    row_blocks, splits, _ = _cut(shape, gpu, mixed)
    # Variants are compiled for one and for three frozen models; three takes the most registers.
    yield Kernel(
        f"full vocabulary forward, {shape.frozen} frozen", f"mixture_forward/bf16/j3/{load}/{label(mixed)}", 1,
        row_blocks * splits, models * product(shape), models * _operands(shape),
    )  # fmt: skip
    back = tile_for("dlogits", gpu.arch, BYTES, shape.N, shape.frozen)
    width = chunk_columns(shape.N, shape.V, BYTES)
    chunks = math.ceil(shape.V / width)
    yield Kernel(
        f"full vocabulary dlogits, {shape.frozen} frozen", f"mixture_dlogits/bf16/j3/{load}/{label(back)}", chunks,
        math.ceil(shape.N / back.block_m) * math.ceil(width / back.block_n), models * product(shape),
        models * BYTES * float(shape.V * shape.D + chunks * shape.N * shape.D) + BYTES * float(shape.N * shape.V),
    )  # fmt: skip


def compiled(rows: Sequence[Mapping[str, Any]], gpu: Gpu, variant: str) -> Mapping[str, Any]:
    """The row of offline_compile.json for a variant. Raises KeyError where it was not compiled."""
    name = f"sm_{gpu.arch}/{variant}"
    for row in rows:
        if row["name"] == name:
            return row
    raise KeyError(f"{name} is not in bench/results/offline_compile.json; run bench/offline_compile.py")


def programs_per_processor(gpu: Gpu, registers: int, warps: int, shared_bytes: int) -> int:
    """Blocks that one multiprocessor holds at once; 1 KiB of shared memory per block is the system's."""
    per_warp = math.ceil(registers * WARP / WARP_REGISTER_UNIT) * WARP_REGISTER_UNIT
    limits = (
        REGISTERS // (per_warp * warps),
        gpu.shared // (shared_bytes + 1024),
        gpu.most_threads // (warps * WARP),
        MOST_BLOCKS,
    )
    return min(limits)


def fit(kernel: Kernel, gpu: Gpu, rows: Sequence[Mapping[str, Any]]) -> Fit:
    """How a kernel falls on a GPU; a product by cuBLAS has no grid of ours."""
    seconds = kernel.flops / gpu.flops, kernel.bytes / gpu.bandwidth
    floor_ms, bound = 1e3 * max(seconds), "arithmetic" if seconds[0] >= seconds[1] else "memory"
    if not kernel.variant:
        return Fit(floor_ms, bound, 0, 0, 0, 0.0, 0.0)
    row = compiled(rows, gpu, kernel.variant)
    held = programs_per_processor(gpu, row["registers"], row["variant"]["options"]["num_warps"], row["shared_bytes"])
    waves = kernel.programs / gpu.processors
    return Fit(floor_ms, bound, row["registers"], row["shared_bytes"], held, waves, waves / math.ceil(waves))


OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "logprob, forward": ("forward, plain", "combine"),
    "logprob and entropy, forward and backward (recomputing)": (
        "forward, entropy", "combine", "dlogits", "products dH and dW (cuBLAS)",
    ),
    "loss, forward and backward (single pass)": (
        "keep", "dlogits in place", "products dH and dW of the kept form (cuBLAS)",
    ),
}  # fmt: skip
