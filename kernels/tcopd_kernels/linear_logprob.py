"""Log-probabilities of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import reference
from ._backend import resolve_backend
from ._checks import (
    check_head,
    check_head_options,
    check_targets,
    counted_rows,
    follow_autocast,
)
from ._ops import CERTIFICATE, linear_logprob_op
from ._parallel import group_name, local_vocab_size
from ._rows import scatter_rows as scatter_rows
from ._rows import take_rows as take_rows
from ._torch_grads import Needs
from .types import TokenLogprobs

if TYPE_CHECKING:
    import torch.distributed as dist


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
    vocab_start: int = 0,
    process_group: dist.ProcessGroup | None = None,
    reduce_grad_hidden: bool = True,
) -> TokenLogprobs:
    """log π(y_n), log normaliser and entropy of softmax(z_n), differentiable in hidden, weight and bias.

        u = h Wᵀ + b,   z = softcap·tanh(u/softcap)/temperature   (z = u/temperature without softcap)
        logprob_n = z_{n,y_n} − lse_n,   lse_n = log Σ_v exp z_{n,v},   H_n = −Σ_v p_{n,v} log p_{n,v}

    All three are those of the tempered distribution and are differentiable; double backward is refused.

    Args:
        hidden: [N, D], fp16, bf16, fp32 or float64.
        weight: [V, D], dtype and device of hidden. Under autocast both are cast to the region's dtype.
        targets: [N] int32 or int64, each in [0, V) or equal to ignore_index.
        bias: [V] or None.
        temperature: sampling temperature > 0.
        softcap: final logit soft-cap > 0 (Gemma), or None.
        ignore_index: rows with this target give 0 in every output, no gradient, and cost nothing.
        entropy: also return the entropy in nats.
        grad_tol: probability mass that the backward may leave out per row; 0 is exact. See below.
        backend: "auto" (Triton on a GPU if it can be imported, else torch), "triton", "torch", "reference".
        vocab_size: only the first vocab_size rows of the head count (padded heads); None for all.
        certificate: a dict that gets what the backward leaves out, under the names that linear_tcopd_loss gives it
            ("reference" reports nothing); NaN until the backward has run. None for no report, and in compiled code.
        vocab_start: with process_group, the id of weight's first row.
        process_group: ranks that hold a row range of weight and bias each (tensor parallelism); None for a whole head.
        reduce_grad_hidden: with process_group, sum the gradient of hidden over the ranks; False where hidden comes
            from a region that sums it itself (Megatron's copy to, or gather from, the tensor-parallel region).

    Returns:
        TokenLogprobs(logprob [N], lse [N], entropy [N] or None), fp32, or float64 for float64 inputs.

    With grad_tol > 0 columns that are improbable in a whole block of rows are dropped from the backward. It measures
    the mass r_i = 1 − Σ_kept p_iv that each row loses and computes rows with r_i > grad_tol exactly, so that with
    c_i = d loss / d lse_i − d loss / d logprob_i

        ‖ΔdH_i‖ ≤ |c_i| r_i max_v‖W_v‖ / temperature,   ‖ΔdW‖_F ≤ Σ_i |c_i| r_i ‖h_i‖ / temperature,
        ‖Δdb‖_1 ≤ Σ_i |c_i| r_i / temperature

    up to rounding. Rows of dW that belong to columns dropped everywhere are exactly 0; targets are never dropped.
    A backward with a gradient of the entropy is exact, and so is "reference".

    With process_group all ranks pass the same hidden, targets (ids of the whole vocabulary) and options, and get the
    same results, bit by bit; the upstream gradients must be the same as well. The gradients of weight and bias are
    the local ones. The shards may differ in size; that they partition the vocabulary is checked. Each rank leaves
    out at most grad_tol / ranks of a row's mass, and its certificate is about its own columns.

    torch.compile and torch.export take the call whole, as one operator. N may vary from call to call; other values
    of the options compile again.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value, among
            them a backend that cannot run on these tensors. What depends on other ranks raises on every rank.
    """
    check_head_options(temperature, softcap, ignore_index, grad_tol)
    group = group_name(process_group, vocab_start)
    hidden, weight = follow_autocast(hidden, weight)
    if group is not None:
        vocab_size = local_vocab_size(vocab_size, vocab_start, weight.shape[0])
    weight, bias = check_head(hidden, weight, bias, vocab_size)
    check_targets(targets, hidden.shape[0], hidden.device)
    name = resolve_backend(backend, hidden)
    if name == "reference":
        if group is not None:
            raise ValueError("backend='reference' takes the whole head; use backend='auto' with a process_group")
        counted_rows(targets, weight.shape[0], ignore_index)
        return reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
    report = None
    if certificate is not None:
        report = _new_certificate(certificate, hidden)
    # Column bounds are of use to a backward only.
    tolerance = float(grad_tol) if any(Needs.of(hidden, weight, bias)) else 0.0
    logprob, lse, token_entropy, *_ = linear_logprob_op(
        hidden, weight, bias, targets, report, entropy,
        name, float(temperature), softcap, ignore_index, tolerance, vocab_start, group, reduce_grad_hidden,
    )  # fmt: skip
    return TokenLogprobs(logprob, lse, token_entropy if entropy else None)


def _new_certificate(certificate: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Storage [5] for a certificate, of which the dict gets views."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "certificate is filled by the backward, outside of what torch.compile can see; pass None in compiled code, "
            "or use linear_tcopd_loss, whose metrics hold the same numbers"
        )
    report = hidden.new_full((len(CERTIFICATE),), float("nan"), dtype=torch.float32)
    certificate.update(zip(CERTIFICATE, report.unbind(), strict=True))
    return report
