"""The numbers of one step, reduced over ranks. Names follow the stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tcopd_fast.balance import Share
from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.learner import UpdateResult
from tcopd_fast.reward import normalizer_count
from tcopd_fast.types import Batch, RewardedRollout

# Log-ratios kept per rank for percentiles; means are exact.
QUANTILE_TOKENS = 16384


def step_metrics(
    config: Config,
    world: World,
    domains: Sequence[str],
    rewarded: Sequence[RewardedRollout],
    minibatches: Sequence[Sequence[Batch]],
    update: UpdateResult,
) -> dict[str, float]:
    """Every metric of a step but times and memory. A collective; equal on every rank.

    `rewarded` and `update.old_logprobs` are this rank's, in the same order.
    """
    metrics: dict[str, float] = {}
    metrics |= _rollout_metrics(world, rewarded)
    ages = [-float(item.scored.rollout.version) for item in rewarded]
    metrics["rollout/version"] = -world.max({"age": max(ages, default=-math.inf)})["age"]
    for name in config.teachers:
        metrics |= _teacher_metrics(config, world, domains, name, rewarded, update.old_logprobs)
    metrics |= _reward_metrics(config, world, rewarded, update.old_logprobs)
    if len(domains) > 1:
        metrics |= _domain_metrics(config, world, domains, rewarded, update.old_logprobs)
    counts = world.sum({"tokens": float(sum(len(r.reward) for r in rewarded))})
    metrics["batch/tokens"] = counts["tokens"]
    metrics["batch/microbatches"] = float(sum(len(batches) for batches in minibatches))
    metrics |= _loss_metrics(config, world, update)
    metrics["learner/grad_norm"] = update.grad_norm
    metrics["learner/lr"] = update.lr
    metrics["learner/skipped_steps"] = float(update.skipped)
    return metrics


def routing_metrics(
    config: Config, world: World, needs: Mapping[Any, Sequence[int]], rewarded: Sequence[RewardedRollout]
) -> dict[str, float]:
    """What λ = 0 saved in this step's scoring, and the tokens that scoring and learning ran over. A collective.

    needs: indices of the samples that every distinct frozen model scored. A forward runs over prompt and response, so
    the share routed away counts both.
    """
    lengths = [len(item.scored.rollout.prompt.token_ids) + len(item.scored.rollout.token_ids) for item in rewarded]
    sums = world.sum(
        {name: float(sum(bool(item.lambdas[name]) for item in rewarded)) for name in config.teachers}
        | {
            ".samples": float(len(rewarded)),
            ".tokens": float(sum(lengths)),
            ".old": float(
                sum(n for n, item in zip(lengths, rewarded, strict=True) if item.scored.old_logprob is not None)
            ),
            ".pairs": float(len(needs) * sum(lengths)),
            ".scored": float(sum(lengths[i] for indices in needs.values() for i in indices)),
        }
    )
    shares = {f"scoring/{name}/sample_share": _mean(sums[name], sums[".samples"]) for name in config.teachers}
    return shares | {
        "scoring/routed_away_share": 1.0 - _mean(sums[".scored"], sums[".pairs"]),
        "scoring/tokens": sums[".scored"] + sums[".old"],
        "learner/tokens": sums[".tokens"] * config.learner.epochs,
    }


def generation_metrics(
    world: World, share: Share, needs: Mapping[Any, Sequence[int]], ahead: Mapping[str, float]
) -> dict[str, float]:
    """How responses came to this step's batch and were spread over the ranks. A collective.

    needs: as `routing_metrics` takes it. ahead: this rank's counts of partial batches, summed here.
    """
    lengths = [len(r.prompt.token_ids) + len(r.token_ids) for r in share.rollouts]
    early = sum(lengths[i] for key, indices in needs.items() for i in indices if key in share.scores[i])
    sums = world.sum(
        {
            ".early": float(early),
            ".all": float(sum(lengths[i] for indices in needs.values() for i in indices)),
            "rollout/responses": float(len(share.rollouts)),
            **ahead,
        }
    )
    return {
        "scoring/early_share": _mean(sums.pop(".early"), sums.pop(".all")),
        "batch/imbalance": share.imbalance,
        "batch/imbalance_before": share.imbalance_before,
        **sums,
    }


def token_samples(
    config: Config, step: int, rewarded: Sequence[RewardedRollout], old: Sequence[Tensor], decode: Any, count: int
) -> list[dict[str, Any]]:
    """Records of the first `count` responses for the report: every token with its parts of the advantage."""
    records = []
    for item, old_logprob in list(zip(rewarded, old, strict=True))[:count]:
        rollout = item.scored.rollout
        teachers = {}
        for name, value in item.lambdas.items():
            if value:
                teachers[name] = {
                    "lambda": value,
                    "logratio": log_ratio(item, name, old_logprob),
                    "contribution": contribution(config, item, name, old_logprob),
                }
        records.append(
            {
                "step": step,
                "prompt_id": rollout.prompt.id,
                "domain": rollout.prompt.domain,
                "problem": rollout.prompt.problem,
                "correct": item.correct,
                "tokens": [decode([token]) for token in rollout.token_ids],
                "old_logprob": old_logprob,
                "advantage": advantage_of(config, item, old_logprob),
                "reward": logged_reward(item, old_logprob),
                "teachers": teachers,
            }
        )
    return records


def advantage_of(config: Config, item: RewardedRollout, old_logprob: Tensor) -> Tensor:
    """A = r − (log π_old − log π_ref), clamped as configured: float32 [L]."""
    advantage = item.reward - (old_logprob - item.ref_logprob)
    clamp = config.objective.advantage_clamp
    return advantage if clamp is None else advantage.clamp(-clamp, clamp)


def logged_reward(item: RewardedRollout, old_logprob: Tensor) -> Tensor:
    """r_t as people read it, float32 [L]: measured against log π_old where the reference was not run."""
    return item.reward if item.scored.ref_logprob is not None else item.reward - old_logprob


def log_ratio(item: RewardedRollout, teacher: str, old_logprob: Tensor) -> Tensor:
    """log π_k − log π_ref of one teacher, with its own base where it has one: float32 [L], before clamping.

    Where the reference cancelled and was not run, log π_old stands in for it: the contributions λ_k/K·ratio then
    still add up to the advantage.
    """
    reference = item.ref_logprob if item.scored.ref_logprob is not None else old_logprob
    base = item.scored.teacher_ref_logprobs.get(teacher, reference)
    return item.scored.teacher_logprobs[teacher] - base


def contribution(config: Config, item: RewardedRollout, teacher: str, old_logprob: Tensor) -> Tensor:
    """(λ_k/K)·(log π_k − log π_ref), clamped as configured: what one teacher adds to the advantage, float32 [L]."""
    ratio = log_ratio(item, teacher, old_logprob)
    clamp = config.objective.logratio_clamp
    ratio = ratio if clamp is None else ratio.clamp(-clamp, clamp)
    return ratio * item.lambdas[teacher] / normalizer_count(config, item.lambdas)


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _rollout_metrics(world: World, rewarded: Sequence[RewardedRollout]) -> dict[str, float]:
    rollouts = [item.scored.rollout for item in rewarded]
    judged = [item.correct for item in rewarded if item.correct is not None]
    sums = world.sum(
        {
            "count": float(len(rollouts)),
            "length": float(sum(len(r.token_ids) for r in rollouts)),
            "truncated": float(sum(r.finish_reason == "length" for r in rollouts)),
            "correct": float(sum(judged)),
            "judged": float(len(judged)),
        }
    )
    metrics = {
        "rollout/response_length_mean": _mean(sums["length"], sums["count"]),
        "rollout/truncated_share": _mean(sums["truncated"], sums["count"]),
    }
    if sums["judged"]:
        metrics["rollout/accuracy"] = _mean(sums["correct"], sums["judged"])
    return metrics


def _teacher_metrics(
    config: Config,
    world: World,
    domains: Sequence[str],
    name: str,
    rewarded: Sequence[RewardedRollout],
    old: Sequence[Tensor],
) -> dict[str, float]:
    sums = {key: 0.0 for key in ("count", "ratio", "agree", "clamped")}
    sums |= {f"{part}/{domain}": 0.0 for domain in domains for part in ("kl", "tokens")}
    ratios: list[Tensor] = []
    clamp = config.objective.logratio_clamp
    for item, old_logprob in zip(rewarded, old, strict=True):
        value = item.lambdas[name]
        if not value:
            continue
        domain = item.scored.rollout.prompt.domain
        sums[f"kl/{domain}"] += float((old_logprob - item.scored.teacher_logprobs[name]).sum())
        sums[f"tokens/{domain}"] += len(old_logprob)
        if item.scored.ref_logprob is None:
            continue
        ratio = log_ratio(item, name, old_logprob)
        ratios.append(ratio)
        sums["count"] += len(ratio)
        sums["ratio"] += float(ratio.sum())
        signs = torch.sign(value * ratio) == torch.sign(advantage_of(config, item, old_logprob))
        sums["agree"] += float(signs.sum())
        sums["clamped"] += float((ratio.abs() > clamp).sum()) if clamp is not None else 0.0
    sums = world.sum(sums)
    local = torch.cat(ratios) if ratios else torch.zeros(0)
    kept = torch.cat(world.gather(local[:: max(1, math.ceil(len(local) / QUANTILE_TOKENS))]))
    metrics = {
        f"scoring/{name}/reverse_kl/{domain}": _mean(sums[f"kl/{domain}"], sums[f"tokens/{domain}"])
        for domain in domains
        if sums[f"tokens/{domain}"]
    }
    if sums["count"]:
        low, high = torch.quantile(kept[:: max(1, math.ceil(len(kept) / 1_000_000))], torch.tensor([0.05, 0.95]))
        metrics |= {
            f"scoring/{name}/logratio_mean": sums["ratio"] / sums["count"],
            f"scoring/{name}/logratio_p5": float(low),
            f"scoring/{name}/logratio_p95": float(high),
            f"reward/{name}/sign_agreement": sums["agree"] / sums["count"],
            f"reward/{name}/clamp_fraction": sums["clamped"] / sums["count"],
        }
    return metrics


def _reward_metrics(
    config: Config, world: World, rewarded: Sequence[RewardedRollout], old: Sequence[Tensor]
) -> dict[str, float]:
    clamp = config.objective.advantage_clamp
    sums = {key: 0.0 for key in ("count", "reward", "advantage", "square", "clamped")}
    for item, old_logprob in zip(rewarded, old, strict=True):
        advantage = advantage_of(config, item, old_logprob).double()
        sums["count"] += len(advantage)
        sums["reward"] += float(logged_reward(item, old_logprob).double().sum())
        sums["advantage"] += float(advantage.sum())
        sums["square"] += float(advantage.square().sum())
        sums["clamped"] += float((advantage.abs() >= clamp).sum()) if clamp is not None else 0.0
    sums = world.sum(sums)
    mean = _mean(sums["advantage"], sums["count"])
    return {
        "reward/mean": _mean(sums["reward"], sums["count"]),
        "reward/advantage_mean": mean,
        "reward/advantage_std": math.sqrt(max(0.0, _mean(sums["square"], sums["count"]) - mean * mean)),
        "reward/clamp_fraction": _mean(sums["clamped"], sums["count"]),
    }


def _domain_metrics(
    config: Config,
    world: World,
    domains: Sequence[str],
    rewarded: Sequence[RewardedRollout],
    old: Sequence[Tensor],
) -> dict[str, float]:
    """`<metric>/<domain>` for every domain that has a sample in this step."""
    members: dict[str, list[int]] = {domain: [] for domain in domains}
    for i, item in enumerate(rewarded):
        members[item.scored.rollout.prompt.domain].append(i)
    sums = world.sum(
        {f"samples/{domain}": float(len(own)) for domain, own in members.items()}
        | {f"tokens/{domain}": float(sum(len(old[i]) for i in own)) for domain, own in members.items()}
        | {f"logprob/{domain}": float(sum(old[i].double().sum() for i in own)) for domain, own in members.items()}
    )
    samples, tokens = (sum(sums[f"{part}/{domain}"] for domain in domains) for part in ("samples", "tokens"))
    metrics: dict[str, float] = {}
    for domain, own in members.items():
        values = _rollout_metrics(world, [rewarded[i] for i in own])
        values |= _reward_metrics(config, world, [rewarded[i] for i in own], [old[i] for i in own])
        values["data/share"] = _mean(sums[f"samples/{domain}"], samples)
        values["batch/token_share"] = _mean(sums[f"tokens/{domain}"], tokens)
        # Sampled tokens follow the student, so their mean surprise estimates its entropy.
        values["loss/entropy_estimate"] = _mean(-sums[f"logprob/{domain}"], sums[f"tokens/{domain}"])
        if sums[f"samples/{domain}"]:
            metrics |= {f"{key}/{domain}": value for key, value in values.items()}
    return metrics


def _loss_metrics(config: Config, world: World, update: UpdateResult) -> dict[str, float]:
    optimizer_steps = config.learner.minibatches * config.learner.epochs
    sums: Mapping[str, float] = world.sum(update.sums)
    maxima = world.max(update.maxima)
    count = sums["token_count"]
    square = sums["ratio_sq_sum"]
    metrics = {
        "loss/value": sums["loss"] / optimizer_steps,
        "loss/entropy": _mean(sums["entropy_sum"], count),
        "loss/ratio_mean": _mean(sums["ratio_sum"], count),
        "loss/ratio_max": maxima["ratio_max"],
        "loss/clip_fraction": _mean(sums["clipped_count"] + sums["dual_clipped_count"], count),
        "loss/effective_sample_size": _mean(sums["ratio_sum"] ** 2, count * square) if square else float("nan"),
        "loss/mismatch_weight_mean": _mean(sums["is_weight_sum"], count),
        "loss/mismatch_capped_fraction": _mean(sums["is_capped_count"], count),
    }
    if config.objective.ref_kl_coef:
        metrics["loss/ref_kl"] = _mean(sums["ref_kl_sum"], count)
    if "column_sum" in sums:
        rows = sums["grad_row_count"]
        metrics |= {
            "loss/dropped_mass_mean": _mean(sums["dropped_mass_sum"], rows),
            "loss/dropped_mass_max": maxima["dropped_mass_max"],
            "loss/dense_row_share": _mean(sums["dense_row_count"], rows),
            "loss/kept_column_share": _mean(sums["kept_column_sum"], sums["column_sum"]),
        }
    return metrics
