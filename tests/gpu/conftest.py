from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_tf32_and_no_cached_tiles(monkeypatch, tmp_path_factory):
    """fp32 products as such, and tiles chosen on this machine in this run."""
    monkeypatch.setenv("TCOPD_KERNELS_CACHE", str(tmp_path_factory.getbasetemp()))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    # Not by monkeypatch: undoing deletes the attribute, which this module's attributes do not support.
    torch.backends.cuda.matmul.fp32_precision = before
