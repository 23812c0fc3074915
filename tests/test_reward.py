"""The objective against its definition in float64, and its reductions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.metrics import advantage_of, log_ratio, logged_reward
from tcopd_fast.reward import compute_reward, lambdas_at, reference_cancels, reference_ever_needed
from tcopd_fast.types import Prompt, Rollout, ScoredRollout


def config_with(lambdas, teachers=("a", "b"), bases=(), scoring=None, **objective) -> Config:
    return validate(
        {
            "run_dir": "r",
            "steps": 1,
            "model": {"path": "m", "dtype": "float32"},
            "teachers": {t: {"path": t, "base": f"{t}-base" if t in bases else None} for t in teachers},
            "data": {"train": [{"path": "x.jsonl"}]},
            "objective": {"lambdas": lambdas, **objective},
            "scoring": scoring or {},
        },
        Config,
    )


def scored(seed: int, length: int, teachers, domain="d", bases=(), ref=True) -> ScoredRollout:
    generator = torch.Generator().manual_seed(seed)

    def logprob():
        return -torch.rand(length, generator=generator) * 5

    rollout = Rollout(Prompt(f"p{seed}", domain, (1,), "q", "1", "s"), 0, (2,) * length, logprob(), "stop", 0, "t")
    return ScoredRollout(
        rollout,
        logprob() if ref else None,
        {t: logprob() for t in teachers},
        {t: logprob() for t in bases},
        logprob(),
    )


def oracle_advantage(item, lambdas, k, clamp=None):
    """A_t of the README, one token at a time, in Python floats."""
    out = []
    for t in range(len(item.rollout.token_ids)):
        ref = float(item.ref_logprob[t])
        reward = 0.0
        for name, value in lambdas.items():
            if value:
                base = float(item.teacher_ref_logprobs[name][t]) if name in item.teacher_ref_logprobs else ref
                ratio = float(item.teacher_logprobs[name][t]) - base
                reward += value * (max(-clamp, min(clamp, ratio)) if clamp else ratio)
        out.append(reward / k - (float(item.old_logprob[t]) - ref))
    return torch.tensor(out, dtype=torch.float64)


def advantages(config, items, domain_lambdas=None):
    tables = [lambdas_at(config, item.rollout.prompt.domain, 10**9) for item in items]
    rewarded = compute_reward(config, items, tables, [None] * len(items))
    return [advantage_of(config, r, i.old_logprob) for r, i in zip(rewarded, items, strict=True)]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([-1.5, -0.5, 0.0, 1.0, 1.5, 2.0]), min_size=3, max_size=3).filter(any),
    st.sampled_from(["active", "count", "none"]),
    st.sampled_from([None, 0.7]),
    st.integers(0, 1000),
)
def test_advantage_equals_the_formula(values, normalizer, clamp, seed):
    names = ("a", "b", "c")
    lambdas = dict(zip(names, values, strict=True))
    config = config_with(lambdas, names, normalizer=normalizer, logratio_clamp=clamp)
    active = [name for name, value in lambdas.items() if value]
    items = [scored(seed + i, length, active) for i, length in enumerate((3, 1, 7))]
    k = {"active": len(active), "count": 3, "none": 1}[normalizer]
    for got, item in zip(advantages(config, items), items, strict=True):
        torch.testing.assert_close(got.double(), oracle_advantage(item, lambdas, k, clamp), atol=1e-5, rtol=1e-5)


def test_zero_lambda_is_g_opd_with_one_teacher():
    item = scored(0, 5, ["a"])
    one = advantages(config_with({"a": 1.5}, ("a",)), [item])[0]
    both = advantages(config_with({"a": 1.5, "b": 0.0}), [item])[0]
    torch.testing.assert_close(one, both, atol=0, rtol=0)


def test_lambda_one_is_opd_whatever_the_reference():
    item = scored(1, 6, ["a"])
    got = advantages(config_with({"a": 1.0}, ("a",)), [item])[0]
    torch.testing.assert_close(got, item.teacher_logprobs["a"] - item.old_logprob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lambdas", [{"a": 1.0}, {"a": 2.5, "b": -0.5}])
def test_reference_drops_out_when_weights_sum_to_one(lambdas):
    config = config_with(lambdas, tuple(lambdas), scoring={"skip_unused_reference": True})
    assert reference_cancels(config, lambdas)
    item = scored(2, 4, list(lambdas))
    without = ScoredRollout(item.rollout, None, item.teacher_logprobs, {}, item.old_logprob)
    torch.testing.assert_close(advantages(config, [item])[0], advantages(config, [without])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"logratio_clamp": 1.0}, {"ref_kl_coef": 0.1}, {"scoring": {}}, {"bases": ("a",)}])
def test_reference_is_kept_when_something_else_needs_it(options):
    options = {"scoring": {"skip_unused_reference": True}, **options}
    assert not reference_cancels(config_with({"a": 1.0}, ("a",), **options), {"a": 1.0})


def test_per_domain_tables_route_each_sample():
    config = config_with({"math": {"a": 1.5, "b": -0.5}, "code": {"b": 2.0}})
    items = [scored(3, 4, ["a", "b"], "math"), scored(4, 2, ["b"], "code")]
    math_advantage, code_advantage = advantages(config, items)
    torch.testing.assert_close(
        math_advantage.double(), oracle_advantage(items[0], {"a": 1.5, "b": -0.5}, 2), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(code_advantage.double(), oracle_advantage(items[1], {"b": 2.0}, 1), atol=1e-5, rtol=0)


def test_a_teacher_with_its_own_base_is_measured_against_it():
    config = config_with({"a": 1.5, "b": -0.5}, bases=("a",))
    item = scored(5, 6, ["a", "b"], bases=("a",))
    torch.testing.assert_close(
        advantages(config, [item])[0].double(), oracle_advantage(item, {"a": 1.5, "b": -0.5}, 2), atol=1e-5, rtol=0
    )


def test_warmup_scales_negative_coefficients_only():
    config = config_with({"a": 1.5, "b": -0.8}, lambda_warmup_steps=4)
    assert lambdas_at(config, "d", 0) == {"a": 1.5, "b": pytest.approx(-0.2)}
    assert lambdas_at(config, "d", 1) == {"a": 1.5, "b": pytest.approx(-0.4)}
    assert lambdas_at(config, "d", 9) == {"a": 1.5, "b": -0.8}


def test_judge_term_is_centred_and_off_by_default():
    items = [scored(6, 2, ["a"]), scored(7, 2, ["a"])]
    tables = [{"a": 1.0}] * 2
    plain = compute_reward(config_with({"a": 1.0}, ("a",)), items, tables, [True, False], 0.5)
    mixed = compute_reward(config_with({"a": 1.0}, ("a",), judge_coef=0.3), items, tables, [True, False], 0.5)
    for m, p, sign in zip(mixed, plain, (1, -1), strict=True):
        torch.testing.assert_close(m.reward - p.reward, torch.full((2,), sign * 0.15), atol=1e-6, rtol=0)
    assert all(math.isfinite(float(x)) for r in plain for x in r.reward)


def test_logged_parts_add_up_to_the_advantage_when_the_reference_was_not_run():
    lambdas = {"a": 2.5, "b": -0.5}
    config = config_with(lambdas, scoring={"skip_unused_reference": True})
    item = scored(8, 5, ["a", "b"], ref=False)
    [rewarded] = compute_reward(config, [item], [lambdas], [None])
    parts = sum(lambdas[name] / 2 * log_ratio(rewarded, name, item.old_logprob) for name in lambdas)
    torch.testing.assert_close(parts, advantage_of(config, rewarded, item.old_logprob), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts, logged_reward(rewarded, item.old_logprob), atol=1e-5, rtol=0)
    assert not reference_ever_needed(config)
    assert reference_ever_needed(config_with({"a": 1.5, "b": -0.5}, scoring={"skip_unused_reference": True}))
