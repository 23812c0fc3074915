"""Memory of the logit-free head (tcopd_kernels), as its backends allocate it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from tcopd_kernels._torch_loss import chunk_shape
from torch import Tensor

KEPT_BYTES = 512 << 20
MIN_ROWS, ROW_MULTIPLE = 1024, 128


@dataclass(frozen=True)
class HeadBytes:
    """One call of `linear_tcopd_loss`.

    workspace: bytes freed at its end. accumulator: of dW and dH while they are summed, in bytes per element.
    """

    workspace: int
    accumulator: int


def head_bytes(predicted: int, vocab: int, hidden: int, dtype: torch.dtype, on_cpu: bool) -> HeadBytes:
    """predicted: tokens of the micro-batch that the loss is taken over. The torch backend on a CPU, Triton on a GPU."""
    if on_cpu:
        # One element in memory, whatever the shape says.
        rows, columns = chunk_shape(torch.empty(1, dtype=dtype).expand(predicted, hidden), vocab, buffers=1)
        return HeadBytes(4 * rows * (vocab + columns), 4)
    rows = chunk_rows(predicted, vocab, dtype.itemsize)
    return HeadBytes(min(rows, predicted) * vocab * dtype.itemsize, 4 if predicted > rows else dtype.itemsize)


def chunk_rows(predicted: int, vocab: int, itemsize: int) -> int:
    """Rows whose probabilities the Triton loss keeps at once; to ask the kernels themselves takes Triton."""
    most = max(MIN_ROWS, KEPT_BYTES // (vocab * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    rows = ceil(max(predicted, 1) / max(1, ceil(predicted / most)))
    return ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE


def loss_head(hidden_ND: Tensor, weight_VD: Tensor, head: HeadBytes) -> Tensor:
    """A 0-dim stand-in for the loss that allocates, keeps and frees what `linear_tcopd_loss` does."""
    return _LossHead.apply(hidden_ND, weight_VD, head)


class _LossHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: HeadBytes) -> Tensor:
        summed = torch.float32 if head.accumulator == 4 else weight.dtype
        workspace = hidden.new_empty(head.workspace, dtype=torch.uint8)
        wanted = [tensor for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False) if needed]
        grads = [tensor.new_empty(tensor.shape, dtype=summed) for tensor in wanted]
        del workspace
        ctx.save_for_backward(*[grad.to(weight.dtype) for grad in grads])
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(ctx.saved_tensors)
        return (*(next(grads) if needed else None for needed in ctx.needs_input_grad[:2]), None)
