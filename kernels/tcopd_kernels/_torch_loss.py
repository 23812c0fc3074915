"""Losses of a linear head with their gradients in a single pass: the logits of a row chunk are kept until its
upstream gradient is known, so they are multiplied once, not recomputed (3 GEMMs in place of 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tcopd_kernels._checks import accumulation_dtype
from tcopd_kernels._torch import (
    WORKSPACE_BYTES,
    OnlineSoftmax,
    Upstream,
    add_matmul_,
    gemm_dtype,
    logits,
    slices,
    tile_elements,
)
from tcopd_kernels.policy_loss import merge_metrics

# Bound of the kept [rows, V] logits. A weight-gradient GEMM reads and writes all of dW once per row chunk, so
# an accelerator needs about a thousand rows per chunk to be bound by arithmetic; on a CPU a hundred are enough.
CPU_CHUNK_BYTES = WORKSPACE_BYTES
ACCELERATOR_CHUNK_BYTES = 512 * 2**20

# (rows, logprob [n]) -> (loss, metrics, d loss / d logprob [n])
TokenLoss = Callable[[slice, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]

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


class LossPass(NamedTuple):
    """Loss 0-dim, metrics, logprob, lse, entropy [N], and the gradients of hidden, weight, bias."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    grads: Grads


class HeadGradients:
    """fp32 (float64) accumulators for the gradients of hidden [N,D], weight [V,D] and bias [V]."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needs: Needs) -> None:
        acc = accumulation_dtype(hidden.dtype)
        self.operand = gemm_dtype(hidden)
        self.head = weight
        self.hidden = hidden.new_zeros(hidden.shape, dtype=acc) if needs.hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=acc) if needs.weight else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=acc) if needs.bias else None

    def add(self, rows: slice | torch.Tensor, h: torch.Tensor, dlogits: Iterable[tuple[slice, torch.Tensor]]) -> None:
        """Adds the gradients of `rows`, whose hidden states are h [n, D], from tiles (cols, dz [n, cols])."""
        local = None if self.hidden is None else self.hidden.new_zeros(h.shape)
        for cols, dz in dlogits:
            if self.bias is not None:
                self.bias[cols] += dz.sum(0)
            dz = dz.to(self.operand)
            if local is not None:
                add_matmul_(local, dz, self.head[cols].to(self.operand))
            if self.weight is not None:
                add_matmul_(self.weight[cols], dz.T, h)
        if self.hidden is not None and local is not None:
            self.hidden[rows] = local

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


def single_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    needs: Needs,
    scale: torch.Tensor | None,
) -> LossPass:
    """hidden [N,D], weight [V,D], targets [N] int64 in [0,V).

    The upstream gradient is divided by `scale` (None: 1) before the gradient GEMMs, their results multiplied by it.
    """
    grads = HeadGradients(hidden, weight, needs)
    n_rows, vocab = hidden.shape[0], weight.shape[0]
    rows_per_chunk, cols_per_tile = chunk_shape(hidden, vocab, buffers=1)
    buffer = hidden.new_empty((rows_per_chunk, vocab), dtype=accumulation_dtype(hidden.dtype))
    parts = []
    for rows in slices(n_rows, rows_per_chunk) if n_rows else [slice(0, 0)]:
        h, y = hidden[rows].to(grads.operand), targets[rows]
        z = buffer[: len(h)]
        softmax = OnlineSoftmax(y, z.dtype, entropy)
        if len(h):
            for cols in slices(vocab, cols_per_tile):
                z[:, cols] = logits(h, weight[cols].to(grads.operand), bias, cols, temperature, softcap)
                softmax.update(z[:, cols], cols)
        stats = softmax.finish()
        loss, metrics, dlogprob = token_loss(rows, stats[0])
        parts.append((loss, metrics, stats))
        active = dlogprob.nonzero().squeeze(1)
        if len(active) == 0:
            continue
        lse = stats[1]
        where: slice | torch.Tensor = rows
        if len(active) < len(h):
            h, z, y, lse, dlogprob = h[active], z[active], y[active], lse[active], dlogprob[active]
            where = active + rows.start
        dlogprob = dlogprob if scale is None else dlogprob / scale
        upstream = Upstream(y, lse, None, dlogprob, torch.zeros_like(lse), None)
        grads.add(where, h, _dlogits_tiles(z, upstream, cols_per_tile, temperature, softcap))
    losses, metrics_parts, stats_parts = zip(*parts, strict=True)
    logprobs, lses, entropies = zip(*stats_parts, strict=True)
    return LossPass(
        torch.stack(losses).sum(),
        merge_metrics(list(metrics_parts)),
        torch.cat(logprobs),
        torch.cat(lses),
        torch.cat(entropies) if entropy else None,
        grads.finish(scale),
    )


def _dlogits_tiles(
    z: torch.Tensor, upstream: Upstream, cols_per_tile: int, temperature: float, softcap: float | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    for cols in slices(z.shape[1], cols_per_tile):
        yield cols, upstream.dlogits_(z[:, cols], cols, temperature, softcap)


def chunk_shape(hidden: torch.Tensor, vocab: int, *, buffers: int) -> tuple[int, int]:
    """(rows per chunk, columns per tile) when `buffers` [rows, V] buffers share the chunk bound."""
    acc = accumulation_dtype(hidden.dtype)
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    n_rows, dim = max(hidden.shape[0], 1), max(hidden.shape[1], 1)
    limit = max(1, min(n_rows, budget // (acc.itemsize * vocab * buffers)))
    n_chunks = -(-n_rows // limit)
    rows = -(-n_rows // n_chunks)
    cols = tile_elements(acc) // rows
    if gemm_dtype(hidden) != hidden.dtype:
        cols = min(cols, tile_elements(acc) // dim)
    return rows, max(1, min(vocab, cols))


def half_precision_scale(dtype: torch.dtype, weights: torch.Tensor) -> torch.Tensor | None:
    """Size of the upstream gradients for fp16, whose range would not hold 1/token_count; None for other dtypes.

    Dividing by it makes a single token's weight at most 1 and the sum of all weights at most 256.
    """
    if dtype != torch.float16 or len(weights) == 0:
        return None
    magnitude = weights.abs().float()
    return torch.maximum(magnitude.amax(), magnitude.sum() / 256).clamp_min(torch.finfo(torch.float32).tiny)


class AttachGradients(torch.autograd.Function):
    """Gives a finished loss its known gradients; they are scaled out of place, so backward may run twice.

    apply(loss, (grad_1, …), input_1, …) -> loss, with d loss / d input_i = grad_i (None for none).
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        grads: tuple[torch.Tensor | None, ...],
        *inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(None if g is None else (g * grad_loss).to(dtype) for g, dtype in grads)
