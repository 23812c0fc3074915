"""Plain definitions on materialised logits, differentiable by autograd: the measure of the fast paths.

Arguments are not checked here; the public functions do that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._checks import accumulation_dtype
from .types import TokenLogprobs


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """[N, V] logits softcap·tanh((h Wᵀ + b)/softcap)/temperature in fp32 or float64."""
    dtype = accumulation_dtype(hidden.dtype)
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        z = hidden.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            z = z + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


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
) -> TokenLogprobs:
    """See tcopd_kernels.linear_logprob."""
    z = head_logits(hidden, weight, bias, temperature, softcap)
    valid = targets != ignore_index
    index = torch.where(valid, targets, 0).long().unsqueeze(1)
    lse = torch.logsumexp(z, dim=1)
    log_p = torch.log_softmax(z, dim=1)
    logprob = log_p.gather(1, index).squeeze(1)
    token_entropy = None
    if entropy:
        finite_log_p = log_p.clamp_min(torch.finfo(log_p.dtype).min)
        token_entropy = torch.where(valid, -(log_p.exp() * finite_log_p).sum(1), 0.0)
    return TokenLogprobs(torch.where(valid, logprob, 0.0), torch.where(valid, lse, 0.0), token_entropy)


def multi_linear_logprob(
    hiddens: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor | None],
    temperature: float = 1.0,
    softcaps: Sequence[float | None],
    ignore_index: int = -100,
) -> torch.Tensor:
    """See tcopd_kernels.multi_linear_logprob."""
    rows = [
        linear_logprob(h, w, targets, bias=b, temperature=temperature, softcap=s, ignore_index=ignore_index).logprob
        for h, w, b, s in zip(hiddens, weights, biases, softcaps, strict=True)
    ]
    return torch.stack([row.to(accumulation_dtype(*(r.dtype for r in rows))) for row in rows])


def contrastive_advantage(
    old_logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    lambdas: torch.Tensor,
    *,
    normalizer: str = "active",
    student_ref_logprob: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See tcopd_kernels.contrastive_advantage; token by token, without clamps."""
    n_teachers, n_tokens = teacher_logprobs.shape
    lambdas = lambdas if lambdas.dim() == 2 else lambdas.unsqueeze(1).expand(-1, n_tokens)
    student_ref = ref_logprob if student_ref_logprob is None else student_ref_logprob
    rewards = []
    for n in range(n_tokens):
        active = [k for k in range(n_teachers) if lambdas[k, n] != 0]
        divisor = {"active": max(len(active), 1), "count": n_teachers, "none": 1}[normalizer]
        bases = ref_logprob[:, n] if ref_logprob.dim() == 2 else ref_logprob[n].expand(n_teachers)
        terms = [lambdas[k, n] * (teacher_logprobs[k, n] - bases[k]) for k in active]
        rewards.append(sum(terms, torch.zeros_like(old_logprob[n])) / divisor)
    reward = torch.stack(rewards)
    return reward - (old_logprob - student_ref), reward


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
) -> torch.Tensor:
    """See tcopd_kernels.tcopd_policy_loss; the loss alone, for rows that all count."""
    old = logprob.detach() if old_logprob is None else old_logprob
    ratio = torch.exp(logprob - old)
    low = -float("inf") if clip_low is None else 1 - clip_low
    high = float("inf") if clip_high is None else 1 + clip_high
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    if rollout_logprob is not None:
        cap = float("inf") if is_cap is None else is_cap
        surrogate = surrogate * torch.exp(old - rollout_logprob).detach().clamp(max=cap)
    return -(weights * surrogate).sum()


def k3(logprob: torch.Tensor, ref_logprob: torch.Tensor) -> torch.Tensor:
    """Non-negative estimator exp(d) − d − 1, d = log π_ref − log π_θ, of KL(π_θ‖π_ref) (Schulman, 2020)."""
    d = ref_logprob - logprob
    return torch.exp(d) - d - 1


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
    ref_kl_coef: float = 0.0,
    **clips: float | None,
) -> torch.Tensor:
    """See tcopd_kernels.linear_tcopd_loss; the loss alone, for rows that all count and without clamps."""
    logprob = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap).logprob
    if reward is not None and ref_logprob is not None:
        old = logprob.detach() if old_logprob is None else old_logprob
        advantage = reward - (old - ref_logprob)
    if advantage is None:
        raise ValueError("give advantage, or reward and ref_logprob")
    loss = tcopd_policy_loss(
        logprob, advantage, old_logprob=old_logprob, rollout_logprob=rollout_logprob, weights=weights, **clips
    )
    if ref_kl_coef and ref_logprob is not None:
        loss = loss + ref_kl_coef * (weights * k3(logprob, ref_logprob)).sum()
    return loss


def full_vocab_tcopd_loss(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    target_coefficients: torch.Tensor,
    weights: torch.Tensor,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ_n w_n L_n with L_n = Σ_v π_θ(v)[log π_θ(v) − Σ_j a_{jn} log π_j(v)], or a divergence of π_θ to q.

    q ∝ Π_j π_j^{a_j}: "forward_kl" is KL(q‖π_θ), "jsd" is β KL(q‖m) + (1−β) KL(π_θ‖m), m = β q + (1−β) π_θ.
    logits [N,V] of the student, target_logits [J,N,V] of the frozen models, target_coefficients a [J,N].
    Returns (loss, per-token loss [N], per-token student entropy [N]).
    """
    log_p = torch.log_softmax(logits, dim=-1)
    log_targets = torch.log_softmax(target_logits, dim=-1)
    used = (target_coefficients != 0).unsqueeze(-1)
    target = torch.where(used, target_coefficients.unsqueeze(-1) * log_targets, 0.0).sum(0)
    if divergence == "reverse_kl":
        per_token = (log_p.exp() * (log_p - target)).sum(-1)
    else:
        log_q = torch.log_softmax(target, dim=-1)
        per_token = divergence_to(log_p, log_q, divergence, beta)
    per_token = torch.where(weights != 0, per_token, 0.0)
    return (weights * per_token).sum(), per_token, -(log_p.exp() * log_p).sum(-1)


def divergence_to(log_p: torch.Tensor, log_q: torch.Tensor, divergence: str, beta: float = 0.5) -> torch.Tensor:
    """Divergence [N] of log_p [N,V] to log_q [N,V], both normalised; "reverse_kl" is KL(p‖q)."""
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "forward_kl":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) = Σ_v p_v (log p_v − log q_v), [N]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear_tcopd_step(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ref_logprob: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    lambdas: torch.Tensor,
    *,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    old_logprob: torch.Tensor | None = None,
    rollout_logprob: torch.Tensor | None = None,
    normalizer: str = "active",
    base_logprobs: torch.Tensor | None = None,
    ref_kl_coef: float = 0.0,
    **clips: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See tcopd_kernels.linear_tcopd_step, from the frozen models' logprobs, for rows that all count, without clamps.

    base_logprobs: [K, N], bases of their own for the teachers. Returns (loss, advantage [N], reward [N]).
    """
    logprob = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap).logprob
    advantage, reward = contrastive_advantage(
        logprob.detach() if old_logprob is None else old_logprob,
        ref_logprob if base_logprobs is None else base_logprobs,
        teacher_logprobs,
        lambdas,
        normalizer=normalizer,
        student_ref_logprob=ref_logprob,
    )
    loss = tcopd_policy_loss(
        logprob, advantage, old_logprob=old_logprob, rollout_logprob=rollout_logprob, weights=weights, **clips
    )
    return loss + ref_kl_coef * (weights * k3(logprob, ref_logprob)).sum(), advantage, reward


def topk_tcopd_loss(
    logits: torch.Tensor,
    topk_ids: torch.Tensor,
    target: torch.Tensor,
    target_tail: torch.Tensor,
    divergence: str = "reverse_kl",
    tail_floor: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L [N], tail mass of the student [N]) of tcopd_kernels.topk_tcopd_loss, token by token.

    logits [N,V]; topk_ids [N,M], −1 pads; target t [N,M] of the tokens and [N] of the tail.
    """
    losses, tails = [logits.new_zeros(0)], [logits.new_zeros(0)]
    for n, log_p in enumerate(torch.log_softmax(logits, dim=-1)):
        ids = topk_ids[n][topk_ids[n] >= 0]
        tail = log_p.index_fill(0, ids, -torch.inf).exp().sum()
        coarse = torch.cat([log_p[ids], tail.clamp_min(tail_floor).log().view(1)])
        t = torch.cat([target[n][topk_ids[n] >= 0], target_tail[n : n + 1]])
        p = torch.cat([log_p[ids].exp(), tail.view(1)])
        log_q = torch.log_softmax(t, dim=0)
        loss = (p * (coarse - t)).sum() if divergence == "reverse_kl" else (log_q.exp() * (log_q - coarse)).sum()
        losses.append(loss.view(1))
        tails.append(tail.view(1))
    return torch.cat(losses), torch.cat(tails)
