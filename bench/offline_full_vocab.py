"""Variants of the full-vocabulary mixture kernels for the offline compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from offline_head import prefix
from offline_spec import Spec
from tcopd_kernels._triton_common import compile_options, launch_options
from tcopd_kernels._triton_full_vocab import tile_for
from tcopd_kernels._triton_mixture import (
    MAX_FROZEN,
    mixture_combine_kernel,
    mixture_dlogits_kernel,
    mixture_forward_kernel,
)
from tcopd_kernels._triton_tiles import Tile

ROWS = (16, 64, 8192)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD = ("hidden", "weight", "bias", "D", "hidden_stride", "weight_stride", "softcap")
FP32_SCALARS = ("inv_temperature",)
INTEGERS = (
    "N", "V", "D", "hidden_stride", "weight_stride", "dlogits_stride", "chunk_start", "chunk_end", "num_splits",
    "tiles_per_split",
)  # fmt: skip


def specs(archs: list[int | str]) -> Iterator[Spec]:
    """Two teachers with a reference, and the fewest and most models; fp32 and heads with everything are not hot."""
    for arch in archs:
        variants = {spec.name: spec for kernel in ("forward", "dlogits") for spec in kernel_specs(kernel, arch)}
        yield from variants.values()
        yield combine_spec(arch)


def kernel_specs(kernel: str, arch: int | str) -> Iterator[Spec]:
    """Variants of one kernel; the same tile may serve several numbers of rows."""
    own_path = isinstance(arch, int) and arch >= 90
    for rows, compact in itertools.product(ROWS, (False, True)):
        yield mixture_spec(kernel, arch, "bf16", 3, rows, own_path, compact=compact)
    yield mixture_spec(kernel, arch, "bf16", 1, ROWS[-1], own_path)
    yield mixture_spec(kernel, arch, "bf16", MAX_FROZEN, ROWS[-1], own_path, compact=True)
    yield mixture_spec(kernel, arch, "fp16", 3, ROWS[-1], own_path)
    yield mixture_spec(kernel, arch, "fp32", 3, ROWS[-1], own_path, hot=False)
    yield mixture_spec(kernel, arch, "bf16", 3, ROWS[-1], own_path, full_heads=True, hot=False)
    if own_path:
        yield mixture_spec(kernel, arch, "bf16", 3, ROWS[-1], False, hot=False)


def mixture_spec(
    kernel: str,
    arch: int | str,
    dtype: str,
    n_frozen: int,
    rows: int,
    tma: bool,
    *,
    compact: bool = False,
    full_heads: bool = False,
    hot: bool = True,
) -> Spec:
    function = {"forward": mixture_forward_kernel, "dlogits": mixture_dlogits_kernel}[kernel]
    tile = tile_for(kernel, arch, ITEMSIZE[dtype], rows, n_frozen)
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}/w{tile.num_warps}s{tile.num_stages}"
    features = f"j{n_frozen}" + "-compact" * compact + "-full" * full_heads
    name = f"{prefix(arch)}/mixture_{kernel}/{dtype}/{features}/{'tma' if tma else 'ptr'}/{shape}"
    flags = {
        "J": n_frozen,
        "USE_TMA": tma,
        "PRECISION": "ieee",
        "PIN": "ptx" if isinstance(arch, int) else "gcn",
        "HAS_BOUNDS": compact,
        "ROW_SUMS": compact,
    }
    blocks = launch_options(tile) | flags
    constants: dict[str, Any] = {name: value for name, value in blocks.items() if name in function.arg_names}
    if not compact:
        constants |= {name: None for name in ("lse_floor", "bounds", "sum_parts") if name in function.arg_names}
    for argument in function.arg_names:
        field, model = _head_argument(argument)
        absent = model >= n_frozen and field in ("hidden", "weight")
        if absent or (field in ("bias", "softcap") and not (full_heads and model < n_frozen)):
            constants[argument] = None
    signature = {
        argument: "constexpr" if argument in constants else _type_of(argument, dtype, tile, tma)
        for argument in function.arg_names
    }
    return Spec(name, function, arch, signature, constants, compile_options(tile.num_warps, tile.num_stages), hot)


def combine_spec(arch: int | str) -> Spec:
    constants = {"J": 3, "BLOCK": 128}
    signature = {
        argument: "constexpr" if argument in constants else "i32" if argument in INTEGERS else "*fp32"
        for argument in mixture_combine_kernel.arg_names
    }
    name = f"{prefix(arch)}/mixture_combine"
    return Spec(name, mixture_combine_kernel, arch, signature, constants, compile_options(4, 1), hot=True)


def _head_argument(argument: str) -> tuple[str, int]:
    """("weight", 2) for "m2_weight", ("weight", −1) for the student's "weight", ("", −1) for other arguments."""
    model, _, field = argument.partition("_")
    if field in HEAD and model[0] == "m" and model[1:].isdigit():
        return field, int(model[1:])
    return (argument, -1) if argument in HEAD else ("", -1)


def _type_of(argument: str, dtype: str, tile: Tile, tma: bool) -> str:
    field = _head_argument(argument)[0] or argument
    if field in ("hidden", "weight") and tma:
        return f"tensordesc<{dtype}[{tile.block_m if field == 'hidden' else tile.block_n}, {tile.block_k}]>"
    if field in ("hidden", "weight", "bias", "dlogits"):
        return f"*{dtype}"
    if field in INTEGERS:
        return "i32"
    return "fp32" if field in (*FP32_SCALARS, "softcap") else "*fp32"
