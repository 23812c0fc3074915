"""Choice of the implementation behind the public functions."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
# AMD GPUs that the Triton kernels are compiled for, offline only: none has run on such a GPU yet.
AMD_ARCHS = ("gfx90a", "gfx942")
# Looked up here, because torch.compile of torch 2.11 cannot trace the call.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_MODULES = {"torch": "._torch", "triton": "._triton_forward"}
_ELSEWHERE = {
    ("torch", "compact_backward"): ("._torch_compact", "backward"),
    ("triton", "backward"): ("._triton_backward", "backward"),
    ("triton", "compact_backward"): ("._triton_compact", "backward"),
}


def resolve_backend(backend: str, tensor: torch.Tensor, *, triton_kernel: bool = True) -> str:
    """Turns "auto" into "triton" or "torch", and refuses a backend that cannot run on `tensor`.

    The Triton kernels take NVIDIA GPUs from compute capability 8.0 and the AMD GPUs of AMD_ARCHS.

    Raises ValueError for an unknown name or a combination of device and dtype without an implementation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("torch", "reference"):
        return backend
    obstacle = _triton_obstacle(tensor) if triton_kernel else "this function has no Triton kernel"
    if backend == "auto":
        return "torch" if obstacle or not tensor.is_cuda else "triton"
    if obstacle:
        raise ValueError(f"backend='triton' is not possible here: {obstacle}; use backend='auto' or 'torch'")
    return "triton"


def _triton_obstacle(tensor: torch.Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "the Triton kernels do not take float64"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}, and Triton needs a GPU"
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    return gpu_obstacle(tensor.device) if tensor.is_cuda else None


def gpu_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this GPU, or None."""
    if torch.version.hip:
        arch = amd_arch(device)
        return None if arch in AMD_ARCHS else f"the Triton kernels are built for {', '.join(AMD_ARCHS)}, not {arch}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


def amd_arch(device: torch.device) -> str:
    """The architecture of an AMD GPU without its feature flags, as "gfx942"."""
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


class Backend:
    """The functions of one implementation of a linear head, looked up in their modules when they are used.

    BOUND_ROWS, new_bounds(n_rows, weight): rows that share a column bound; storage for the bounds.
    partials(hidden, weight, targets, ...), finish(partials): softmax statistics, and logprob, lse, entropy of them.
    forward(...): finish(partials(...)).   backward(...): exact gradients.
    compact_backward(...): gradients over the columns that hold all but `grad_tol` of each row's mass.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Any:
        module, attribute = _ELSEWHERE.get((self.name, function), (_MODULES[self.name], function))
        return getattr(importlib.import_module(module, __package__), attribute)


def load_backend(name: str) -> Backend:
    """The implementation called "torch" or "triton"; Triton is imported on its first use only."""
    return Backend(name)


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """The kernels fix their own precision, so an outer autocast region must not change their GEMMs."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
