"""Losses of a linear head with their gradients in a single pass: the probabilities of a row chunk are kept until its
upstream gradient is known, so the logits are multiplied once, not recomputed (3 GEMMs in place of 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from ._checks import accumulation_dtype
from ._rows import take_rows
from ._torch import (
    WORKSPACE_BYTES,
    OnlineSoftmax,
    SoftmaxTile,
    Upstream,
    finish,
    gemm_dtype,
    logits,
    slices,
    tile_shape,
    tile_view,
)
from ._torch_grads import Grads, HeadGradients, Needs
from .policy_loss import merge_metrics
from .types import Partials

# Bound of the kept [rows, V] probabilities. A weight-gradient GEMM reads and writes all of dW once per row chunk, so
# an accelerator needs about a thousand rows per chunk to be bound by arithmetic.
ACCELERATOR_CHUNK_BYTES = 512 * 2**20
# A CPU's GEMMs read and pack the weight once per chunk, so few rows cost time, most of all beside a large head. From
# LARGE_CPU_ROWS on a chunk has at most this share of the rows all the same, so that a call's memory stays about a
# twentieth of the logits.
CPU_CHUNK_BYTES = WORKSPACE_BYTES
CPU_CHUNK_SHARE = 1 / 25
LARGE_CPU_ROWS = 1024
CPU_ROW_MULTIPLE = 4  # of the rows that a CPU's GEMM computes side by side

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


class Chunks(Protocol):
    """A head, or a vocabulary shard of one, walked in row chunks whose probabilities are kept for the gradients."""

    rows_per_chunk: int

    def forward(self, rows: slice) -> Partials:
        """Softmax statistics of the next chunk of n rows."""
        ...

    def backward(self, active: torch.Tensor, dlogprob: torch.Tensor, whole: Partials, logprob: torch.Tensor) -> None:
        """Adds the gradients of the rows `active` of the last chunk, given d loss / d logprob of all n of them.

        whole: statistics of the whole vocabulary.   logprob: [n] of the targets.
        """
        ...

    def gradients(self) -> Grads: ...


def single_pass(
    chunks: Chunks, n_rows: int, token_loss: TokenLoss, merge: Callable[[Partials], Partials] = lambda own: own
) -> LossPass:
    """merge: from the statistics of this shard's columns to those of the whole vocabulary."""
    parts = []
    for rows in slices(n_rows, chunks.rows_per_chunk) if n_rows else [slice(0, 0)]:
        whole = merge(chunks.forward(rows))
        stats = finish(whole)
        loss, metrics, dlogprob = token_loss(rows, stats[0])
        parts.append((loss, metrics, stats))
        active = dlogprob.nonzero().squeeze(1)
        if len(active):
            chunks.backward(active, dlogprob, whole, stats[0])
    losses, metrics_parts, stats_parts = zip(*parts, strict=True)
    logprobs, lses, entropies = zip(*stats_parts, strict=True)
    return LossPass(
        torch.stack(losses).sum(),
        merge_metrics(list(metrics_parts)),
        torch.cat(logprobs),
        torch.cat(lses),
        None if entropies[0] is None else torch.cat(entropies),
        chunks.gradients(),
    )


class TorchChunks:
    """The head of `single_pass` in plain torch: hidden [N,D], weight [V,D], targets [N] int64, on any device.

    A tile is kept as its own softmax; its share of the row's mass is known when all tiles are.
    The upstream gradient is divided by `scale` (None: 1) before the gradient GEMMs, their results multiplied by it.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        needs: Needs,
        scale: torch.Tensor | None,
    ) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.bias, self.options, self.entropy, self.scale = bias, (temperature, softcap), entropy, scale
        self.grads = HeadGradients(hidden, weight, needs)
        vocab, acc = weight.shape[0], accumulation_dtype(hidden.dtype)
        self.rows_per_chunk, self.cols_per_tile = chunk_shape(hidden, vocab, buffers=1)
        self.buffer = hidden.new_empty(self.rows_per_chunk * vocab, dtype=acc)
        self.scratch = hidden.new_empty(self.rows_per_chunk * self.cols_per_tile, dtype=acc)

    def forward(self, rows: slice) -> Partials:
        self.rows, self.h = rows, self.hidden[rows].to(self.grads.operand)
        n, vocab = len(self.h), self.weight.shape[0]
        softmax = OnlineSoftmax(self.targets[rows], self.buffer.dtype, self.entropy)
        self.tiles: list[tuple[slice, SoftmaxTile]] = []
        for cols in slices(vocab, self.cols_per_tile) if n else ():
            width = cols.stop - cols.start
            w, out = self.weight[cols].to(self.h.dtype), tile_view(self.scratch, n, width)
            z = logits(self.h, w, self.bias, cols, *self.options, out)
            tile = softmax.update(z, cols, tile_view(self.buffer[n * cols.start :], n, width))
            self.tiles.append((cols, tile))
        own = softmax.partials()
        self.target_logit = own.target_logit
        return own

    def backward(self, active: torch.Tensor, dlogprob: torch.Tensor, whole: Partials, logprob: torch.Tensor) -> None:
        lse = whole.max + whole.sum.log()
        g = dlogprob if self.scale is None else dlogprob / self.scale
        temperature, softcap = self.options
        at_target = g / temperature
        if softcap is not None:
            # The target's slope is that of its own logit, which a vanishing probability does not tell.
            at_target = at_target * (1.0 - (self.target_logit * (temperature / softcap)).square())
        # As the gradient of lse, g reaches the probabilities alone.
        upstream = Upstream(self.targets[self.rows], lse, None, torch.zeros_like(g), -g, None)
        places = None if len(active) == len(g) else active
        if places is not None:
            upstream, at_target = upstream[places], at_target[places]
        dlogits = self._dlogits(places, upstream, at_target, lse)
        self.grads.add(active + self.rows.start, take_rows(self.h, places), dlogits)

    def _dlogits(
        self, places: torch.Tensor | None, upstream: Upstream, at_target: torch.Tensor, lse: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """dlogits of the rows at `places`, tile by tile; overwrites the tiles."""
        for cols, tile in self.tiles:
            p, share = take_rows(tile.p, places), take_rows(tile.share(lse), places)
            dz = upstream.from_probabilities_(p, cols, *self.options, share)
            upstream.add_at_targets_(dz, cols, at_target)
            yield cols, dz

    def gradients(self) -> Grads:
        return self.grads.finish(self.scale)


def chunk_shape(hidden: torch.Tensor, vocab: int, *, buffers: int) -> tuple[int, int]:
    """(rows per chunk, columns per tile) when `buffers` [rows, V] buffers share the chunk bound."""
    acc = accumulation_dtype(hidden.dtype)
    on_cpu = hidden.device.type == "cpu"
    budget = CPU_CHUNK_BYTES if on_cpu else ACCELERATOR_CHUNK_BYTES
    n_rows, dim = max(hidden.shape[0], 1), max(hidden.shape[1], 1)
    limit = max(1, min(n_rows, budget // (acc.itemsize * vocab * buffers)))
    if on_cpu and n_rows >= LARGE_CPU_ROWS:
        limit = min(limit, int(n_rows * CPU_CHUNK_SHARE))
    n_chunks = -(-n_rows // limit)
    rows = -(-n_rows // n_chunks)
    if on_cpu:
        rows = min(limit, -(-rows // CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE)
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


def scaled_by(grad: torch.Tensor, grad_loss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad · grad_loss in `dtype`, never in place, so that a backward may run twice.

    A grad_loss of 1 costs no copy: autograd then hands `grad` on, and copies it where the graph is retained. Reading
    it is one device synchronisation; subclasses of Tensor stand for values that a trace does not have.
    Raises RuntimeError in a backward that is itself to be differentiated: `grad` would be taken for a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a fused loss has no second derivatives; call backward without create_graph=True")
    if type(grad_loss) is torch.Tensor and grad_loss.item() == 1:
        return grad.to(dtype)
    return (grad * grad_loss).to(dtype)


class AttachGradients(torch.autograd.Function):
    """Gives a finished loss its known gradients.

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
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(None if g is None else scaled_by(g, grad_loss, dtype) for g, dtype in grads)
