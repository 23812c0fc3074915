from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcopd_kernels import reference, tcopd_policy_loss
from tcopd_kernels.policy_loss import POLICY_METRICS, PolicyOptions, TokenTerms, merge_metrics

ADDITIVE = {
    "token_count", "advantage_sum", "advantage_sq_sum", "ratio_sum", "ratio_sq_sum", "clipped_count",
    "dual_clipped_count", "approx_kl_sum", "is_weight_sum", "is_weight_sq_sum", "is_capped_count",
}  # fmt: skip


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def loss_and_grad(logprob, advantage, **options):
    logprob = logprob.clone().requires_grad_()
    loss, metrics = tcopd_policy_loss(logprob, advantage, **options)
    return loss, torch.autograd.grad(loss, logprob)[0], metrics


def test_strictly_on_policy_is_reinforce():
    logprob, advantage, weights = tensors([-1.0, -0.2, -3.0], [2.0, -9.0, 0.5], [0.5, 0.25, 0.25])
    loss, grad, metrics = loss_and_grad(logprob, advantage, weights=weights)
    torch.testing.assert_close(loss, -(weights * advantage).sum())
    torch.testing.assert_close(grad, -weights * advantage)
    assert metrics["ratio_sum"] == 3 and metrics["clipped_count"] == 0 and metrics["approx_kl_sum"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "token_loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the range
        (1.5, 2.0, -2.4, 0.0),  # good token, already raised enough
        (0.5, 2.0, -1.0, -1.0),  # good token that fell: not clipped
        (0.5, -2.0, 1.6, 0.0),  # bad token, already lowered enough
        (1.5, -2.0, 3.0, 3.0),  # bad token that rose: not clipped
        (4.0, -2.0, 6.0, 0.0),  # bad token that rose beyond the dual clip of 3
    ],
)
def test_clipping_cases(ratio, advantage, token_loss, slope):
    old, advantage, weights = tensors([-2.0], [advantage], [1.0])
    loss, grad, metrics = loss_and_grad(old + math.log(ratio), advantage, old_logprob=old, weights=weights)
    torch.testing.assert_close(loss.item(), token_loss)
    torch.testing.assert_close(grad.item(), slope)
    assert metrics["clipped_count"] + metrics["dual_clipped_count"] == (1 if slope == 0.0 else 0)


def test_each_bound_can_be_switched_off():
    old, advantage, weights = tensors([-2.0, -2.0, -2.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0])
    logprob = old + torch.tensor([1.5, 0.5, 4.0], dtype=torch.float64).log()
    free, grad, metrics = loss_and_grad(
        logprob, advantage, old_logprob=old, weights=weights, clip_low=None, clip_high=None, dual_clip=None
    )
    torch.testing.assert_close(free.item(), -1.5 + 0.5 + 4.0)
    assert (grad != 0).all() and metrics["clipped_count"] == metrics["dual_clipped_count"] == 0
    one_sided, _, _ = loss_and_grad(logprob, advantage, old_logprob=old, weights=weights, clip_low=None)
    torch.testing.assert_close(one_sided.item(), -1.2 + 0.5 + 3.0)
    one_sided, _, _ = loss_and_grad(logprob, advantage, old_logprob=old, weights=weights, clip_high=None)
    torch.testing.assert_close(one_sided.item(), -1.5 + 0.8 + 3.0)


def test_engine_mismatch_weight_is_capped_detached_and_applied_after_clipping():
    old, rollout, advantage, weights = tensors([-2.0, -2.0], [-2.5, -6.0], [1.0, 1.0], [0.5, 0.5])
    logprob = old + torch.tensor([1.1, 1.5], dtype=torch.float64).log()
    loss, grad, metrics = loss_and_grad(
        logprob, advantage, old_logprob=old, rollout_logprob=rollout, weights=weights, is_cap=5.0
    )
    torch.testing.assert_close(loss.item(), -0.5 * (math.exp(0.5) * 1.1 + 5.0 * 1.2))
    torch.testing.assert_close(grad.tolist(), [-0.5 * math.exp(0.5) * 1.1, 0.0])
    assert metrics["is_capped_count"] == 1
    torch.testing.assert_close(metrics["is_weight_sum"].item(), math.exp(0.5) + 5.0, rtol=1e-6, atol=0)
    loss, _, metrics = loss_and_grad(
        logprob, advantage, old_logprob=old, rollout_logprob=rollout, weights=weights, is_cap=None
    )
    torch.testing.assert_close(loss.item(), -0.5 * (math.exp(0.5) * 1.1 + math.exp(4.0) * 1.2))
    # Without old_logprob the weight compares the current policy with the engine, without a gradient of its own.
    _, grad, _ = loss_and_grad(rollout + 0.3, advantage, rollout_logprob=rollout, weights=weights)
    torch.testing.assert_close(grad, -0.5 * torch.full((2,), math.exp(0.3), dtype=torch.float64))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_weight_zero_cannot_poison(garbage):
    names = ("logprob", "advantage", "old_logprob", "rollout_logprob")
    call = dict(zip(names, torch.randn(4, 5, dtype=torch.float64), strict=True))
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    dirty = {name: torch.where(weights == 0, garbage, value) for name, value in call.items()}
    kept = {name: value[weights != 0] for name, value in call.items()}
    loss, grad, metrics = loss_and_grad(**dirty, weights=weights)
    alone, grad_alone, metrics_alone = loss_and_grad(**kept, weights=weights[weights != 0])
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad[weights != 0], grad_alone)
    assert (grad[weights == 0] == 0).all()
    torch.testing.assert_close(metrics, metrics_alone)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    clip_low=st.one_of(st.none(), st.floats(0.05, 0.9)),
    clip_high=st.one_of(st.none(), st.floats(0.05, 0.9)),
    dual_clip=st.one_of(st.none(), st.floats(1.5, 4.0)),
    is_cap=st.one_of(st.none(), st.floats(0.5, 5.0)),
    with_old=st.booleans(),
    with_rollout=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_definition(clip_low, clip_high, dual_clip, is_cap, with_old, with_rollout, seed):
    generator = torch.Generator().manual_seed(seed)
    logprob, advantage, old, rollout = torch.randn(4, 32, dtype=torch.float64, generator=generator)
    options = {
        "old_logprob": old if with_old else None,
        "rollout_logprob": rollout if with_rollout else None,
        "weights": torch.rand(32, dtype=torch.float64, generator=generator) + 0.1,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "is_cap": is_cap,
    }
    loss, grad, _ = loss_and_grad(logprob, advantage, **options)
    variable = logprob.clone().requires_grad_()
    expected = reference.tcopd_policy_loss(variable, advantage, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, variable)[0])


def test_metrics_of_parts_merge_to_those_of_the_whole():
    call = dict(zip(("logprob", "advantage", "old_logprob", "rollout_logprob"), torch.randn(4, 10), strict=True))
    weights = torch.rand(10)
    weights[3] = 0
    loss, whole = tcopd_policy_loss(**call, weights=weights)
    parts = [
        tcopd_policy_loss(**{k: v[part] for k, v in call.items()}, weights=weights[part])
        for part in (slice(0, 4), slice(4, 4), slice(4, 10))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(merge_metrics([part[1] for part in parts]), whole)
    assert set(whole) == ADDITIVE | {"ratio_max"}
    assert whole["token_count"] == 9
    assert all(v.dim() == 0 and v.dtype == torch.float32 and not v.requires_grad for v in whole.values())


def test_huge_ratio_stays_finite():
    old, advantage, weights = torch.tensor([-200.0, -200.0]), torch.tensor([1.0, -1.0]), torch.ones(2)
    loss, grad, metrics = loss_and_grad(torch.zeros(2), advantage, old_logprob=old, weights=weights)
    assert torch.isfinite(grad).all() and torch.isfinite(metrics["ratio_sq_sum"])
    torch.testing.assert_close(loss.item(), -1.2 + 3.0)


def test_only_logprob_receives_a_gradient():
    call = {name: torch.randn(4, requires_grad=True) for name in ("advantage", "old_logprob", "rollout_logprob")}
    weights = torch.rand(4, requires_grad=True)
    logprob = torch.randn(4, requires_grad=True)
    loss, _ = tcopd_policy_loss(logprob, **call, weights=weights)
    loss.backward()
    assert logprob.grad is not None and weights.grad is None
    assert all(t.grad is None for t in call.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": torch.zeros(2, 3)}, r"logprob must have shape \[N\]"),
        ({"advantage": torch.zeros(2)}, r"advantage must have shape \[3\], got \[2\]"),
        ({"advantage": None}, "advantage must be a torch.Tensor"),
        ({"weights": None}, "weights must be a torch.Tensor"),
        ({"weights": torch.ones(3, dtype=torch.bool)}, "weights must be float16"),
        ({"old_logprob": torch.zeros(3, device="meta")}, "old_logprob is on meta"),
        ({"clip_low": 1.0}, "clip_low must be in"),
        ({"clip_high": -0.1}, "clip_high must be in"),
        ({"dual_clip": 1.0}, "dual_clip must be in"),
        ({"is_cap": 0.0}, "is_cap must be in"),
    ],
)
def test_bad_arguments_are_named(change, message):
    call = {"logprob": torch.zeros(3), "advantage": torch.zeros(3), "weights": torch.ones(3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        tcopd_policy_loss(call.pop("logprob"), call.pop("advantage"), **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("clips", [(0.2, 0.2, 3.0, 5.0), (None, 0.0, 1.5, None), (0.0, None, None, 1.0)])
def test_written_gradient_is_that_of_autograd(dtype, off_policy, clips):
    """Also where ratios leave the clip ranges or the limits of the exponentials, and for masked NaN."""
    generator = torch.Generator().manual_seed(0)
    n = 400
    logprob, reward, drift, engine = torch.randn(4, n, generator=generator, dtype=dtype)
    weights = torch.rand(n, generator=generator, dtype=dtype)
    drift[::20], drift[1::20], drift[2::20] = 25.0, -25.0, 0.0
    ref = logprob - 0.5
    ref[::30] += 30.0
    weights[::7] = 0.0
    reward[::7], ref[::7] = torch.nan, torch.nan
    old = logprob + drift if off_policy else None
    tokens = TokenTerms(None, reward, ref, old, logprob + engine if off_policy else None, weights)
    policy = PolicyOptions(*clips, advantage_clamp=1.0, ref_kl_coef=0.3)
    variable = logprob.clone().requires_grad_()
    loss, metrics, gradient = tokens.loss(variable, policy)
    (expected,) = torch.autograd.grad(loss, variable)
    assert torch.isfinite(expected).all() and (expected != 0).sum() > n / 10
    torch.testing.assert_close(gradient, expected)
    assert not gradient.requires_grad and gradient.dtype == dtype
    assert tuple(metrics) == tokens.metric_names() == (*POLICY_METRICS, "ref_kl_sum")
    detached_loss, _, again = tokens.loss(logprob, policy)
    assert torch.equal(again, gradient) and torch.equal(detached_loss, loss.detach())
