from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_mode import REHEARSAL


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker("gpu")
        if REHEARSAL:
            # numpy warns about the products with infinity that the kernels select away.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        elif not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_tf32_and_no_cached_tiles(monkeypatch, tmp_path_factory):
    """fp32 products as such, and tiles chosen on this machine in this run."""
    monkeypatch.setenv("TCOPD_KERNELS_CACHE", str(tmp_path_factory.getbasetemp()))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    # Not by monkeypatch: undoing deletes the attribute, which this module's attributes do not support.
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def memory_given_back():
    """Several workers share one GPU: what a test no longer holds is for the others to take."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def bounds_in_proportion(monkeypatch):
    """In a rehearsal few rows share a bound of a column's probability, and one program walks the whole vocabulary: at
    such sizes a part of it holds too little to bound anything by."""
    if not REHEARSAL:
        return
    from tcopd_kernels import _triton_compact, _triton_forward, _triton_full_vocab

    monkeypatch.setattr(_triton_forward, "BOUND_ROWS", 16)
    monkeypatch.setattr(_triton_compact, "MOST_ROWS", 16)
    monkeypatch.setattr(_triton_compact, "LEAST_ROWS", 1)
    for module in (_triton_forward, _triton_full_vocab):
        monkeypatch.setattr(module, "vocab_splits", lambda row_blocks, tiles, processors: (1, tiles))


class OnHopper:
    """A CPU tensor as `tma_usable` sees one on a GPU."""

    is_cuda = True

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


if REHEARSAL:

    @pytest.fixture(scope="session")
    def products_as_on_a_gpu():
        """fp32 results of half-precision matrices, which torch has for CUDA alone."""

        def mm(a, b, out_dtype):
            return a.to(out_dtype) @ b.to(out_dtype)

        def addmm_out(base, a, b, out_dtype, *, beta=1, alpha=1, out):
            assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == out_dtype
            return out.copy_(base).addmm_(a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha)

        aten = torch.library.Library("aten", "IMPL")
        aten.impl("mm.dtype", mm, "CPU")
        aten.impl("addmm.dtype_out", addmm_out, "CPU")
        yield
        aten._destroy()

    @pytest.fixture(autouse=True)
    def stand_ins(monkeypatch, products_as_on_a_gpu):
        """What only a GPU has: counters that stay at 0, one stream, and TMA where a Hopper GPU would use it."""
        from tcopd_kernels import (
            _torch,
            _triton_backward,
            _triton_common,
            _triton_forward,
            _triton_full_vocab,
            _triton_loss,
            _triton_multi,
        )

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "_sleep": lambda cycles: None,
            "current_stream": lambda device=None: stream,
            "empty_cache": lambda: None,
            "get_device_capability": lambda device=None: (9, 0),
            "max_memory_allocated": lambda device=None: 0,
            "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
            "memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "set_sync_debug_mode": lambda mode: None,
            "stream": nullcontext,
            "Stream": lambda device=None: stream,
            "synchronize": lambda device=None: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        usable = _triton_common.tma_usable
        for module in (_triton_backward, _triton_forward, _triton_full_vocab, _triton_loss, _triton_multi):
            monkeypatch.setattr(module, "tma_usable", lambda *matrices: usable(*map(OnHopper, matrices)))
        monkeypatch.setattr(_torch, "_half_gemm_has_fp32_result", lambda tensor: tensor.dtype.itemsize == 2)
