from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcopd_kernels import contrastive_advantage, reference


def logprobs(*shape, seed=0):
    return -torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4


OLD, REF, TEACHERS = logprobs(6, seed=1), logprobs(6, seed=2), logprobs(2, 6, seed=3)


def test_plain_distillation():
    """K=1, λ=1: A = log π_T − log π_old."""
    advantage, reward = contrastive_advantage(OLD, REF, TEACHERS[:1], [1.0])
    torch.testing.assert_close(advantage, TEACHERS[0] - OLD)
    torch.testing.assert_close(reward, TEACHERS[0] - REF)


def test_zero_weight_teacher_reduces_to_extrapolated_distillation():
    """λ=(1.5, 0) is one teacher with λ=1.5, not half of it."""
    one = contrastive_advantage(OLD, REF, TEACHERS[:1], [1.5])
    two = contrastive_advantage(OLD, REF, TEACHERS, [1.5, 0.0])
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(one[0], 1.5 * (TEACHERS[0] - REF) - (OLD - REF))


def test_two_signed_teachers_with_each_normalizer():
    terms = 1.5 * (TEACHERS[0] - REF) - 0.5 * (TEACHERS[1] - REF)
    for normalizer, divisor in (("active", 2), ("count", 2), ("none", 1)):
        advantage, reward = contrastive_advantage(OLD, REF, TEACHERS, [1.5, -0.5], normalizer=normalizer)
        torch.testing.assert_close(reward, terms / divisor)
        torch.testing.assert_close(advantage, terms / divisor - (OLD - REF))
    _, reward = contrastive_advantage(OLD, REF, TEACHERS, [1.5, 0.0], normalizer="count")
    torch.testing.assert_close(reward, 1.5 * (TEACHERS[0] - REF) / 2)


@pytest.mark.parametrize("lambdas", [[1.5, 0.5], [3.0, -1.0], [1.0, 0.0]])
def test_reference_drops_out_when_the_normalised_weights_sum_to_one(lambdas):
    first, _ = contrastive_advantage(OLD, REF, TEACHERS, lambdas)
    second, _ = contrastive_advantage(OLD, REF - 7.0, TEACHERS, lambdas)
    torch.testing.assert_close(first, second)
    shifted, _ = contrastive_advantage(OLD, REF - 7.0, TEACHERS, [2.0, 1.0])
    assert (shifted - contrastive_advantage(OLD, REF, TEACHERS, [2.0, 1.0])[0]).abs().min() > 1


@pytest.mark.parametrize("garbage", [float("nan"), -float("inf"), float("inf")])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_teacher_that_was_not_run_cannot_poison(garbage, per_token):
    teachers = TEACHERS.clone()
    lambdas = torch.tensor([1.5, 0.0], dtype=torch.float64)
    teachers[1] = garbage
    if per_token:
        lambdas = lambdas.unsqueeze(1).repeat(1, 6)
        lambdas[:, 3], teachers[0, 3] = 0.0, garbage
    advantage, reward = contrastive_advantage(OLD, REF, teachers, lambdas, logratio_clamp=2.0)
    assert torch.isfinite(advantage).all() and torch.isfinite(reward).all()
    if per_token:
        assert reward[3] == 0
        torch.testing.assert_close(advantage[3], REF[3] - OLD[3])


def test_active_counts_teachers_per_token():
    lambdas = torch.tensor([[2.0, 2.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0, 3.0]])
    _, reward = contrastive_advantage(OLD, REF, TEACHERS, lambdas)
    delta = TEACHERS - REF
    expected = [
        (2 * delta[0, 0] + delta[1, 0]) / 2, 2 * delta[0, 1], 0 * delta[0, 2],
        (delta[0, 3] + delta[1, 3]) / 2, delta[0, 4], 3 * delta[1, 5],
    ]  # fmt: skip
    torch.testing.assert_close(reward, torch.stack(expected))


def test_base_of_its_own_for_each_teacher():
    bases, student_ref = logprobs(2, 6, seed=4), logprobs(6, seed=5)
    advantage, reward = contrastive_advantage(OLD, bases, TEACHERS, [1.5, -0.5], student_ref_logprob=student_ref)
    expected = (1.5 * (TEACHERS[0] - bases[0]) - 0.5 * (TEACHERS[1] - bases[1])) / 2
    torch.testing.assert_close(reward, expected)
    torch.testing.assert_close(advantage, expected - (OLD - student_ref))
    with pytest.raises(ValueError, match="student_ref_logprob is required"):
        contrastive_advantage(OLD, bases, TEACHERS, [1.5, -0.5])


def test_clamps():
    teachers = torch.tensor([[-50.0, -0.1], [-0.2, -60.0]], dtype=torch.float64)
    ref = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    old = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    _, reward = contrastive_advantage(old, ref, teachers, [1.0, -1.0], logratio_clamp=5.0, normalizer="none")
    torch.testing.assert_close(reward, torch.tensor([-5.0 - 0.8, 0.9 + 5.0], dtype=torch.float64))
    advantage, reward = contrastive_advantage(old, ref, teachers, [1.0, -1.0], advantage_clamp=3.0, normalizer="none")
    assert advantage.tolist() == [-3.0, 3.0] and reward.abs().min() > 40


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n_teachers=st.integers(1, 4),
    n_tokens=st.integers(1, 6),
    normalizer=st.sampled_from(["active", "count", "none"]),
    per_token=st.booleans(),
    own_bases=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_token_by_token_definition(n_teachers, n_tokens, normalizer, per_token, own_bases, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (n_teachers, n_tokens) if per_token else (n_teachers,)
    lambdas = torch.randint(-2, 3, shape, generator=generator).double() / 2
    old, teachers = logprobs(n_tokens, seed=seed + 1), logprobs(n_teachers, n_tokens, seed=seed + 2)
    ref = logprobs(*((n_teachers, n_tokens) if own_bases else (n_tokens,)), seed=seed + 3)
    student_ref = logprobs(n_tokens, seed=seed + 4) if own_bases else None
    arguments = {"normalizer": normalizer, "student_ref_logprob": student_ref}
    value = contrastive_advantage(old, ref, teachers, lambdas, **arguments)
    expected = reference.contrastive_advantage(old, ref, teachers, lambdas, **arguments)
    for a, b in zip(value, expected, strict=True):
        torch.testing.assert_close(a, b)
    # The same advantage as a log-ratio to a mixture of signed weights that sum to 1.
    if not own_bases:
        lambdas = lambdas if per_token else lambdas.unsqueeze(1).expand(-1, n_tokens)
        count = {"active": (lambdas != 0).sum(0).clamp_min(1), "count": n_teachers, "none": 1}[normalizer]
        a = lambdas / count
        torch.testing.assert_close(value[0], (a * teachers).sum(0) + (1 - a.sum(0)) * ref - old)


def test_result_is_a_constant_in_fp32():
    old = OLD.float().requires_grad_()
    advantage, reward = contrastive_advantage(old, REF.bfloat16(), TEACHERS.float(), torch.tensor([1.0, 1.0]))
    assert advantage.dtype == reward.dtype == torch.float32
    assert not advantage.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambdas": [1.0]}, r"lambdas must have shape \[2\] or \[2, 6\]"),
        ({"normalizer": "mean"}, "normalizer must be one of"),
        ({"old_logprob": OLD.unsqueeze(0)}, r"old_logprob must have shape \[N\]"),
        ({"teacher_logprobs": TEACHERS[0]}, r"teacher_logprobs must have shape \[K, 6\]"),
        ({"teacher_logprobs": TEACHERS[:, :5]}, r"teacher_logprobs must have shape \[2, 6\], got \[2, 5\]"),
        ({"ref_logprob": REF[:5]}, r"ref_logprob must have shape \[6\]"),
        ({"logratio_clamp": 0.0}, "logratio_clamp must be in"),
        ({"advantage_clamp": -1}, "advantage_clamp must be in"),
    ],
)
def test_bad_arguments_are_named(change, message):
    call = {"old_logprob": OLD, "ref_logprob": REF, "teacher_logprobs": TEACHERS, "lambdas": [1.0, 1.0], **change}
    with pytest.raises(ValueError, match=message):
        contrastive_advantage(**call)
