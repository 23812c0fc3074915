"""Log-probabilities of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tcopd_kernels import _torch, _torch_compact, reference
from tcopd_kernels._backend import load_backend, resolve_backend, without_autocast
from tcopd_kernels._checks import check_head, check_head_options, select_targets
from tcopd_kernels._torch_grads import Needs
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
    certificate: dict[str, torch.Tensor] | None = None,
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
        grad_tol: probability mass that the backward may leave out per row; 0 is exact. See below.
        backend: "auto" (Triton on a GPU if it can be imported, else torch), "triton", "torch", "reference".
        vocab_size: only the first vocab_size rows of weight and bias count (padded heads); None for all.
        certificate: a dict that every backward fills with what it left out, under the names that
            linear_tcopd_loss gives them ("reference" reports nothing); None for no report.

    Returns:
        TokenLogprobs(logprob [N], lse [N], entropy [N] or None), fp32, or float64 for float64 inputs.

    With grad_tol > 0 the torch backend drops columns that are improbable in a whole block of rows from the
    backward. It measures the mass r_i = 1 − Σ_kept p_iv that each row loses and computes rows with r_i > grad_tol
    exactly, so that with c_i = d loss / d lse_i − d loss / d logprob_i

        ‖ΔdH_i‖ ≤ |c_i| r_i max_v‖W_v‖ / temperature,   ‖ΔdW‖_F ≤ Σ_i |c_i| r_i ‖h_i‖ / temperature,
        ‖Δdb‖_1 ≤ Σ_i |c_i| r_i / temperature

    up to rounding. Rows of dW that belong to columns dropped everywhere are exactly 0; targets are never dropped.
    A backward with a gradient of the entropy is exact, and so are the other backends.

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
    options = _Options(name, temperature, softcap, entropy, grad_tol, certificate)
    return TokenLogprobs(*_LinearLogprob.apply(hidden, weight, bias, targets.long(), rows, options))


class _Options(NamedTuple):
    backend: str
    temperature: float
    softcap: float | None
    entropy: bool
    grad_tol: float
    certificate: dict[str, torch.Tensor] | None


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
        extra = {}
        if options.backend == "torch" and options.grad_tol and any(ctx.needs_input_grad):
            n_rows = hidden.shape[0] if rows is None else len(rows)
            extra["bounds"] = _torch.new_bounds(n_rows, weight)
        with without_autocast(hidden):
            logprob, lse, entropy = load_backend(options.backend).forward(
                take_rows(hidden, rows), weight, take_rows(targets, rows),
                bias=bias, temperature=options.temperature, softcap=options.softcap, entropy=options.entropy, **extra,
            )  # fmt: skip
        ctx.bounds = extra.get("bounds")
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
        needs = Needs(need_hidden, need_weight, need_bias and bias is not None)
        operands = take_rows(hidden, rows), weight, take_rows(targets, rows), lse
        head = {"bias": bias, "temperature": options.temperature, "softcap": options.softcap}
        with without_autocast(hidden):
            if ctx.bounds is not None and upstream[2] is None:
                places = torch.arange(len(ctx.saved_tensors[5]), device=hidden.device) if active is None else active
                (grad_hidden, grad_weight, grad_bias), report = _torch_compact.backward(
                    *operands, *upstream[:2], needs=needs, grad_tol=options.grad_tol,
                    bounds=ctx.bounds, blocks=places // _torch.BOUND_ROWS, **head,
                )  # fmt: skip
            else:
                grad_hidden, grad_weight, grad_bias = load_backend(options.backend).backward(
                    *operands, entropy, *upstream,
                    need_hidden=needs.hidden, need_weight=needs.weight, need_bias=needs.bias, **head,
                )  # fmt: skip
                report = _torch_compact.exact_certificate(len(lse), weight.shape[0], lse)
        if options.certificate is not None:
            options.certificate.update(report)
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
