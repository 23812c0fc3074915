"""Variants of the single-pass loss kernels for the offline compile: keep (forward) and in-place dlogits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from offline_spec import Spec
from tcopd_kernels._triton_common import compile_options, launch_options
from tcopd_kernels._triton_loss import (
    DLOGITS_COLUMNS,
    DLOGITS_ROWS,
    LEAST_SHARED_TILE,
    dlogits_kernel,
    keep_kernel,
    keep_tiles,
)
from tcopd_kernels._triton_tiles import Tile

ROWS = (16, 64, 8192)
INTEGERS = ("N", "V", "D", "n_active", "hidden_stride", "weight_stride", "kept_stride", "num_splits", "tiles_per_split")
SCALARS = ("inv_temperature", "softcap", "keep_scale", "bias_scale")
POINTERS_TO = {"targets": "*i64", "active": "*i64"}


def specs(archs: list[int | str]) -> Iterator[Spec]:
    """Hot: half precision, with and without the entropy, on the architecture's own load path."""
    for arch in archs:
        own_path = isinstance(arch, int) and arch >= 90
        tiles = [tile for N in ROWS for tile in keep_tiles(arch, 2, N)]
        tiles += [LEAST_SHARED_TILE] * own_path
        for tile, entropy in itertools.product(dict.fromkeys(tiles), (False, True)):
            yield keep_spec(arch, "bf16", tile, own_path, entropy=entropy)
        default = keep_tiles(arch, 2, ROWS[-1])[0]
        yield keep_spec(arch, "fp16", default, own_path, entropy=True)
        yield keep_spec(arch, "bf16", default, own_path, entropy=True, bias_and_softcap=True, hot=False)
        if own_path:
            yield keep_spec(arch, "bf16", default, False, entropy=True, hot=False)
        yield keep_spec(arch, "fp32", keep_tiles(arch, 4, ROWS[-1])[0], own_path, entropy=True, hot=False)
        for dtype, some_rows, bias_grad in itertools.product(("bf16", "fp32"), (False, True), (False, True)):
            yield dlogits_spec(arch, dtype, some_rows, bias_grad)


def keep_spec(
    arch: int | str,
    dtype: str,
    tile: Tile,
    tma: bool,
    *,
    entropy: bool,
    bias_and_softcap: bool = False,
    hot: bool = True,
) -> Spec:
    constants: dict[str, Any] = {
        "HAS_BIAS": bias_and_softcap, "HAS_SOFTCAP": bias_and_softcap, "HAS_ENTROPY": entropy,
        "USE_TMA": tma, "PRECISION": "ieee", **launch_options(tile),
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in keep_kernel.arg_names}
    constants |= {} if bias_and_softcap else {"bias": None}
    constants |= {} if entropy else {"split_dot": None}
    types = {name: f"*{dtype}" for name in ("hidden", "weight", "bias", "kept")}
    if tma:
        types["kept"] = f"tensordesc<{dtype}[{tile.block_m}, {tile.block_n}]>"
        types["hidden"] = f"tensordesc<{dtype}[{tile.block_m}, {tile.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.block_n}, {tile.block_k}]>"
    features = "+".join(["entropy"] * entropy + ["bias+softcap"] * bias_and_softcap) or "plain"
    name = (
        f"{prefix(arch)}/keep/{dtype}/{features}/{'tma' if tma else 'ptr'}/"
        f"{tile.block_m}x{tile.block_n}x{tile.block_k}/w{tile.num_warps}s{tile.num_stages}"
    )
    options = compile_options(tile.num_warps, tile.num_stages)
    return Spec(name, keep_kernel, arch, signature(keep_kernel, constants, types), constants, options, hot)


def dlogits_spec(arch: int | str, dtype: str, some_rows: bool, bias_grad: bool) -> Spec:
    constants: dict[str, Any] = {
        "TILE": 128, "SOME_ROWS": some_rows, "BIAS_GRAD": bias_grad,
        "BLOCK_M": DLOGITS_ROWS, "BLOCK_N": DLOGITS_COLUMNS,
    }  # fmt: skip
    constants |= {} if some_rows else {"active": None}
    constants |= {} if bias_grad else {"grad_bias": None}
    parts = [dtype, "some_rows" if some_rows else "all_rows"] + ["bias"] * bias_grad
    name = f"{prefix(arch)}/dlogits_in_place/{'/'.join(parts)}"
    types = signature(dlogits_kernel, constants, {"kept": f"*{dtype}"})
    return Spec(name, dlogits_kernel, arch, types, constants, compile_options(4, 1), hot=dtype == "bf16")


def signature(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, str]:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        return "fp32" if name in SCALARS else types.get(name, POINTERS_TO.get(name, "*fp32"))

    return {name: type_of(name) for name in kernel.arg_names}


def prefix(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch
