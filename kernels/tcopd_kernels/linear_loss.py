"""Linear head and policy loss in one, without the [N, V] logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import reference
from ._backend import resolve_backend
from ._checks import (
    check_head,
    check_head_options,
    check_number,
    check_policy_options,
    check_targets,
    counted_rows,
    follow_autocast,
)
from ._loss_ops import linear_tcopd_loss_op, metric_names
from ._parallel import group_name, local_vocab_size
from ._torch_compact import exact_certificate
from ._torch_grads import Needs
from .policy_loss import PolicyOptions, TokenTerms
from .types import TokenLogprobs

if TYPE_CHECKING:
    import torch.distributed as dist


def linear_tcopd_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    advantage: torch.Tensor | None = None,
    reward: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    old_logprob: torch.Tensor | None = None,
    rollout_logprob: torch.Tensor | None = None,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
    is_cap: float | None = 5.0,
    advantage_clamp: float | None = None,
    ref_kl_coef: float = 0.0,
    vocab_size: int | None = None,
    grad_tol: float = 0.0,
    entropy: bool = False,
    backend: str = "auto",
    vocab_start: int = 0,
    process_group: dist.ProcessGroup | None = None,
    reduce_grad_hidden: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], TokenLogprobs]:
    """Policy loss of a linear head's token log-probabilities, differentiable in hidden, weight and bias.

        loss = Σ_n weights_n w_n ℓ_n + ref_kl_coef · Σ_n weights_n k3(π_θ‖π_ref)_n
        A = advantage, or reward − (log π_old − log π_ref)

    with log π_θ from linear_logprob and w, ℓ from tcopd_policy_loss. Without old_logprob the step is strictly
    on-policy: log π_old is this forward's own detached logprob.

    The gradients are computed during the forward and kept (the size of hidden and, unless frozen, of weight);
    the backward only scales them. Inputs that need no gradient cost none, and rows whose gradient is zero take
    no part in the gradient GEMMs. With grad_tol > 0 neither do the columns that are improbable in all rows of a
    chunk, within the bounds given in linear_logprob for c_i = −d loss / d logprob_i (times the loss's own upstream
    gradient).

    Args:
        hidden: [N, D], fp16, bf16, fp32 or float64.   weight: [V, D].   targets: [N] int32 or int64.
        advantage: [N]; or give reward [N] and ref_logprob [N] in its place.
        ref_logprob: [N], for reward and for ref_kl_coef.
        old_logprob, rollout_logprob: [N] or None, as in tcopd_policy_loss.
        weights: [N] mask and normaliser in one. Rows of weight 0 and ignored rows take no part.
        bias, temperature, softcap, ignore_index, vocab_size, grad_tol, backend: as in linear_logprob.
        vocab_start, process_group, reduce_grad_hidden: as in linear_logprob, for a head whose vocabulary is split
            over ranks. All ranks pass the same per-token arguments and get the same loss and metrics, but for
            the certificate, which is about the rank's own columns.
        clip_low, clip_high, dual_clip, is_cap: as in tcopd_policy_loss.
        advantage_clamp: clamps A to ±this, in nats.
        ref_kl_coef: weight ≥ 0 of the k3 penalty exp(d) − d − 1, d = log π_ref − log π_θ.
        entropy: also return the entropy.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: those of tcopd_policy_loss, and ref_kl_sum (Σ k3, unweighted) when ref_logprob is given. With
            grad_tol > 0 also the certificate of the gradients: dropped_mass_sum and dropped_mass_max (of r_i; 0
            for dense rows), dense_row_count (rows over grad_tol, computed exactly), grad_row_count (rows with a
            gradient; "reference" counts all with weight) and kept_column_sum (Σ over those of the columns kept,
            V for a dense row). All but dropped_mass_max add up over micro-batches and ranks.
        TokenLogprobs: detached; 0 for ignored tokens.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value.
    """
    check_head_options(temperature, softcap, ignore_index, grad_tol)
    check_policy_options(clip_low, clip_high, dual_clip, is_cap)
    check_number("advantage_clamp", advantage_clamp, low=0.0, optional=True)
    check_number("ref_kl_coef", ref_kl_coef, low=0.0, open_low=False)
    group = group_name(process_group, vocab_start)
    hidden, weight = follow_autocast(hidden, weight)
    weight, bias = check_head(hidden, weight, bias, local_vocab_size(vocab_size, vocab_start, weight.shape[0]))
    tokens = TokenTerms(advantage, reward, ref_logprob, old_logprob, rollout_logprob, weights)
    tokens.check(hidden.shape[0], hidden.device, ref_kl_coef)
    check_targets(targets, hidden.shape[0], hidden.device)
    policy = PolicyOptions(clip_low, clip_high, dual_clip, is_cap, advantage_clamp, ref_kl_coef)
    name = resolve_backend(backend, hidden)
    if name == "reference":
        if group is not None:
            raise ValueError("backend='reference' takes the whole head; use backend='auto' with a process_group")
        counted_rows(targets, weight.shape[0], ignore_index)
        stats = reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
        counted = tokens._replace(weights=torch.where(targets != ignore_index, weights, 0.0))
        loss, metrics, _ = counted.loss(stats.logprob, policy)
        if grad_tol:
            metrics |= exact_certificate(int(metrics["token_count"]), weight.shape[0], loss)
        token_entropy = None if stats.entropy is None else stats.entropy.detach()
        return loss, metrics, TokenLogprobs(stats.logprob.detach(), stats.lse.detach(), token_entropy)

    loss, packed, logprob, lse, entropies, *_ = linear_tcopd_loss_op(
        hidden, weight, bias, targets, list(Needs.of(hidden, weight, bias)), entropy,
        *tokens.map(torch.Tensor.detach), *policy,
        name, temperature, softcap, ignore_index, grad_tol, vocab_start, group, reduce_grad_hidden,
    )  # fmt: skip
    metrics = dict(zip(metric_names(tokens, grad_tol), packed.unbind(), strict=True))
    return loss, metrics, TokenLogprobs(logprob, lse, entropies if entropy else None)
