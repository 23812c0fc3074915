"""Log-probabilities of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tcopd_kernels import reference
from tcopd_kernels._backend import load_backend, resolve_backend, without_autocast
from tcopd_kernels._checks import check_head, check_head_options, select_targets
from tcopd_kernels.types import TokenLogprobs


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    grad_tol: float = 0.0,
    backend: str = "auto",
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """log π(y_n), log normaliser and entropy of softmax(z_n), differentiable in hidden, weight and bias.

        u = h Wᵀ + b,   z = softcap·tanh(u/softcap)/temperature   (z = u/temperature without softcap)
        logprob_n = z_{n,y_n} − lse_n,   lse_n = log Σ_v exp z_{n,v},   H_n = −Σ_v p_{n,v} log p_{n,v}

    All three are those of the tempered distribution and are differentiable; double backward is refused.

    Args:
        hidden: [N, D], fp16, bf16, fp32 or float64.
        weight: [V, D], dtype and device of hidden.
        targets: [N] int32 or int64, each in [0, V) or equal to ignore_index.
        bias: [V] or None.
        temperature: sampling temperature > 0.
        softcap: final logit soft-cap > 0 (Gemma), or None.
        ignore_index: rows with this target give 0 in every output, no gradient, and cost nothing.
        entropy: also return the entropy in nats.
        grad_tol: probability mass that the backward may leave out per row. 0 is exact, and so are at present
            all backends for any value.
        backend: "auto" (Triton on a GPU if it can be imported, else torch), "triton", "torch", "reference".
        vocab_size: only the first vocab_size rows of weight and bias count (padded heads); None for all.

    Returns:
        TokenLogprobs(logprob [N], lse [N], entropy [N] or None), fp32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value, among
            them a backend that cannot run on these tensors.
    """
    check_head_options(temperature, softcap, ignore_index, grad_tol)
    weight, bias = check_head(hidden, weight, bias, vocab_size)
    rows = select_targets(targets, hidden.shape[0], weight.shape[0], ignore_index, hidden.device)
    name = resolve_backend(backend, hidden)
    if name == "reference":
        return reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
    options = _Options(name, temperature, softcap, entropy, grad_tol)
    return TokenLogprobs(*_LinearLogprob.apply(hidden, weight, bias, targets.long(), rows, options))


class _Options(NamedTuple):
    backend: str
    temperature: float
    softcap: float | None
    entropy: bool
    grad_tol: float


class _LinearLogprob(torch.autograd.Function):
    """Removes ignored rows, calls the backend, puts the results back in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with without_autocast(hidden):
            logprob, lse, entropy = load_backend(options.backend).forward(
                take_rows(hidden, rows), weight, take_rows(targets, rows),
                bias=bias, temperature=options.temperature, softcap=options.softcap, entropy=options.entropy,
            )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        n_rows = hidden.shape[0]
        return (
            scatter_rows(logprob, rows, n_rows),
            scatter_rows(lse, rows, n_rows),
            None if entropy is None else scatter_rows(entropy, rows, n_rows),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, rows, lse, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        upstream = [None if g is None else take_rows(g, rows) for g in grads]
        active = _rows_with_gradient(upstream)
        if active is not None:
            rows = active if rows is None else rows[active]
            upstream = [None if g is None else g[active] for g in upstream]
            lse = lse[active]
            entropy = None if entropy is None else entropy[active]
        with without_autocast(hidden):
            grad_hidden, grad_weight, grad_bias = load_backend(options.backend).backward(
                take_rows(hidden, rows), weight, take_rows(targets, rows), lse, entropy, *upstream,
                bias=bias, temperature=options.temperature, softcap=options.softcap,
                need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias and bias is not None,
                grad_tol=options.grad_tol,
            )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden, rows, hidden.shape[0])
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _rows_with_gradient(grads: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Indices of the rows where any gradient is non-zero (NaN counts), or None when that is every row."""
    present = [g != 0 for g in grads if g is not None]
    if not present:
        return None
    active = torch.stack(present).any(0).nonzero().squeeze(1)
    return None if len(active) == len(present[0]) else active


def take_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def scatter_rows(tensor: torch.Tensor, rows: torch.Tensor | None, n_rows: int) -> torch.Tensor:
    """Inverse of take_rows: zeros in the rows that were left out."""
    if rows is None:
        return tensor
    out = tensor.new_zeros(n_rows, *tensor.shape[1:])
    return out.index_copy_(0, rows, tensor)
