"""What the offline compile needs to know about one variant of a Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One variant: kernel (a triton.jit function), target and arguments.

    name: unique, as "sm_90/forward/bf16/plain/tma/128x128x64/w8s4".
    arch: 80, 90 or 100 for NVIDIA; "gfx942" and the like for AMD.
    signature: argument -> Triton type ("*bf16", "i32", "tensordesc<bf16[128, 64]>", "constexpr").
    constants: values of the constexpr arguments, None for pointers that are absent.
    options: num_warps, num_stages and the like.
    hot: whether a default call runs this variant; hot variants must not spill registers.
    """

    name: str
    kernel: Any
    arch: int | str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    hot: bool
