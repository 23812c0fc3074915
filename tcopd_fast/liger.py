"""`model.liger`: Liger's Triton kernels for RMSNorm, RoPE and SwiGLU inside a loaded model; never its losses."""

from __future__ import annotations

import os
from typing import Any

import torch

from tcopd_fast.errors import UserError


def check_liger(path: str, model_type: str) -> None:
    """Refuse, before weights are read, what Liger cannot run. Raises UserError."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.liger=true: model {path}: Liger knows no model of type {model_type}; set model.liger=false"
        )
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("model.liger=true: Liger's kernels need a GPU, and none was found; set model.liger=false")


def apply_liger(model: Any) -> None:
    """Put Liger's kernels into a transformers model.

    Liger replaces classes and functions of the model type's module in transformers as well, so that models of the same
    type that are made later in this process use its kernels, too.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
