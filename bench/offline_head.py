"""Variants of the single head's kernels for the offline compile: forward, dlogits and the small ones around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from offline_spec import Spec
from tcopd_kernels._triton_backward import dlogits_kernel
from tcopd_kernels._triton_common import compile_options, launch_options, loop_options
from tcopd_kernels._triton_forward import combine_kernel, finish_kernel, forward_kernel, target_logit_kernel
from tcopd_kernels._triton_tiles import Tile, candidate_tiles, dlogits_tiles, forward_tiles

KERNELS = {"forward": forward_kernel, "dlogits": dlogits_kernel}
TILES = {"forward": forward_tiles, "dlogits": dlogits_tiles}
ROWS = (16, 64, 8192)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32_VECTORS = (
    "lse", "g", "c_1", "c_2", "bias_parts", "mass_parts", "split_max", "split_sum", "split_dot", "target_logit",
    "lse_floor", "bounds", "row_max", "row_sum", "row_dot", "logprob", "entropy",
)  # fmt: skip
SIZES = ("N", "V", "D")
FP32_SCALARS = ("inv_temperature", "softcap", "scale")
# What each feature switches on, beside the kernel itself.
FLAGS = {
    "plain": (),
    "entropy": ("HAS_ENTROPY",),
    "compact": ("HAS_BOUNDS", "ROW_MASS"),  # the forward's and the backward's side of vocabulary compaction
    "full": ("HAS_ENTROPY", "HAS_BIAS", "HAS_SOFTCAP", "BIAS_GRAD", "HAS_BOUNDS", "ROW_MASS"),
}
HOT_FEATURES = ("plain", "entropy", "compact")
ABSENT_WITHOUT = {
    "bias": "HAS_BIAS", "bias_parts": "BIAS_GRAD", "mass_parts": "ROW_MASS", "c_2": "HAS_ENTROPY",
    "split_dot": "HAS_ENTROPY", "row_dot": "HAS_ENTROPY", "entropy": "HAS_ENTROPY",
    "lse_floor": "HAS_BOUNDS", "bounds": "HAS_BOUNDS",
}  # fmt: skip


def specs(archs: list[int | str]) -> Iterator[Spec]:
    """Every half-precision tile with every hot feature on its architecture's path; the rest on default tiles.

    fp32 is a path for correctness, so its variants are not hot.
    """
    for arch, kernel in itertools.product(archs, KERNELS):
        own_path = isinstance(arch, int) and arch >= 90
        for features, N in itertools.product(HOT_FEATURES, ROWS):
            for tile in TILES[kernel](arch, 2, N, features == "entropy", features == "compact"):
                yield head_spec(kernel, arch, "bf16", features, own_path, tile)
        default = candidate_tiles(arch, 2, ROWS[-1], True)[0]
        yield head_spec(kernel, arch, "bf16", "full", own_path, default, hot=False)
        yield head_spec(kernel, arch, "fp16", "plain", own_path, default)
        if own_path:
            yield head_spec(kernel, arch, "bf16", "plain", False, default, hot=False)
        for tile in candidate_tiles(arch, 4, ROWS[-1], False):
            yield head_spec(kernel, arch, "fp32", "plain", own_path, tile, hot=False)
    for arch in archs:
        yield from small_specs(arch)


def head_spec(
    kernel: str, arch: int | str, dtype: str, features: str, tma: bool, tile: Tile, *, hot: bool = True
) -> Spec:
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}/w{tile.num_warps}s{tile.num_stages}"
    form = "flat" * tile.flatten + "ws" * tile.warp_specialize
    name = f"{prefix(arch)}/{kernel}/{dtype}/{features}/{'tma' if tma else 'ptr'}/{shape}{form}"
    blocks = launch_options(tile) | loop_options(tile) | {"USE_TMA": tma, "PRECISION": "ieee"}
    options = compile_options(tile.num_warps, tile.num_stages)
    return spec_of(name, KERNELS[kernel], arch, dtype, FLAGS[features], blocks, options, hot=hot)


def small_specs(arch: int | str) -> Iterator[Spec]:
    for name, kernel in {"combine": combine_kernel, "finish": finish_kernel, "target": target_logit_kernel}.items():
        blocks = {"BLOCK": 128} if kernel is not target_logit_kernel else {"BLOCK_M": 4, "BLOCK_K": 512}
        flags, options = ("HAS_ENTROPY", "HAS_BOUNDS"), compile_options(4, 1)
        yield spec_of(f"{prefix(arch)}/{name}", kernel, arch, "bf16", flags, blocks, options, hot=True)


def spec_of(
    name: str,
    kernel: Any,
    arch: int | str,
    dtype: str,
    flags: tuple[str, ...],
    blocks: dict[str, Any],
    options: dict[str, Any],
    *,
    hot: bool,
) -> Spec:
    """flags: the constexpr switches that are on; blocks: the other constexprs, and more than the kernel has."""
    given = (*SIZES, *blocks)
    switches = [argument for argument in kernel.arg_names if argument.isupper() and argument not in given]
    constants: dict[str, Any] = {argument: argument in flags for argument in switches}
    constants |= {argument: value for argument, value in blocks.items() if argument in kernel.arg_names}
    constants |= {
        argument: None
        for argument, switch in ABSENT_WITHOUT.items()
        if argument in kernel.arg_names and switch not in flags
    }
    signature = {
        argument: "constexpr" if argument in constants else _type_of(argument, dtype, blocks)
        for argument in kernel.arg_names
    }
    return Spec(name, kernel, arch, signature, constants, options, hot)


def prefix(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def _type_of(argument: str, dtype: str, blocks: dict[str, Any]) -> str:
    if argument in ("hidden", "weight") and blocks.get("USE_TMA"):
        rows = blocks["BLOCK_M" if argument == "hidden" else "BLOCK_N"]
        return f"tensordesc<{dtype}[{rows}, {blocks['BLOCK_K']}]>"
    if argument in ("hidden", "weight", "bias", "dlogits"):
        return f"*{dtype}"
    if argument == "targets":
        return "*i64"
    if argument in FP32_VECTORS:
        return "*fp32"
    return "fp32" if argument in FP32_SCALARS else "i32"
