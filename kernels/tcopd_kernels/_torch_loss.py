"""Losses of a linear head with their gradients in a single pass: the logits of a row chunk are kept until its
upstream gradient is known, so they are multiplied once, not recomputed (3 GEMMs in place of 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tcopd_kernels._checks import accumulation_dtype
from tcopd_kernels._torch import (
    WORKSPACE_BYTES,
    OnlineSoftmax,
    SoftmaxTile,
    Upstream,
    gemm_dtype,
    logits,
    slices,
    tile_shape,
    tile_view,
)
from tcopd_kernels._torch_grads import Grads, HeadGradients, Needs
from tcopd_kernels.policy_loss import merge_metrics

# Bound of the kept [rows, V] logits. A weight-gradient GEMM reads and writes all of dW once per row chunk, so
# an accelerator needs about a thousand rows per chunk to be bound by arithmetic; on a CPU a hundred are enough.
CPU_CHUNK_BYTES = WORKSPACE_BYTES
ACCELERATOR_CHUNK_BYTES = 512 * 2**20

# (rows, logprob [n]) -> (loss, metrics, d loss / d logprob [n])
TokenLoss = Callable[[slice, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]]


class LossPass(NamedTuple):
    """Loss 0-dim, metrics, logprob, lse, entropy [N], and the gradients of hidden, weight, bias."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    grads: Grads


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
    acc = accumulation_dtype(hidden.dtype)
    buffer = hidden.new_empty(rows_per_chunk * vocab, dtype=acc)
    scratch = hidden.new_empty(rows_per_chunk * cols_per_tile, dtype=acc)
    head = (bias, temperature, softcap)
    parts = []
    for rows in slices(n_rows, rows_per_chunk) if n_rows else [slice(0, 0)]:
        h, y = hidden[rows].to(grads.operand), targets[rows]
        chunk = Chunk(h, y, weight, buffer, scratch, head, cols_per_tile, entropy)
        loss, metrics, dlogprob = token_loss(rows, chunk.stats[0])
        parts.append((loss, metrics, chunk.stats))
        active = dlogprob.nonzero().squeeze(1)
        if len(active) == 0:
            continue
        upstream = Upstream(
            y, chunk.stats[1], None, dlogprob if scale is None else dlogprob / scale, torch.zeros_like(dlogprob), None
        )
        grads.add(active + rows.start, *chunk.dlogits(active, upstream))
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


class Chunk:
    """The probabilities of a chunk of n rows over the whole vocabulary, kept tile by tile, each [n, columns].

    A tile is kept as its own softmax; its share of the row's mass is known when all tiles are.
    """

    def __init__(
        self,
        h: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        buffer: torch.Tensor,
        scratch: torch.Tensor,
        head: tuple[torch.Tensor | None, float, float | None],
        cols_per_tile: int,
        entropy: bool,
    ) -> None:
        self.h, self.width = h, cols_per_tile
        self.options = head[1:]
        n, vocab = len(h), weight.shape[0]
        softmax = OnlineSoftmax(targets, buffer.dtype, entropy)
        tiles: list[SoftmaxTile] = []
        self.cols = list(slices(vocab, cols_per_tile)) if n else []
        for cols in self.cols:
            width = cols.stop - cols.start
            z = logits(h, weight[cols].to(h.dtype), head[0], cols, *head[1:], tile_view(scratch, n, width))
            tiles.append(softmax.update(z, cols, tile_view(buffer[n * cols.start :], n, width)))
        self.stats = softmax.finish()
        self.p = [tile.p for tile in tiles]
        self.shares = [tile.share(self.stats[1]) for tile in tiles]

    def dlogits(
        self, places: torch.Tensor, upstream: Upstream
    ) -> tuple[torch.Tensor, Iterator[tuple[slice, torch.Tensor]]]:
        """Hidden states and dlogits of the rows at `places`, over the whole vocabulary; overwrites the tiles."""
        part = upstream if len(places) == len(self.h) else upstream[places]
        tiles = (
            (cols, part.from_probabilities_(self._rows(p, places), cols, *self.options, self._rows(share, places)))
            for cols, p, share in zip(self.cols, self.p, self.shares, strict=True)
        )
        return self._rows(self.h, places), tiles

    def _rows(self, tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return tensor if len(places) == len(self.h) else tensor[places]


def chunk_shape(hidden: torch.Tensor, vocab: int, *, buffers: int) -> tuple[int, int]:
    """(rows per chunk, columns per tile) when `buffers` [rows, V] buffers share the chunk bound."""
    acc = accumulation_dtype(hidden.dtype)
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    n_rows, dim = max(hidden.shape[0], 1), max(hidden.shape[1], 1)
    limit = max(1, min(n_rows, budget // (acc.itemsize * vocab * buffers)))
    n_chunks = -(-n_rows // limit)
    rows = -(-n_rows // n_chunks)
    _, cols = tile_shape(rows, vocab, dim if gemm_dtype(hidden) != hidden.dtype else 1, acc, hidden.device)
    return rows, cols


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
