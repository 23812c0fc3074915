"""Clipped policy-gradient loss on token log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ._checks import accumulation_dtype, check_float_tensor, check_policy_options, check_vector

# exp(20) is far outside any clip range, and its square times an advantage still fits fp32.
MAX_LOG_RATIO = 20.0

# Names of the metrics of tcopd_policy_loss.
POLICY_METRICS = (
    "token_count", "advantage_sum", "advantage_sq_sum", "ratio_sum", "ratio_sq_sum", "ratio_max", "clipped_count",
    "dual_clipped_count", "approx_kl_sum", "is_weight_sum", "is_weight_sq_sum", "is_capped_count",
)  # fmt: skip


def tcopd_policy_loss(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    old_logprob: torch.Tensor | None = None,
    rollout_logprob: torch.Tensor | None = None,
    weights: torch.Tensor,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
    is_cap: float | None = 5.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ_n weights_n · w_n · ℓ_n, differentiable in logprob alone.

        ρ = exp(logprob − old_logprob)
        ℓ = max(−ρA, −clip(ρ, 1−clip_low, 1+clip_high)·A)      (PPO)
        ℓ ← min(ℓ, −dual_clip·A) where A < 0                    (dual clip, Ye et al., 2020)
        w = min(exp(old_logprob − rollout_logprob), is_cap), a constant; 1 without rollout_logprob

    Args:
        logprob: [N] current policy, in nats.
        advantage: [N]; its gradient is not followed.
        old_logprob: [N], or None for a strictly on-policy step: ρ ≡ 1 with the gradient of logprob.
        rollout_logprob: [N] as the inference engine reported it, or None.
        weights: [N] mask and normaliser in one (for a token mean: 1/count, and 0 at masked tokens): the
            weighted sum is the loss. Rows of weight 0 take no part, whatever the other arguments hold there.
        clip_low, clip_high, dual_clip, is_cap: None switches that bound off.

    |logprob − old_logprob| is limited to 20 nats before the exponential; beyond it the gradient is 0.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: 0-dim detached fp32 tensors over the tokens with weight ≠ 0. All but ratio_max (combine it
            with max) are plain sums or counts, which add up over micro-batches and ranks:
            token_count, advantage_sum, advantage_sq_sum, ratio_sum, ratio_sq_sum, ratio_max (0 without
            tokens), clipped_count (tokens where the PPO bound is the larger term), dual_clipped_count,
            approx_kl_sum (Σ (ρ−1) − log ρ, of old to current), is_weight_sum, is_weight_sq_sum,
            is_capped_count.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, shape, device or value.
    """
    check_policy_options(clip_low, clip_high, dual_clip, is_cap)
    check_float_tensor("logprob", logprob)
    if logprob.dim() != 1:
        raise ValueError(f"logprob must have shape [N], got {list(logprob.shape)}")
    named = {"advantage": advantage, "old_logprob": old_logprob, "rollout_logprob": rollout_logprob}
    for name, value in named.items():
        if value is not None or name == "advantage":
            check_vector(name, value, tuple(logprob.shape), logprob.device)
    check_vector("weights", weights, tuple(logprob.shape), logprob.device)

    return _evaluate(logprob, advantage, old_logprob, rollout_logprob, weights, clip_low, clip_high, dual_clip, is_cap)[
        :2
    ]


def _evaluate(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    old_logprob: torch.Tensor | None,
    rollout_logprob: torch.Tensor | None,
    weights: torch.Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    is_cap: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss and metrics of tcopd_policy_loss, and d loss / d logprob [N] (detached)."""
    dtype = accumulation_dtype(logprob.dtype)
    active = weights != 0

    def clean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(active, values.to(dtype), 0.0)

    logprob = clean(logprob)
    advantage = clean(advantage.detach())
    old = logprob.detach() if old_logprob is None else clean(old_logprob.detach())
    difference = logprob - old
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    token_loss, clipped, dual_clipped = _clipped_loss(ratio, advantage, clip_low, clip_high, dual_clip)
    is_weight, capped = torch.ones_like(advantage), torch.zeros_like(active)
    if rollout_logprob is not None:
        is_weight, capped = _engine_weight(old, clean(rollout_logprob.detach()), is_cap)
    token_weight = weights.detach().to(dtype) * is_weight
    loss = (token_weight * token_loss).sum()
    with torch.no_grad():
        followed = active & ~clipped & ~dual_clipped & (difference.abs() <= MAX_LOG_RATIO)
        gradient = torch.where(followed, -token_weight * advantage * ratio, 0.0)
        masked_ratio = torch.where(active, ratio, 0.0)
        metrics = {
            "token_count": active.sum(),
            "advantage_sum": advantage.sum(),
            "advantage_sq_sum": advantage.square().sum(),
            "ratio_sum": masked_ratio.sum(),
            "ratio_sq_sum": masked_ratio.square().sum(),
            "ratio_max": masked_ratio.amax() if len(ratio) else masked_ratio.sum(),
            "clipped_count": (active & clipped).sum(),
            "dual_clipped_count": (active & dual_clipped).sum(),
            "approx_kl_sum": torch.where(active, ratio - 1 - log_ratio, 0.0).sum(),
            "is_weight_sum": torch.where(active, is_weight, 0.0).sum(),
            "is_weight_sq_sum": torch.where(active, is_weight.square(), 0.0).sum(),
            "is_capped_count": (active & capped).sum(),
        }
    return loss, {name: value.float() for name, value in metrics.items()}, gradient


def _clipped_loss(
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token loss, where PPO clipped, where the dual clip applied), each [N]."""
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high = math.inf if clip_high is None else 1.0 + clip_high
    unclipped = -advantage * ratio
    bounded = -advantage * ratio.clamp(low, high)
    clipped = bounded > unclipped
    loss = torch.where(clipped, bounded, unclipped)
    if dual_clip is None:
        return loss, clipped, torch.zeros_like(clipped)
    ceiling = -dual_clip * advantage
    dual_clipped = (advantage < 0) & (loss > ceiling)
    return torch.where(dual_clipped, ceiling, loss), clipped, dual_clipped


def _engine_weight(old: torch.Tensor, rollout: torch.Tensor, is_cap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """min(exp(old − rollout), is_cap) and where the cap applied, each [N]."""
    weight = (old - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if is_cap is None:
        return weight, torch.zeros_like(weight, dtype=torch.bool)
    return weight.clamp(max=is_cap), weight > is_cap


def k3_penalty(
    logprob: torch.Tensor, ref_logprob: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ_n weights_n k3_n, the unweighted Σ k3 over tokens with weight ≠ 0, and d penalty / d logprob [N].

    k3 = exp(d) − d − 1 with d = log π_ref − log π_θ: a non-negative, low-variance estimate of KL(π_θ‖π_ref)
    in nats (Schulman, 2020). d is limited to 20. Rows of weight 0 take no part. The first result alone is
    differentiable.
    """
    active = weights != 0
    difference = torch.where(active, ref_logprob.detach() - logprob, 0.0)
    limited = difference.clamp(max=MAX_LOG_RATIO)
    k3 = limited.exp() - limited - 1
    with torch.no_grad():
        gradient = torch.where(difference <= MAX_LOG_RATIO, -weights * torch.expm1(limited), 0.0)
    return (weights.detach() * k3).sum(), k3.detach().sum(), gradient


def merge_metrics(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Metrics of the union of disjoint token sets: keys ending in _max by maximum, all others by addition."""
    return {
        name: torch.stack([part[name] for part in parts]).amax(0)
        if name.endswith("_max")
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in parts[0]
    }


class PolicyOptions(NamedTuple):
    """Options of linear_tcopd_loss that concern the tokens alone."""

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

    def metric_names(self) -> tuple[str, ...]:
        return POLICY_METRICS if self.ref_logprob is None else (*POLICY_METRICS, "ref_kl_sum")

    def loss(
        self, logprob: torch.Tensor, policy: PolicyOptions
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Loss, differentiable in logprob [N], metrics, and d loss / d logprob [N]."""
        advantage = self.advantage
        if self.reward is not None and self.ref_logprob is not None:
            old = logprob.detach() if self.old_logprob is None else self.old_logprob
            advantage = self.reward - (old - self.ref_logprob)
        assert advantage is not None  # TokenTerms.check refuses tokens with neither
        if policy.advantage_clamp is not None:
            advantage = advantage.clamp(-policy.advantage_clamp, policy.advantage_clamp)
        loss, metrics, gradient = _evaluate(
            logprob, advantage, self.old_logprob, self.rollout_logprob, self.weights,
            policy.clip_low, policy.clip_high, policy.dual_clip, policy.is_cap,
        )  # fmt: skip
        if self.ref_logprob is not None:
            penalty, ref_kl_sum, penalty_gradient = k3_penalty(logprob, self.ref_logprob, self.weights)
            metrics["ref_kl_sum"] = ref_kl_sum.float()
            if policy.ref_kl_coef:
                loss = loss + policy.ref_kl_coef * penalty
                gradient = gradient + policy.ref_kl_coef * penalty_gradient
        dtype = accumulation_dtype(logprob.dtype)
        return loss.to(dtype), metrics, gradient.to(dtype)
