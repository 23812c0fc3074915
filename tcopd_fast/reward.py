"""Stage 4, reward: the contrastive reward of every sampled token. Pure functions.

    r_t = (1/K) Σ_k λ_k [log π_k(y_t) − log π_ref(y_t)]

The advantage A_t = r_t − [log π_old(y_t) − log π_ref(y_t)] is formed in the loss, because log π_old of a strictly
on-policy step is the learner's own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tcopd_kernels import contrastive_advantage
from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.types import RewardedRollout, ScoredRollout


def lambdas_at(config: Config, domain: str, step: int) -> dict[str, float]:
    """λ of every teacher for a sample of `domain` at `step` (from 0); negative ones grow linearly in the warm-up.

    They are never exactly 0 on the way: that would change K and so the weight of every other teacher.
    """
    warmup = config.objective.lambda_warmup_steps
    scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return {name: value * scale if value < 0 else value for name, value in config.lambdas_for(domain).items()}


def normalizer_count(config: Config, lambdas: Mapping[str, float]) -> float:
    """K of the formula for one sample."""
    kind = config.objective.normalizer
    if kind == "none":
        return 1.0
    return float(len(lambdas) if kind == "count" else sum(1 for value in lambdas.values() if value))


def reference_cancels(config: Config, lambdas: Mapping[str, float]) -> bool:
    """True when log π_ref drops out of the advantage (Σλ/K = 1) and the configuration allows skipping it.

    Clamps of the log-ratio, a KL penalty and teachers with a base of their own all need the reference.
    """
    objective = config.objective
    if not config.scoring.skip_unused_reference or objective.logratio_clamp is not None or objective.ref_kl_coef:
        return False
    active = {name: value for name, value in lambdas.items() if value}
    if not active or any(config.teachers[name].base is not None for name in active):
        return False
    return abs(sum(active.values()) / normalizer_count(config, lambdas) - 1.0) < 1e-12


def reference_ever_needed(config: Config) -> bool:
    """False when the reference cancels for every λ table at every step, so that it need not be loaded."""
    if config.objective.lambda_warmup_steps:
        return True
    return not all(reference_cancels(config, config.lambdas_for(domain or "")) for domain in config.lambda_tables())


def compute_reward(
    config: Config,
    scored: Sequence[ScoredRollout],
    lambdas: Sequence[Mapping[str, float]],
    correct: Sequence[bool | None],
    judge_baseline: float = 0.0,
) -> list[RewardedRollout]:
    """Reward of every token of every rollout.

    lambdas: teacher -> λ in force, one table per rollout. judge_baseline: mean verdict of the whole batch,
    subtracted when objective.judge_coef mixes the verdict in.
    """
    lengths = [len(item.rollout.token_ids) for item in scored]
    names = list(config.teachers)
    ref_N = torch.cat([_ref(item) for item in scored])
    teacher_KN = torch.stack([torch.cat([_teacher(item, name) for item in scored]) for name in names])
    lambda_KN = torch.stack(
        [torch.cat([torch.full((n,), t[name]) for n, t in zip(lengths, lambdas, strict=True)]) for name in names]
    )
    has_bases = any(config.teachers[name].base is not None for name in names)
    base_KN = (
        torch.stack([torch.cat([item.teacher_ref_logprobs.get(name, _ref(item)) for item in scored]) for name in names])
        if has_bases
        else ref_N
    )
    # With log π_old = log π_ref the advantage is the reward itself; only the reward is used here.
    _, reward_N = contrastive_advantage(
        ref_N,
        base_KN,
        teacher_KN,
        lambda_KN,
        normalizer=config.objective.normalizer,
        logratio_clamp=config.objective.logratio_clamp,
        student_ref_logprob=ref_N if has_bases else None,
    )
    rewards = reward_N.split(lengths)
    refs = ref_N.split(lengths)
    coef = config.objective.judge_coef
    return [
        RewardedRollout(
            scored=item,
            reward=reward + coef * (float(verdict) - judge_baseline) if coef and verdict is not None else reward,
            ref_logprob=ref,
            lambdas=table,
            correct=verdict,
        )
        for item, reward, ref, table, verdict in zip(scored, rewards, refs, lambdas, correct, strict=True)
    ]


def _ref(item: ScoredRollout) -> Tensor:
    return item.ref_logprob if item.ref_logprob is not None else torch.zeros(len(item.rollout.token_ids))


def _teacher(item: ScoredRollout, name: str) -> Tensor:
    missing = torch.full((len(item.rollout.token_ids),), float("nan"))
    return item.teacher_logprobs.get(name, missing)
