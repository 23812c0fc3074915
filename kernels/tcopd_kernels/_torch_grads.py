"""Accumulation of a linear head's gradients from tiles of dlogits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ._checks import accumulation_dtype
from ._torch import add_matmul_, gemm_dtype

# Gradients of hidden [N, D], weight [V, D] and bias [V].
Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Needs(NamedTuple):
    """Which gradients of the head are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Needs:
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)))


class HeadGradients:
    """fp32 (float64) accumulators for the gradients of hidden [N,D], weight [V,D] and bias [V]."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needs: Needs) -> None:
        acc = accumulation_dtype(hidden.dtype)
        self.operand = gemm_dtype(hidden)
        self.head = weight
        self.hidden = hidden.new_zeros(hidden.shape, dtype=acc) if needs.hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=acc) if needs.weight else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=acc) if needs.bias else None

    def add(
        self,
        rows: slice | torch.Tensor,
        h: torch.Tensor,
        dlogits: Iterable[tuple[slice | torch.Tensor, torch.Tensor]],
    ) -> None:
        """Adds the gradients of `rows`, whose hidden states are h [n, D], from tiles (columns, dz [n, columns]).

        Rows and columns that are given by indices must be distinct.
        """
        local = None if self.hidden is None else self.hidden.new_zeros(h.shape)
        for cols, dz in dlogits:
            if self.bias is not None:
                self.bias[cols] += dz.sum(0)
            dz = dz.to(self.operand)
            if local is not None:
                add_matmul_(local, dz, self.head[cols].to(self.operand))
            if self.weight is None:
                continue
            if isinstance(cols, slice):
                add_matmul_(self.weight[cols], dz.T, h)
            else:
                part = self.weight.new_empty(dz.shape[1], h.shape[1])
                add_matmul_(part, dz.T, h, fresh=True)
                self.weight.index_add_(0, cols, part)
        if self.hidden is not None and local is not None:
            self.hidden[rows] += local

    def finish(self, scale: torch.Tensor | None) -> Grads:
        """The gradients times `scale`, those of hidden and weight in bf16 for a bf16 head.

        Those of an fp16 head stay fp32, because the caller's loss scale arrives only in the backward.
        """
        acc = accumulation_dtype(self.head.dtype)
        hidden, weight, bias = scaled_grads((self.hidden, self.weight, self.bias), scale, acc)
        if self.head.dtype != torch.bfloat16:
            return hidden, weight, bias
        hidden, weight, _ = scaled_grads((hidden, weight, None), None, torch.bfloat16)
        return hidden, weight, bias


def scaled_grads(grads: Grads, scale: torch.Tensor | None, dtype: torch.dtype) -> Grads:
    """The gradients times `scale` (None: 1), multiplied in fp32 or wider, in `dtype`."""

    def scaled(grad: torch.Tensor | None) -> torch.Tensor | None:
        if grad is None or scale is None:
            return None if grad is None else grad.to(dtype)
        return (grad.to(accumulation_dtype(grad.dtype)) * scale).to(dtype)

    hidden, weight, bias = grads
    return scaled(hidden), scaled(weight), scaled(bias)
