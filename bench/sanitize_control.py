"""A kernel with a fault that each tool must report: without it, "0 errors" could as well mean that nothing was checked.

It runs last, in a process of its tool: the fault may cost the process its CUDA context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128
FAULTS = {"memcheck": "global", "racecheck": "shared"}


@triton.jit
def control_kernel(out, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """out [BLOCK] int32. FAULT "global": writes one element beyond it. "shared": races for the first word there."""
    lanes = tl.arange(0, BLOCK)
    value = lanes + tl.sum(lanes, axis=0)  # the sum over several warps takes shared memory
    if FAULT == "shared":
        value = tl.inline_asm_elementwise(
            "{ .reg .b32 at; mov.b32 at, global_smem; st.shared.b32 [at], $1; ld.shared.b32 $0, [at]; }",
            "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    if FAULT == "global":
        tl.store(out + lanes + 1, value)
    else:
        tl.store(out + lanes, value)


def run_control(tool: str, device: torch.device) -> None:
    """Commits the fault that the tool is to find; no fault without a tool."""
    out = torch.empty(BLOCK, dtype=torch.int32, device=device)
    control_kernel[(1,)](out, FAULT=FAULTS.get(tool, ""), BLOCK=BLOCK)
