"""Variants of the kernels for several models at once for the offline compile: statistics, merge and finalize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from offline_head import ITEMSIZE, ROWS, prefix
from offline_spec import Spec
from tcopd_kernels._triton_common import compile_options, launch_options
from tcopd_kernels._triton_finalize import finalize_kernel, merge_kernel
from tcopd_kernels._triton_multi import TRITON_DTYPES, WIDE_STATE, multi_kernel
from tcopd_kernels._triton_tiles import Tile, candidate_tiles

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
INT64_POINTERS = ("models", "targets", "splits", "roles")
INTEGERS = ("N", "num_models", "num_teachers", "lambda_stride_k", "lambda_stride_n")
NUMBERS = (
    "inv_temperature", "logratio_clamp", "advantage_clamp", "clip_low", "clip_high", "dual_clip", "is_cap",
    "ref_kl_coef",
)  # fmt: skip
FINALIZE_FEATURES = {
    "on_policy": ("HAS_REF",),
    "off_policy": ("HAS_REF", "HAS_OLD", "HAS_ROLLOUT"),
    "full": ("HAS_REF", "HAS_OLD", "HAS_ROLLOUT", "OWN_BASES"),
}
ABSENT_WITHOUT = {"old_logprob": "HAS_OLD", "rollout_logprob": "HAS_ROLLOUT"}
# (splits, rows) of a program: many splits with few tokens, and one split with many.
MERGE_BLOCKS = ((128, 16), (16, 128), (1, 128))


def specs(archs: list[int | str]) -> Iterator[Spec]:
    """Every half-precision tile on its architecture's path; bias, soft-cap and fp32 on the default tile.

    The pointer path is hot where nothing else is; unaligned operands (align 1) are a path for correctness.
    """
    for arch in archs:
        own_path = isinstance(arch, int) and arch >= 90
        for N in ROWS:
            for tile in candidate_tiles(arch, 2, N, WIDE_STATE):
                yield multi_spec(arch, "bf16", "plain", own_path, tile, 8)
        default = candidate_tiles(arch, 2, ROWS[-1], WIDE_STATE)[0]
        yield multi_spec(arch, "fp16", "plain", own_path, default, 8)
        yield multi_spec(arch, "bf16", "full", own_path, default, 8, hot=False)
        yield multi_spec(arch, "bf16", "plain", False, default, 1, hot=False)
        if own_path:
            yield multi_spec(arch, "bf16", "plain", False, default, 8, hot=False)
        yield multi_spec(
            arch, "fp32", "plain", own_path, candidate_tiles(arch, 4, ROWS[-1], WIDE_STATE)[0], 4, hot=False
        )
        yield from small_specs(arch)


def multi_spec(
    arch: int | str, dtype: str, features: str, tma: bool, tile: Tile, align: int, *, hot: bool = True
) -> Spec:
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}/w{tile.num_warps}s{tile.num_stages}"
    name = f"{prefix(arch)}/multi/{dtype}/{features}/{'tma' if tma else 'ptr'}/{shape}/align{align * ITEMSIZE[dtype]}"
    triton_dtype = next(value for key, value in TRITON_DTYPES.items() if str(key) == f"torch.{TORCH_NAMES[dtype]}")
    constants = launch_options(tile) | {
        "DTYPE": triton_dtype, "ALIGN": align, "ANY_BIAS": features == "full", "ANY_SOFTCAP": features == "full",
        "USE_TMA": tma, "PRECISION": "ieee",
    }  # fmt: skip
    return _spec(name, multi_kernel, arch, constants, compile_options(tile.num_warps, tile.num_stages), hot)


def small_specs(arch: int | str) -> Iterator[Spec]:
    options = compile_options(4, 1)
    for block_splits, block in MERGE_BLOCKS:
        blocks = {"BLOCK_SPLITS": block_splits, "BLOCK": block}
        yield _spec(f"{prefix(arch)}/merge/{block_splits}x{block}", merge_kernel, arch, blocks, options, True)
        for features, flags in FINALIZE_FEATURES.items():
            switches = {flag: flag in flags for flag in ("HAS_REF", "OWN_BASES", "HAS_OLD", "HAS_ROLLOUT")}
            absent = {argument: None for argument, flag in ABSENT_WITHOUT.items() if flag not in flags}
            name = f"{prefix(arch)}/finalize/{features}/{block_splits}x{block}"
            constants = blocks | switches | absent | {"NORMALIZER": "active"}
            yield _spec(name, finalize_kernel, arch, constants, options, features != "full")


def _spec(
    name: str, kernel: Any, arch: int | str, constants: dict[str, Any], options: dict[str, Any], hot: bool
) -> Spec:
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {
        argument: "constexpr" if argument in constants else _type_of(argument) for argument in kernel.arg_names
    }
    return Spec(name, kernel, arch, signature, constants, options, hot)


def _type_of(argument: str) -> str:
    if argument in INT64_POINTERS:
        return "*i64"
    if argument in INTEGERS:
        return "i32"
    return "fp32" if argument in NUMBERS else "*fp32"
