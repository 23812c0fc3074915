"""Shares of the advantage against their definition, the alarms, and what each guard does to the objective."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import lines, run, write_config
from test_loss import LENGTHS, PROMPTS, RESPONSES, batch, numbers
from test_reward import config_with, scored
from tiny import make_model

from tcopd_fast.alarm import Alarms, advantage_shares, first_entropy
from tcopd_fast.config_io import load_config
from tcopd_fast.loss import policy_loss
from tcopd_fast.models import PackedCausalLM
from tcopd_fast.packing import PACKED_SDPA
from tcopd_fast.reward import compute_reward, lambdas_at, normalizer_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from lambda_safety_plan import CONFIG, GUARDS, ROWS, shared_overrides
from lambda_safety_report import aggregate, markdown

ALONE = SimpleNamespace(sum=dict)
"""A world of one rank."""


def shares_of(config, items, tables=None, world=ALONE):
    tables = tables or [lambdas_at(config, item.rollout.prompt.domain, 10**9) for item in items]
    rewarded = compute_reward(config, items, tables, [None] * len(items))
    return advantage_shares(config, world, rewarded, [item.old_logprob for item in items])


def oracle_shares(config, items, tables):
    """The definition, token by token in Python floats: (share per teacher, share where λ < 0)."""
    parts, negative = dict.fromkeys(config.teachers, 0.0), 0.0
    clamp = config.objective.logratio_clamp or math.inf
    for item, table in zip(items, tables, strict=True):
        for t in range(len(item.old_logprob)):
            for name, value in table.items():
                if value:
                    base = item.teacher_ref_logprobs.get(name, item.ref_logprob)
                    ratio = float(item.teacher_logprobs[name][t]) - float(base[t])
                    size = abs(value / normalizer_count(config, table) * max(-clamp, min(clamp, ratio)))
                    parts[name] += size
                    negative += size if value < 0 else 0.0
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}, negative / total


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([-6.0, -0.5, 0.0, 1.5]), min_size=3, max_size=3).filter(any),
    st.sampled_from(["active", "count", "none"]),
    st.sampled_from([{}, {"logratio_clamp": 0.7}]),
    st.sampled_from([(), ("a", "c")]),
    st.integers(0, 1000),
)
def test_shares_equal_their_definition(values, normalizer, guard, bases, seed):
    names = ("a", "b", "c")
    table = dict(zip(names, values, strict=True))
    config = config_with(table, names, bases=bases, normalizer=normalizer, **guard)
    active = [name for name in names if table[name]]
    own_bases = [name for name in bases if name in active]
    items = [scored(seed + i, length, active, bases=own_bases) for i, length in enumerate((3, 1, 7))]
    got = shares_of(config, items)
    shares, negative = oracle_shares(config, items, [table] * 3)
    assert got == pytest.approx(
        {f"reward/{name}/advantage_share": share for name, share in shares.items()}
        | {"reward/negative_share": negative},
        rel=1e-4,
        abs=1e-6,
    )
    assert sum(got[f"reward/{name}/advantage_share"] for name in names) == pytest.approx(1)


def test_domains_where_a_teacher_is_positive_do_not_count_as_negative():
    config = config_with({"math": {"a": 1.0, "b": -2.0}, "code": {"b": 1.5}})
    items = [scored(1, 4, ["a", "b"], "math"), scored(2, 6, ["b"], "code")]
    tables = [config.lambdas_for("math"), config.lambdas_for("code")]
    shares, negative = oracle_shares(config, items, tables)
    got = shares_of(config, items, tables)
    assert got["reward/negative_share"] == pytest.approx(negative, rel=1e-5)
    assert got["reward/b/advantage_share"] == pytest.approx(shares["b"], rel=1e-5)
    assert 0 < negative < shares["b"]


def test_shares_without_a_reference_are_of_the_distances_to_the_student():
    lambdas = {"a": 2.5, "b": -0.5}
    config = config_with(lambdas, scoring={"skip_unused_reference": True})
    item = scored(8, 5, ["a", "b"], ref=False)
    sizes = {
        name: abs(value) * float((item.teacher_logprobs[name] - item.old_logprob).abs().sum())
        for name, value in lambdas.items()
    }
    got = shares_of(config, [item])["reward/negative_share"]
    assert got == pytest.approx(sizes["b"] / (sizes["a"] + sizes["b"]), rel=1e-5)


def test_shares_are_of_all_ranks_together():
    config = config_with({"a": 1.0, "b": -2.0})
    items = [scored(i, 3 + i, ["a", "b"]) for i in range(4)]
    seen = []
    for rank in (0, 1):
        shares_of(config, items[rank::2], world=SimpleNamespace(sum=lambda sums: seen.append(sums) or sums))
    both = {key: seen[0][key] + seen[1][key] for key in seen[0]}
    got = shares_of(config, items[0::2], world=SimpleNamespace(sum=lambda _: both))
    assert got == pytest.approx(shares_of(config, items), rel=1e-9)


def test_a_logprob_that_is_not_finite_gives_no_share_and_no_alarm():
    config = config_with({"a": 1.0, "b": -2.0})
    item = scored(3, 4, ["a", "b"])
    item.teacher_logprobs["b"][1] = float("nan")
    shares = shares_of(config, [item])
    assert math.isnan(shares["reward/negative_share"])
    flags, warnings = Alarms(config).check(1, {**shares, "loss/entropy": float("nan")})
    assert flags == {"reward/alarm_negative_share": 0.0} and not warnings


def step_of(entropy: float, share: float) -> dict[str, float]:
    return {"loss/entropy": entropy, "reward/negative_share": share, "reward/b/advantage_share": share}


def test_each_alarm_warns_once_and_marks_every_step():
    config = config_with({"a": 1.0, "b": -2.0})
    alarms = Alarms(config)
    steps = [(math.nan, 0.5), (0.0, 0.5), (0.5, 0.9), (0.06, 0.91), (0.049, 0.95), (0.01, 0.2)]
    told = [alarms.check(i + 1, step_of(*values)) for i, values in enumerate(steps)]
    assert [flags["reward/alarm_negative_share"] for flags, _ in told] == [0, 0, 0, 1, 1, 0]
    assert [flags.get("loss/alarm_entropy") for flags, _ in told] == [None, None, 0, 0, 1, 1]
    assert [len(warnings) for _, warnings in told] == [0, 0, 0, 1, 1, 0]
    [share], [entropy] = told[3][1], told[4][1]
    for word in ("step 4: 0.91", "(b 0.91)", "alarm_negative_share=0.9", "objective.lambdas", "ref_kl_coef"):
        assert word in share
    for word in ("step 5", "0.049 nats", "0.098", "objective.alarm_entropy_share=0.1", "learner.lr"):
        assert word in entropy


def test_null_switches_an_alarm_off():
    config = config_with({"a": 1.0, "b": -2.0}, alarm_negative_share=None, alarm_entropy_share=None)
    alarms = Alarms(config)
    assert alarms.check(1, step_of(0.5, 0.99)) == alarms.check(2, step_of(0.001, 0.99)) == ({}, [])


def test_the_first_entropy_is_read_back(tmp_path):
    assert first_entropy(tmp_path) is None
    rows = [{"step": 1, "loss/entropy": None}, {"step": 2, "loss/entropy": 0.4}, {"step": 3, "loss/entropy": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert first_entropy(tmp_path) == 0.4


# Bounds inside what these few steps do: the share rises with λ, the entropy dips at step 2 and comes back.
RUN = {
    "steps": 4,
    "objective": {
        "lambdas": {"expert": 1.5, "anti": -1.0},
        "lambda_warmup_steps": 4,
        "ref_kl_coef": 0.01,
        "alarm_negative_share": 0.3,
        "alarm_entropy_share": 0.995,
    },
    "learner": {"lr": 0.02},
    "checkpoint": {"every": 1},
    "logging": {"token_samples": 1},
}


@pytest.mark.slow
def test_alarms_are_the_same_on_two_ranks_and_after_a_resume(tiny, tmp_path):
    def train(name: str, size: int = 1, **change) -> str:
        config = write_config(tmp_path / f"{name}.yaml", tiny.tree(tmp_path / name, **{**RUN, **change}))
        return run(["--config", str(config)], size)

    outputs = [train("whole")]
    train("broken", size=2, steps=1)
    outputs.append(run(["--resume", str(tmp_path / "broken"), "steps=4"], size=2))
    whole, broken = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken"))
    assert [row["reward/alarm_negative_share"] for row in whole] == [0, 0, 1, 1]
    assert [row["loss/alarm_entropy"] for row in whole] == [0, 1, 0, 0]
    for row, expected in zip(broken, whole, strict=True):
        for key in expected:
            if "alarm" in key or "advantage_share" in key or key in ("reward/negative_share", "loss/ref_kl"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-9), key
    assert whole[0]["loss/ref_kl"] < 1e-6 < 1e-3 < whole[1]["loss/ref_kl"], "the student starts at the reference"
    for output in outputs:
        assert output.count("warning: step 3: 0.") == output.count("warning: step 2: the entropy") == 1
        assert output.count("warning") == 2
    samples = lines(tmp_path / "whole" / "token_samples.jsonl")
    assert [record["teachers"]["anti"]["lambda"] for record in samples] == [-0.25, -0.5, -0.75, -1.0]
    assert [record["teachers"]["expert"]["lambda"] for record in samples] == [1.5] * 4


@pytest.mark.parametrize("guard", [{"advantage_clamp": 0.6}, {"ref_kl_coef": 0.3}])
def test_guards_of_the_loss_change_the_gradient_as_their_formula_says(guard):
    """Strictly on-policy: −mean clamp(A) log π_θ + β mean [exp(d) − d − 1], d = log π_ref − log π_θ."""
    plain = config_with({"a": 1.0}, ("a",), is_cap=None)
    config = config_with({"a": 1.0}, ("a",), is_cap=None, **guard)
    exact = make_model(4).double()
    logprob = torch.cat(
        [
            exact(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)[range(len(r)), r]
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    reward, ref = numbers(1).double() + 2, numbers(2).double()
    full = reward - (logprob.detach() - ref)
    clamp = guard.get("advantage_clamp", math.inf)
    assert clamp == math.inf or 0 < int((full.abs() > clamp).sum()) < sum(LENGTHS)
    ahead = ref - logprob
    penalty = guard.get("ref_kl_coef", 0.0) * (ahead.exp() - ahead - 1)
    (penalty - full.clamp(-clamp, clamp) * logprob).mean().backward()
    expected = {name: p.grad for name, p in exact.named_parameters()}
    got, unguarded = gradient(config), gradient(plain)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, want in expected.items():
        torch.testing.assert_close(got[name].double(), want, atol=2e-5 * scale, rtol=1e-3, msg=name)
    assert max(float((got[name] - unguarded[name]).abs().max()) for name in got) > 1e-2 * scale


def gradient(config) -> dict[str, torch.Tensor]:
    model = make_model(4)
    model.set_attn_implementation(PACKED_SDPA)
    loss, _, _ = policy_loss(PackedCausalLM(model), batch(None), config)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_row_of_the_experiment_is_a_valid_configuration():
    assert len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        objective = load_config(CONFIG, [*shared_overrides(40, None), *row.overrides()]).objective
        assert objective.lambdas["anti_expert"] == row.anti_expert and objective.normalizer == row.normalizer
        for key in GUARDS["all"]:
            assert getattr(objective, key) == GUARDS[row.guard].get(key, type(objective).model_fields[key].default)


def record_of(row, seed: int, rng: np.random.Generator) -> dict:
    """One run as bench/lambda_safety.py records it, with random numbers."""
    names = ("entropy", "negative_share", "response_length", "truncated_share", "grad_norm")
    return {
        "row": row.key,
        "lambda": row.anti_expert,
        "normalizer": row.normalizer,
        "guard": row.guard,
        "seed": seed,
        "environment": {"git_sha": "a" * 40, "device": "CPU: test", "threads": 1, "versions": {"torch": "2.13"}},
        "curve": [
            {"step": step, "accuracy": float(rng.random()), "reverse_kl": {"reference": float(rng.random())}}
            for step in (0, 10, 20)
        ],
        "training": {"step": [1, 5]} | {name: rng.random(2).tolist() for name in names},
        "last_steps": {name: float(rng.random()) for name in names},
        "alarm_steps": {"share": [2, 3] if row.guard == "none" and seed else [], "entropy": []},
    }


def test_the_experiments_rows_are_means_over_seeds_and_differences_pair_seeds():
    rng = np.random.default_rng(0)
    rows = [row for row in ROWS if row.guard in ("none", "all")]
    records = [record_of(row, seed, rng) for seed in (0, 1, 2) for row in rows]
    found = {entry["row"]: entry for entry in aggregate(records)}
    assert list(found) == [row.key for row in rows]

    def last(key: str) -> np.ndarray:
        return np.array([record["curve"][-1]["accuracy"] for record in records if record["row"] == key])

    for row in rows:
        entry, values = found[row.key], last(row.key)
        assert entry["metrics"]["accuracy"]["mean"] == pytest.approx(values.mean())
        assert entry["metrics"]["accuracy"]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
        shares = [record["training"]["negative_share"] for record in records if record["row"] == row.key]
        assert entry["training"]["negative_share"] == pytest.approx(np.mean(shares, axis=0).tolist())
        if row.guard == "none":
            assert entry["difference"] is None
            assert [run["steps"] for run in entry["alarms"]["share"]] == [0, 2, 2]
        else:
            base = last(row.key.removesuffix("_all") + "_none")
            assert entry["difference"]["mean"] == pytest.approx((values - base).mean())
    recipe = {"steps": 20, "guards": GUARDS, "config": {"eval": {"samples": 2}, "objective": {}}}
    recipe["config"]["objective"] = {"alarm_negative_share": 0.9, "alarm_entropy_share": 0.1}
    tokens = {"of": "x", "at": [0.5], "logratio": [0.1], "advantage": [0.2], "first_token_advantage": {"right": 1.5}}
    table = {"recipe": recipe, "rows": list(found.values()), "tokens": [tokens], "runs": records, "seeds": [0, 1, 2]}
    block = markdown(table | {"commits": ["a" * 40], "date": "2026-01-01", "command": "python x"}, "f.svg", "r.json")
    lines_ = [line for line in block.splitlines() if line.startswith("|")]
    assert len(lines_) == 2 + len(rows) and len({line.count("|") for line in lines_}) == 1
    assert "2/3, from 2, 2 steps" in lines_[2] and "+1.50 in right answers" in block
