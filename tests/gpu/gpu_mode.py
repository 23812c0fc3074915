"""Where the tests of this folder run: at full size on a CUDA GPU, or as a rehearsal on a CPU.

    python -m pytest tests/gpu                        needs a GPU; all tests are skipped without one
    TRITON_INTERPRET=1 python -m pytest tests/gpu     every line at small sizes, kernels under Triton's interpreter

The variable has to be there before Triton is imported, so pytest cannot set it. In a rehearsal float16 takes the place
of bfloat16, which the interpreter multiplies wrongly, and what only a GPU has (streams, memory counters, TMA) is stood
in for by conftest.py.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch

T = TypeVar("T")

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
HALF = torch.float16 if REHEARSAL else torch.bfloat16
HALVES = [HALF] if REHEARSAL else [HALF, torch.float16]
DTYPES = [*HALVES, torch.float32]
# Relative error of a gradient: twice the rounding of its dtype.
GRAD_LIMIT = {torch.float32: 5e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def sized(full: T, small: T) -> T:
    """`full` on a GPU, `small` in a rehearsal."""
    return small if REHEARSAL else full
