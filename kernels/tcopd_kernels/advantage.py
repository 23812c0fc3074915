"""Contrastive reward and advantage of sampled tokens from teacher and reference log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import accumulation_dtype, check_float_tensor, check_number, check_vector

NORMALIZERS = ("active", "count", "none")


@torch.no_grad()
def contrastive_advantage(
    old_logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    lambdas: torch.Tensor | Sequence[float],
    *,
    normalizer: str = "active",
    logratio_clamp: float | None = None,
    advantage_clamp: float | None = None,
    student_ref_logprob: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token reward and advantage; both are constants (no gradient).

        r_n = (1/Z_n) Σ_k λ_k [log π_k(y_n) − log π_ref(y_n)]
        A_n = r_n − [log π_old(y_n) − log π_ref(y_n)]

    Z is the number of teachers with λ ≠ 0 ("active"), K ("count") or 1 ("none"). A teacher with λ = 0 takes
    no part, whatever its log-probability is, NaN included; a token without any active teacher has r = 0.
    K=1, λ=1 gives on-policy distillation, A = log π_1 − log π_old. Whenever Σ_k λ_k / Z = 1 the reference
    cancels in A, and any finite values may stand in for it.

    Args:
        old_logprob: [N] sampling policy.
        ref_logprob: [N], or [K, N] for a base of its own for each teacher.
        teacher_logprobs: [K, N].
        lambdas: K numbers, a tensor [K], or [K, N] for weights per token.
        logratio_clamp: clamps each log π_k − log π_ref to ±this, in nats.
        advantage_clamp: clamps A to ±this, in nats.
        student_ref_logprob: [N] reference of the student's own term; required when ref_logprob is [K, N].

    Returns:
        (advantage [N], reward [N]), fp32, or float64 if any log-probability is float64.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, shape, device or value.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    check_number("logratio_clamp", logratio_clamp, low=0.0, optional=True)
    check_number("advantage_clamp", advantage_clamp, low=0.0, optional=True)
    old, ref, teachers, student_ref = _check_logprobs(old_logprob, ref_logprob, teacher_logprobs, student_ref_logprob)
    lambdas = _check_lambdas(lambdas, teachers)

    active = lambdas != 0  # [K, N]
    log_ratio = torch.where(active, teachers - ref, 0.0)
    if logratio_clamp is not None:
        log_ratio = log_ratio.clamp(-logratio_clamp, logratio_clamp)
    reward = (lambdas * log_ratio).sum(0) / normalizing_count(active, normalizer)
    advantage = reward - (old - student_ref)
    if advantage_clamp is not None:
        advantage = advantage.clamp(-advantage_clamp, advantage_clamp)
    return advantage, reward


def normalizing_count(active: torch.Tensor, normalizer: str) -> torch.Tensor | int:
    """Z of the reward for active [K, N]; never 0."""
    if normalizer == "active":
        return active.sum(0).clamp_min(1)
    return max(len(active), 1) if normalizer == "count" else 1


def _check_logprobs(
    old_logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    student_ref_logprob: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(old [N], ref [1 or K, N], teachers [K, N], student_ref [N]) in one floating dtype."""
    old = check_float_tensor("old_logprob", old_logprob)
    teachers = check_float_tensor("teacher_logprobs", teacher_logprobs)
    ref = check_float_tensor("ref_logprob", ref_logprob)
    if old.dim() != 1:
        raise ValueError(f"old_logprob must have shape [N], got {list(old.shape)}")
    n_tokens, device = len(old), old.device
    if teachers.dim() != 2:
        raise ValueError(f"teacher_logprobs must have shape [K, {n_tokens}], got {list(teachers.shape)}")
    check_vector("teacher_logprobs", teachers, (len(teachers), n_tokens), device)
    if ref.dim() == 2:
        check_vector("ref_logprob", ref, (len(teachers), n_tokens), device)
        if student_ref_logprob is None:
            raise ValueError("student_ref_logprob is required when ref_logprob has one row per teacher")
        student_ref = check_vector("student_ref_logprob", student_ref_logprob, (n_tokens,), device)
    else:
        check_vector("ref_logprob", ref, (n_tokens,), device)
        student_ref = ref
        if student_ref_logprob is not None:
            student_ref = check_vector("student_ref_logprob", student_ref_logprob, (n_tokens,), device)
        ref = ref.unsqueeze(0)
    dtype = accumulation_dtype(old.dtype, ref.dtype, teachers.dtype, student_ref.dtype)
    return old.to(dtype), ref.to(dtype), teachers.to(dtype), student_ref.to(dtype)


def _check_lambdas(lambdas: torch.Tensor | Sequence[float], teachers: torch.Tensor) -> torch.Tensor:
    """[K, N] in the dtype and on the device of teachers [K, N]."""
    return expand_lambdas(lambdas, *teachers.shape).to(teachers)


def expand_lambdas(lambdas: torch.Tensor | Sequence[float], n_teachers: int, n_tokens: int) -> torch.Tensor:
    """Numbers or a tensor, [K] or [K, N], as a [K, N] tensor (a view where possible)."""
    tensor = lambdas if isinstance(lambdas, torch.Tensor) else torch.tensor(lambdas, dtype=torch.float64)
    if tensor.shape not in ((n_teachers,), (n_teachers, n_tokens)):
        raise ValueError(
            f"lambdas must have shape [{n_teachers}] or [{n_teachers}, {n_tokens}], one weight per teacher, "
            f"got {list(tensor.shape)}"
        )
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1).expand(n_teachers, n_tokens)
