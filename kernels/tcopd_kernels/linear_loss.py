"""Linear head and policy loss in one, without the [N, V] logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tcopd_kernels import _torch, _torch_compact, reference
from tcopd_kernels._backend import load_backend, resolve_backend, without_autocast
from tcopd_kernels._checks import (
    check_head,
    check_head_options,
    check_number,
    check_policy_options,
    check_vector,
    select_targets,
)
from tcopd_kernels._torch_compact import exact_certificate
from tcopd_kernels._torch_grads import Grads, Needs, scaled_grads
from tcopd_kernels._torch_loss import AttachGradients, LossPass, TokenLoss, half_precision_scale, single_pass
from tcopd_kernels.linear_logprob import scatter_rows, take_rows
from tcopd_kernels.policy_loss import k3_penalty, tcopd_policy_loss
from tcopd_kernels.types import TokenLogprobs


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
    weight, bias = check_head(hidden, weight, bias, vocab_size)
    tokens = TokenTerms(advantage, reward, ref_logprob, old_logprob, rollout_logprob, weights)
    tokens.check(hidden.shape[0], hidden.device, ref_kl_coef)
    rows = select_targets(targets, hidden.shape[0], weight.shape[0], ignore_index, hidden.device)
    name = resolve_backend(backend, hidden)
    policy = PolicyOptions(clip_low, clip_high, dual_clip, is_cap, advantage_clamp, ref_kl_coef)
    if name == "reference":
        stats = reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
        counted = tokens._replace(weights=torch.where(targets != ignore_index, weights, 0.0))
        loss, metrics = counted.loss(stats.logprob, policy)
        token_entropy = None if stats.entropy is None else stats.entropy.detach()
        if grad_tol:
            metrics |= exact_certificate(int(metrics["token_count"]), weight.shape[0], loss)
        return loss, metrics, TokenLogprobs(stats.logprob.detach(), stats.lse.detach(), token_entropy)

    tokens = tokens.map(lambda t: take_rows(t, rows))
    needs = Needs.of(hidden, weight, bias)
    run: Callable[..., LossPass] = single_pass
    if name != "torch" or grad_tol or not any(needs):
        run = partial(_two_passes, backend=name, grad_tol=grad_tol)
    scale = half_precision_scale(hidden.dtype, tokens.weights)
    with torch.no_grad(), without_autocast(hidden):
        result = run(
            take_rows(hidden, rows), weight, take_rows(targets.long(), rows), _token_loss(tokens, policy),
            bias=bias, temperature=temperature, softcap=softcap, entropy=entropy, needs=needs, scale=scale,
        )  # fmt: skip
        n_rows = hidden.shape[0]
        grad_hidden, *grad_head = result.grads
        grad_hidden = None if grad_hidden is None else scatter_rows(grad_hidden, rows, n_rows)
        logprob, lse = (scatter_rows(t, rows, n_rows) for t in (result.logprob, result.lse))
        token_entropy = None if result.entropy is None else scatter_rows(result.entropy, rows, n_rows)
    loss = AttachGradients.apply(result.loss, (grad_hidden, *grad_head), hidden, weight, bias)
    return loss, result.metrics, TokenLogprobs(logprob, lse, token_entropy)


class PolicyOptions(NamedTuple):
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    is_cap: float | None
    advantage_clamp: float | None
    ref_kl_coef: float


class TokenTerms(NamedTuple):
    """Per-token inputs [N] of the policy loss."""

    advantage: torch.Tensor | None
    reward: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    old_logprob: torch.Tensor | None
    rollout_logprob: torch.Tensor | None
    weights: torch.Tensor

    def check(self, n_rows: int, device: torch.device, ref_kl_coef: float) -> None:
        for name, value in zip(self._fields, self, strict=True):
            if value is not None or name == "weights":
                check_vector(name, value, (n_rows,), device)
        if (self.advantage is None) == (self.reward is None):
            raise ValueError("give exactly one of advantage and reward (reward together with ref_logprob)")
        if self.reward is not None and self.ref_logprob is None:
            raise ValueError("ref_logprob is required with reward: A = reward − (old_logprob − ref_logprob)")
        if ref_kl_coef and self.ref_logprob is None:
            raise ValueError(f"ref_logprob is required with ref_kl_coef={ref_kl_coef}")

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenTerms:
        given = zip(self._fields, self, strict=True)
        return self._replace(**{name: function(value) for name, value in given if value is not None})

    def loss(self, logprob: torch.Tensor, policy: PolicyOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics, differentiable in logprob [N]."""
        advantage = self.advantage
        if self.reward is not None and self.ref_logprob is not None:
            old = logprob.detach() if self.old_logprob is None else self.old_logprob
            advantage = self.reward - (old - self.ref_logprob)
        assert advantage is not None  # TokenTerms.check refuses tokens with neither
        if policy.advantage_clamp is not None:
            advantage = advantage.clamp(-policy.advantage_clamp, policy.advantage_clamp)
        loss, metrics = tcopd_policy_loss(
            logprob, advantage, old_logprob=self.old_logprob, rollout_logprob=self.rollout_logprob,
            weights=self.weights, clip_low=policy.clip_low, clip_high=policy.clip_high,
            dual_clip=policy.dual_clip, is_cap=policy.is_cap,
        )  # fmt: skip
        if self.ref_logprob is not None:
            penalty, ref_kl_sum = k3_penalty(logprob, self.ref_logprob, self.weights)
            metrics["ref_kl_sum"] = ref_kl_sum.float()
            if policy.ref_kl_coef:
                loss = loss + policy.ref_kl_coef * penalty
        return loss, metrics


def _token_loss(tokens: TokenTerms, policy: PolicyOptions) -> TokenLoss:
    """The loss of a slice of the tokens together with its gradient with respect to their logprobs."""

    def evaluate(rows: slice, logprob: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        part = tokens.map(lambda t: t[rows])
        with torch.enable_grad():
            variable = logprob.detach().requires_grad_()
            loss, metrics = part.loss(variable, policy)
        (dlogprob,) = torch.autograd.grad(loss, variable)
        return loss.detach(), metrics, dlogprob

    return evaluate


def _two_passes(
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
    backend: str,
    grad_tol: float,
) -> LossPass:
    """Forward over all rows, then the recomputing backward: for backends that keep no logits, and for compaction,
    which recomputes only a few."""
    kernels = load_backend(backend)
    head: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap}
    compact = backend == "torch" and grad_tol > 0 and any(needs)
    bounds = _torch.new_bounds(len(hidden), weight) if compact else None
    extra = {} if bounds is None else {"bounds": bounds}
    logprob, lse, ent = kernels.forward(hidden, weight, targets, entropy=entropy, **head, **extra)
    loss, metrics, dlogprob = token_loss(slice(0, len(hidden)), logprob)
    active = dlogprob.nonzero().squeeze(1) if any(needs) else torch.zeros_like(targets[:0])
    rows = None if len(active) == len(hidden) else active
    operands = (take_rows(hidden, rows), weight, take_rows(targets, rows), take_rows(lse, rows))
    upstream = take_rows(dlogprob if scale is None else dlogprob / scale, rows)
    grads: Grads = (None, None, None)
    report = exact_certificate(len(active), weight.shape[0], lse) if grad_tol else {}
    if bounds is not None:
        grads, report = _torch_compact.backward(
            *operands, upstream, None, needs=needs, grad_tol=grad_tol,
            bounds=bounds, blocks=active // _torch.BOUND_ROWS, **head,
        )  # fmt: skip
    elif any(needs):
        grads = kernels.backward(
            *operands, None, upstream, None, None,
            need_hidden=needs.hidden, need_weight=needs.weight, need_bias=needs.bias, **head,
        )  # fmt: skip
    if scale is not None:
        grads = scaled_grads(grads, scale, torch.float32)
    if grads[0] is not None:
        grads = (scatter_rows(grads[0], rows, len(hidden)), *grads[1:])
    return LossPass(loss, metrics | report, logprob, lse, ent, grads)
