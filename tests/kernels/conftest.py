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
