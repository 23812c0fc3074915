"""From the split softmax statistics of student, references and teachers to the loss and its gradient.

One program owns a few tokens: it merges the vocabulary splits of every model, in order, and computes reward,
advantage, ratio, clipped loss and d loss / d logprob of its tokens, and its share of the metric sums. The equations
are those of contrastive_advantage, tcopd_policy_loss and k3_penalty. No atomics: the shares of the programs are
added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._triton_common import compile_options, on_device
from ._triton_multi import SplitPartials, upload
from .policy_loss import MAX_LOG_RATIO

METRICS = (
    "token_count", "advantage_sum", "advantage_sq_sum", "ratio_sum", "ratio_sq_sum", "clipped_count",
    "dual_clipped_count", "approx_kl_sum", "is_weight_sum", "is_weight_sq_sum", "is_capped_count", "ref_kl_sum",
)  # fmt: skip
# Columns of `parts`: the metrics, then these two.
LOSS = tl.constexpr(len(METRICS))
RATIO_MAX = tl.constexpr(len(METRICS) + 1)
PART_COLUMNS = tl.constexpr(len(METRICS) + 2)
LIMIT = tl.constexpr(MAX_LOG_RATIO)
TILE_ELEMENTS = 2048  # splits × rows that a program merges at once


@triton.jit
def merge_splits(
    split_max, split_sum, target_logit, splits, model, rows, row_ok, N, BLOCK_SPLITS: tl.constexpr
):  # fmt: skip
    """(logprob, lse) of one model for some rows. splits: [M, 2] first and end."""
    first = tl.load(splits + 2 * model)
    end = tl.load(splits + 2 * model + 1)
    m = tl.full(rows.shape, float("-inf"), dtype=tl.float32)
    s = tl.zeros(rows.shape, dtype=tl.float32)
    for split0 in range(first, end, BLOCK_SPLITS):
        split = split0 + tl.arange(0, BLOCK_SPLITS).to(tl.int64)
        ok = (split < end)[:, None] & row_ok[None, :]
        offset = split[:, None] * N + rows[None, :]
        m_split = tl.load(split_max + offset, mask=ok, other=float("-inf"))
        s_split = tl.load(split_sum + offset, mask=ok, other=0.0)
        m_new = tl.maximum(m, tl.max(m_split, axis=0))
        reference = tl.where(m_new == float("-inf"), 0.0, m_new)
        s = s * tl.exp(m - reference) + tl.sum(s_split * tl.exp(m_split - reference[None, :]), axis=0)
        m = m_new
    z_target = tl.load(target_logit + model * N + rows, mask=row_ok, other=0.0)
    log_s = tl.log(s)
    return (z_target - m) - log_s, m + log_s


@triton.jit(do_not_specialize=["N"])
def merge_kernel(
    split_max, split_sum, target_logit, splits, logprob, N, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """logprob [M, N]. Grid: row blocks × models."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    model = tl.program_id(1).to(tl.int64)
    value, _ = merge_splits(split_max, split_sum, target_logit, splits, model, rows, row_ok, N, BLOCK_SPLITS)
    tl.store(logprob + model * N + rows, value, mask=row_ok)


@triton.jit
def clamped(x, low, high):
    """min(max(x, low), high) that keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def contrast(
    split_max, split_sum, target_logit, splits, roles, lambdas, teacher_logprobs, ref, rows, row_ok, N,
    num_teachers, lambda_stride_k, lambda_stride_n, logratio_clamp,
    NORMALIZER: tl.constexpr, OWN_BASES: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Reward of some rows, and the teachers' logprobs [K, N], 0 where λ is."""
    reward = tl.zeros(rows.shape, dtype=tl.float32)
    num_active = tl.zeros(rows.shape, dtype=tl.float32)
    for k in range(num_teachers):
        offset = tl.cast(k, tl.int64) * lambda_stride_k + rows.to(tl.int64) * lambda_stride_n
        factor = tl.load(lambdas + offset, mask=row_ok, other=0.0)
        active = factor != 0
        teacher, _ = merge_splits(
            split_max, split_sum, target_logit, splits, tl.load(roles + 2 * k), rows, row_ok, N, BLOCK_SPLITS
        )
        base = ref
        if OWN_BASES:
            base, _ = merge_splits(
                split_max, split_sum, target_logit, splits, tl.load(roles + 2 * k + 1), rows, row_ok, N, BLOCK_SPLITS
            )
        log_ratio = clamped(tl.where(active, teacher - base, 0.0), -logratio_clamp, logratio_clamp)
        reward += factor * log_ratio
        num_active += active.to(tl.float32)
        tl.store(teacher_logprobs + tl.cast(k, tl.int64) * N + rows, tl.where(active, teacher, 0.0), mask=row_ok)
    if NORMALIZER == "active":
        reward = reward / tl.maximum(num_active, 1.0)
    if NORMALIZER == "count":
        reward = reward / tl.maximum(num_teachers, 1).to(tl.float32)
    return reward


@triton.jit
def clipped_loss(ratio, advantage, clip_low, clip_high, dual_clip):
    """(loss, d loss / d log ratio, where PPO clipped, where the dual clip applied)."""
    unclipped = -advantage * ratio
    bounded = -advantage * clamped(ratio, 1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded > unclipped
    loss = tl.where(clipped, bounded, unclipped)
    ceiling = -dual_clip * advantage
    dual_clipped = (advantage < 0) & (loss > ceiling)
    loss = tl.where(dual_clipped, ceiling, loss)
    return loss, tl.where(clipped | dual_clipped, 0.0, unclipped), clipped, dual_clipped


@triton.jit
def store_sums(part, counted, a, ratio, log_ratio, clipped, dual_clipped, is_weight, capped, k3, loss):
    """Sums over the counted tokens of a program, in the order of METRICS, LOSS, RATIO_MAX."""
    n = counted.to(tl.float32)
    tl.store(part + 0, tl.sum(n))
    tl.store(part + 1, tl.sum(a))
    tl.store(part + 2, tl.sum(a * a))
    tl.store(part + 3, tl.sum(n * ratio))
    tl.store(part + 4, tl.sum(tl.where(counted, ratio * ratio, 0.0)))
    tl.store(part + 5, tl.sum((counted & clipped).to(tl.float32)))
    tl.store(part + 6, tl.sum((counted & dual_clipped).to(tl.float32)))
    tl.store(part + 7, tl.sum(tl.where(counted, ratio - 1.0 - log_ratio, 0.0)))
    tl.store(part + 8, tl.sum(n * is_weight))
    tl.store(part + 9, tl.sum(n * is_weight * is_weight))
    tl.store(part + 10, tl.sum((counted & capped).to(tl.float32)))
    tl.store(part + 11, tl.sum(k3))
    tl.store(part + LOSS, tl.sum(loss))
    tl.store(part + RATIO_MAX, tl.max(n * ratio))


@triton.jit(do_not_specialize=["N", "num_teachers", "lambda_stride_k", "lambda_stride_n"])
def finalize_kernel(
    split_max, split_sum, target_logit, splits, roles, lambdas, old_logprob, rollout_logprob, weights,
    logprob, lse, ref_logprob, teacher_logprobs, reward, advantage, dlogprob, parts,
    N, num_teachers, lambda_stride_k, lambda_stride_n, logratio_clamp, advantage_clamp,
    clip_low, clip_high, dual_clip, is_cap, ref_kl_coef,
    NORMALIZER: tl.constexpr, HAS_REF: tl.constexpr, OWN_BASES: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Model 0 is the student and model 1, with HAS_REF, its reference. Grid: row blocks.

    roles: [K, 2] model of each teacher and of its base; any model for a teacher whose λ is 0 everywhere.
    lambdas: [K, N] by its strides. parts: [row blocks, PART_COLUMNS]. Bounds that are off come as inf, clip_low as 1.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    lp, log_norm = merge_splits(split_max, split_sum, target_logit, splits, 0, rows, row_ok, N, BLOCK_SPLITS)
    ref = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_REF:
        ref, _ = merge_splits(split_max, split_sum, target_logit, splits, 1, rows, row_ok, N, BLOCK_SPLITS)
        tl.store(ref_logprob + rows, ref, mask=row_ok)
    r = contrast(
        split_max, split_sum, target_logit, splits, roles, lambdas, teacher_logprobs, ref, rows, row_ok, N,
        num_teachers, lambda_stride_k, lambda_stride_n, logratio_clamp, NORMALIZER, OWN_BASES, BLOCK_SPLITS,
    )  # fmt: skip
    old = lp
    if HAS_OLD:
        old = tl.load(old_logprob + rows, mask=row_ok, other=0.0)
    a = clamped(r - (old - ref), -advantage_clamp, advantage_clamp)
    tl.store(logprob + rows, lp, mask=row_ok)
    tl.store(lse + rows, log_norm, mask=row_ok)
    tl.store(reward + rows, r, mask=row_ok)
    tl.store(advantage + rows, a, mask=row_ok)

    w = tl.load(weights + rows, mask=row_ok, other=0.0)
    counted = w != 0
    a = tl.where(counted, a, 0.0)
    difference = tl.where(counted, lp - old, 0.0)
    log_ratio = clamped(difference, -LIMIT, LIMIT)
    ratio = tl.exp(log_ratio)
    token_loss, slope, clipped, dual_clipped = clipped_loss(ratio, a, clip_low, clip_high, dual_clip)
    slope = tl.where((difference < -LIMIT) | (difference > LIMIT), 0.0, slope)
    is_weight = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if HAS_ROLLOUT:
        rollout = tl.load(rollout_logprob + rows, mask=row_ok, other=0.0)
        is_weight = tl.exp(clamped(tl.where(counted, old - rollout, 0.0), -LIMIT, LIMIT))
    capped = is_weight > is_cap
    is_weight = tl.where(capped, is_cap, is_weight)
    loss = w * is_weight * token_loss
    gradient = w * is_weight * slope
    k3 = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_REF:
        ahead = tl.where(counted, ref - lp, 0.0)
        growth = tl.exp(clamped(ahead, -float("inf"), LIMIT))
        k3 = growth - clamped(ahead, -float("inf"), LIMIT) - 1.0
        loss += ref_kl_coef * w * k3
        gradient -= ref_kl_coef * w * tl.where(ahead > LIMIT, 0.0, growth - 1.0)
    tl.store(dlogprob + rows, gradient, mask=row_ok)

    store_sums(
        parts + tl.program_id(0).to(tl.int64) * PART_COLUMNS, counted, a, ratio, log_ratio, clipped, dual_clipped,
        is_weight, capped, k3, loss,
    )  # fmt: skip


class Finalized(NamedTuple):
    """loss 0-dim, metrics as of linear_tcopd_loss; per token [N], teacher_logprobs [K, N]; all fp32."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logprob: torch.Tensor
    lse: torch.Tensor
    ref_logprob: torch.Tensor | None
    teacher_logprobs: torch.Tensor
    reward: torch.Tensor
    advantage: torch.Tensor
    dlogprob: torch.Tensor


def finalize(
    partials: SplitPartials,
    roles: Sequence[tuple[int, int]],
    lambdas: torch.Tensor,
    weights: torch.Tensor,
    old_logprob: torch.Tensor | None,
    rollout_logprob: torch.Tensor | None,
    *,
    has_ref: bool,
    normalizer: str,
    logratio_clamp: float | None,
    advantage_clamp: float | None,
    clips: dict[str, float | None],
    ref_kl_coef: float,
) -> Finalized:
    """Reward, advantage, loss and d loss / d logprob of N > 0 tokens.

    partials: of the student (model 0), with has_ref of its reference (model 1), and of any other models.
    roles: per teacher its model and the model of its base, any for a teacher whose λ is 0 everywhere. Without has_ref
        the base is log-probability 0.
    lambdas: [K, N] fp32, any strides. weights, old_logprob, rollout_logprob: [N] fp32.
    clips: clip_low, clip_high, dual_clip and is_cap of tcopd_policy_loss.
    """
    (num_teachers, N), device = lambdas.shape, weights.device
    # The weight 1 of a step without rollout_logprob is not capped.
    is_cap = None if rollout_logprob is None else clips["is_cap"]
    clip_low = 1.0 if clips["clip_low"] is None else clips["clip_low"]
    logprob, lse, reward, advantage, dlogprob = torch.empty(5, N, device=device)
    ref_logprob = torch.empty(N, device=device) if has_ref else None
    teacher_logprobs = torch.empty(num_teachers, N, device=device)
    block_splits, block = merge_blocks(partials)
    parts = torch.empty(triton.cdiv(N, block), PART_COLUMNS.value, device=device)
    table = upload([n for pair in (*partials.splits, *roles) for n in pair], device)
    splits, role_table = table.split([2 * len(partials.splits), 2 * num_teachers])
    with on_device(weights):
        finalize_kernel[(len(parts),)](
            *partials[:3], splits, role_table, lambdas, _packed(old_logprob), _packed(rollout_logprob),
            weights.contiguous(), logprob, lse, ref_logprob, teacher_logprobs, reward, advantage, dlogprob, parts,
            N, num_teachers, *lambdas.stride(), _or_inf(logratio_clamp), _or_inf(advantage_clamp),
            clip_low, _or_inf(clips["clip_high"]), _or_inf(clips["dual_clip"]), _or_inf(is_cap), ref_kl_coef,
            NORMALIZER=normalizer, HAS_REF=has_ref, OWN_BASES=any(base > 1 for _, base in roles),
            HAS_OLD=old_logprob is not None, HAS_ROLLOUT=rollout_logprob is not None,
            BLOCK_SPLITS=block_splits, BLOCK=block, **compile_options(4, 1),
        )  # fmt: skip
    sums = parts.sum(0)
    metrics = dict(zip(METRICS, sums, strict=False)) | {"ratio_max": parts[:, RATIO_MAX.value].amax()}
    if not has_ref:
        del metrics["ref_kl_sum"]
    loss = sums[LOSS.value]
    return Finalized(loss, metrics, logprob, lse, ref_logprob, teacher_logprobs, reward, advantage, dlogprob)


def merge_logprobs(partials: SplitPartials) -> torch.Tensor:
    """log π(y) of every model, [M, N] fp32, N > 0."""
    num_models, N = partials.target_logit.shape
    logprobs = torch.empty_like(partials.target_logit)
    block_splits, block = merge_blocks(partials)
    splits = upload([n for pair in partials.splits for n in pair], logprobs.device)
    with on_device(logprobs):
        merge_kernel[(triton.cdiv(N, block), num_models)](
            *partials[:3], splits, logprobs, N, BLOCK_SPLITS=block_splits, BLOCK=block, **compile_options(4, 1)
        )
    return logprobs


def merge_blocks(partials: SplitPartials) -> tuple[int, int]:
    """(splits, rows) that a program merges at once: all the splits of a model up to 128, and fewer rows for more."""
    most = max(end - first for first, end in partials.splits)
    block_splits = min(128, triton.next_power_of_2(most))
    return block_splits, min(128, TILE_ELEMENTS // block_splits)


def _packed(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def _or_inf(bound: float | None) -> float:
    return math.inf if bound is None else bound
