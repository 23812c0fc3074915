from __future__ import annotations

import pytest
import torch
from tcopd_kernels import _torch, _torch_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Workspaces so small that every loop over rows and vocabulary runs several times with ragged ends."""
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 1500)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 5000)


@pytest.fixture
def half_operands(monkeypatch):
    """Half-precision GEMM operands with fp32 results, as on a GPU, emulated where torch offers none."""

    def matmul(a, b):
        assert a.dtype == b.dtype
        return a.float() @ b.float() if a.dtype.itemsize == 2 else a @ b

    monkeypatch.setattr(_torch, "_half_gemm_has_fp32_result", lambda tensor: tensor.dtype.itemsize == 2)
    monkeypatch.setattr(_torch, "matmul", matmul)
