"""Choice of the implementation behind the public functions."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "reference")


def resolve_backend(backend: str, tensor: torch.Tensor, *, triton_kernel: bool = True) -> str:
    """Turns "auto" into "triton" or "torch", and refuses a backend that cannot run on `tensor`.

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
        return f"the tensors are on {tensor.device}, and Triton needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if tensor.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(tensor.device) < (8, 0)):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


def load_backend(name: str) -> Any:
    """Object with `forward` and `backward`; Triton is imported on its first use only."""
    if name == "torch":
        return importlib.import_module("tcopd_kernels._torch")
    return SimpleNamespace(
        forward=importlib.import_module("tcopd_kernels._triton_forward").forward,
        backward=importlib.import_module("tcopd_kernels._triton_backward").backward,
    )


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """The kernels fix their own precision, so an outer autocast region must not change their GEMMs."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
