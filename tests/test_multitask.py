"""Two domains in one run: shares, metrics per domain, forgetting."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, learning, lines, run, write_config

sys.path.insert(0, str(ROOT / "bench"))

import multitask_plan
from multitask_plan import ROWS, SETS

from tcopd_fast import metrics
from tcopd_fast.cli import main
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config, validate
from tcopd_fast.dist import World
from tcopd_fast.evaluate import accuracy_change
from tcopd_fast.inputs import read_inputs
from tcopd_fast.learner import UpdateResult
from tcopd_fast.monitor import format_eval
from tcopd_fast.order import domain_counts
from tcopd_fast.report import format_table, summary_table, write_report
from tcopd_fast.types import Prompt, RewardedRollout, Rollout, ScoredRollout

WEIGHTS = {"even": 3, "odd": 1}
PER_STEP = 6
STEPS = 4


def tree(tiny, run_dir: Path, steps: int = STEPS) -> dict:
    """A two-domain run that keeps every response's tokens and evaluates both domains after every step."""
    for domain in WEIGHTS:
        rows = [row for row in tiny.prompts.read_text().splitlines(True) if json.loads(row)["domain"] == domain]
        (run_dir.parent / f"{domain}.jsonl").write_text("".join(rows[:6]))
    return tiny.tree(
        run_dir,
        steps=steps,
        data={"domain_weights": WEIGHTS},
        rollout={"prompts_per_step": PER_STEP},
        objective={"lambdas": {"even": {"expert": 1.5, "anti": -0.5}, "odd": {"anti": 1.0}}},
        eval={"data": [{"path": str(run_dir.parent / f"{d}.jsonl")} for d in WEIGHTS], "samples": 2, "every": 1},
        checkpoint={"every": 1},
        logging={"tensorboard": False, "token_samples": PER_STEP},
    )


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("multitask") / "run"
    config = write_config(run_dir.parent / "c.yaml", tree(tiny, run_dir))
    return run_dir, run(["--config", str(config)])


def test_every_step_samples_the_exact_shares(finished):
    for row in lines(finished[0] / "metrics.jsonl"):
        before, after = (domain_counts(WEIGHTS, PER_STEP * step) for step in (row["step"] - 1, row["step"]))
        for domain in WEIGHTS:
            assert row[f"data/share/{domain}"] * PER_STEP == pytest.approx(after[domain] - before[domain])


def test_metrics_per_domain_are_those_of_its_own_responses(finished):
    """Against the token samples, which hold every response of the run."""
    records = lines(finished[0] / "token_samples.jsonl")
    for row in lines(finished[0] / "metrics.jsonl"):
        of_step = [record for record in records if record["step"] == row["step"]]
        all_tokens = sum(len(record["tokens"]) for record in of_step)
        for domain in WEIGHTS:
            own = [record for record in of_step if record["domain"] == domain]
            lengths = np.array([len(record["tokens"]) for record in own])
            advantage, reward, logprob = (
                np.concatenate([record[name] for record in own]) for name in ("advantage", "reward", "old_logprob")
            )
            expected = {
                "rollout/accuracy": np.mean([record["correct"] for record in own]),
                "rollout/response_length_mean": lengths.mean(),
                "reward/mean": reward.mean(),
                "reward/advantage_mean": advantage.mean(),
                "reward/advantage_std": advantage.std(),
                "batch/token_share": lengths.sum() / all_tokens,
                "loss/entropy_estimate": -logprob.mean(),
            }
            for name, value in expected.items():
                assert row[f"{name}/{domain}"] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, domain)
            assert 0 <= row[f"rollout/truncated_share/{domain}"] <= 1
        assert "rollout/version/even" not in row


def test_forgetting_follows_from_the_recorded_accuracies(finished):
    records = lines(finished[0] / "eval.jsonl")
    assert len(records) == 2 * (STEPS + 1)
    for domain in WEIGHTS:
        own = [record for record in records if record["domain"] == domain]
        means = [record["mean_at_k"] for record in own]
        assert [record["change"] for record in own] == [mean - means[0] for mean in means]
        assert [record["forgetting"] for record in own] == [max(means[: i + 1]) - means[i] for i in range(len(means))]
    assert "change +" in finished[1] or "change -" in finished[1]
    assert "forgotten 0." in finished[1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_prompts_metrics_and_forgetting(finished, tiny, tmp_path):
    run_dir = tmp_path / "run"
    run(["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, run_dir, steps=2)))])
    # Records after the checkpoint must not count: they are done again.
    with (run_dir / "eval.jsonl").open("a") as file:
        file.write(json.dumps({**lines(run_dir / "eval.jsonl")[-1], "step": 3, "mean_at_k": 1.0}) + "\n")
    run(["--resume", str(run_dir), f"steps={STEPS}"])
    for name in ("metrics.jsonl", "eval.jsonl", "token_samples.jsonl"):
        whole = [learning(row) for row in lines(finished[0] / name)]
        assert [learning(row) for row in lines(run_dir / name)] == whole, name


@pytest.mark.slow
def test_two_ranks_take_the_same_prompts_and_report_the_same_numbers(finished, tiny, tmp_path):
    run_dir = tmp_path / "run"
    run(["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, run_dir, steps=1)))], size=2)
    [row] = lines(run_dir / "metrics.jsonl")
    whole = lines(finished[0] / "metrics.jsonl")[0]
    names = [name for name in whole if name.endswith(("/even", "/odd"))]
    assert len(names) == 2 * 10 + 3
    for name in names:
        assert row[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


def rewarded(domain: str, tokens: int, correct: bool) -> RewardedRollout:
    """A response whose every token has reward 1 and logprob −1 under every model."""
    prompt = Prompt(domain, domain, (1, 2), "", "1", "")
    minus_one = torch.full((tokens,), -1.0)
    rollout = Rollout(prompt, 0, (3,) * tokens, minus_one, "stop", 0, "")
    scored = ScoredRollout(rollout, minus_one, {"expert": minus_one}, {}, None)
    return RewardedRollout(scored, torch.ones(tokens), minus_one, {"expert": 1.0, "anti": 0.0}, correct)


@pytest.mark.parametrize(
    ("domains", "present", "named"),
    [(("a",), "aa", set()), (("a", "b"), "ab", {"a", "b"}), (("a", "b", "c"), "ab", {"a", "b"})],
)
def test_domains_are_told_apart_only_where_there_are_several_and_they_have_samples(
    tiny, tmp_path, monkeypatch, domains, present, named
):
    monkeypatch.setattr(metrics, "_loss_metrics", lambda *_: {})
    items = [rewarded(domain, tokens, tokens == 1) for domain, tokens in zip(present, (1, 3), strict=True)]
    old = [item.ref_logprob for item in items]
    update = UpdateResult({}, {}, old, grad_norm=0.0, lr=0.0, skipped=0, skipped_in_a_row=0, weights_finite=True)
    config = validate(tiny.tree(tmp_path), Config)
    row = metrics.step_metrics(config, World(0, 1, torch.device("cpu")), domains, items, [], update)
    assert {name.rpartition("/")[2] for name in row if name.startswith("rollout/accuracy/")} == named
    assert row["rollout/accuracy"] == 0.5 and row["reward/advantage_mean"] == 1.0
    if named:
        assert [row[f"batch/token_share/{name}"] for name in "ab"] == [0.25, 0.75]
        assert [row[f"rollout/accuracy/{name}"] for name in "ab"] == [1.0, 0.0]
        assert all(math.isfinite(value) for name, value in row.items() if name.endswith(("/a", "/b", "/c")))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"even": 1, "od": 1},
            "domain_weights.od: no training prompt has this domain; domains are even, odd; did you",
        ),
        ({"even": 1}, "the domain 'odd', which has no weight; add one (0 leaves the domain out)"),
        ({"even": 0, "odd": 0}, "data.domain_weights: every weight is 0"),
        ({"even": -1, "odd": 1}, "data.domain_weights.even: Input should be greater than or equal to 0"),
        ({}, "data.domain_weights: Dictionary should have at least 1 item"),
    ],
)
def test_weights_that_cannot_work_are_refused_before_anything_starts(tiny, tmp_path, capsys, weights, message):
    config = write_config(tmp_path / "c.yaml", tiny.tree(tmp_path / "run", data={"domain_weights": weights}))
    assert main(["train", "--config", str(config)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def record(step: int, mean: float, **other) -> dict:
    return {"step": step, "set": "s", "temperature": 1.0, "k": 4, "mean_at_k": mean, **other}


def test_change_and_forgetting_by_hand():
    past = [record(0, 0.5), record(10, 0.75), record(20, 0.625)]
    assert accuracy_change(record(30, 0.25), past) == {"change": -0.25, "forgetting": 0.5}
    assert accuracy_change(record(30, 1.0), past) == {"change": 0.5, "forgetting": 0.0}
    assert accuracy_change(record(0, 0.5), []) == {"change": 0.0, "forgetting": 0.0}
    assert accuracy_change(record(30, 0.25), past[1:]) == {"change": None, "forgetting": 0.5}


def test_only_evaluations_of_one_kind_are_compared():
    others = [record(0, 0.9, set="t"), record(0, 0.9, temperature=0.7), record(0, 0.9, k=8)]
    assert accuracy_change(record(10, 0.5), others) == {"change": None, "forgetting": 0.0}


def test_the_progress_line_says_what_was_gained_and_lost():
    past = [record(0, 0.5), record(10, 0.75)]
    after, before = (record(step, 0.25) for step in (20, 0))
    assert format_eval(after | accuracy_change(after, past)) == (
        "eval at step 20  s  mean@4 0.250  change -0.250  forgotten 0.500"
    )
    assert format_eval(before | accuracy_change(before, [])) == "eval at step 0  s  mean@4 0.250"
    assert format_eval(after | accuracy_change(after, [])) == "eval at step 20  s  mean@4 0.250  forgotten 0.000"


def test_the_report_shows_both_domains(finished):
    run_dir = finished[0]
    rows = {row["set"]: row for row in summary_table([run_dir])}
    for domain, row in rows.items():
        last = [record for record in lines(run_dir / "eval.jsonl") if record["set"] == domain][-1]
        assert (row["change"], row["forgetting"]) == (last["change"], last["forgetting"])
    table = format_table(list(rows.values()))
    assert "change, points" in table and "forgotten, points" in table
    assert f"{100 * rows['even']['change']:+.1f}".replace("-", "−") in table
    page = write_report([run_dir], run_dir / "report.html").read_text()
    for title in ("Rollout accuracy, domain even", "Reward r, domain odd", "Evaluation: odd", "even 3.0, odd 1.0"):
        assert title in page, title
    assert "Rollout version" not in page


def test_the_miniature_trains_both_domains_on_their_experts():
    inputs = read_inputs(load_config(multitask_plan.CONFIG))
    assert inputs.domains == ("largest", "math") and len(inputs.prompts) == 2 * 4096
    assert {name: prompts[0].domain for name, prompts in inputs.eval_sets.items()} == {
        "heldout": "math",
        "heldout_largest": "largest",
    }


def test_rows_resolve_to_the_stated_objectives():
    """own on a domain's own expert, other on the other's; equal shares of the trained domains."""
    assert len({row.key for row in ROWS}) == len(ROWS) == 8
    for row in ROWS:
        config = load_config(multitask_plan.CONFIG, [*multitask_plan.shared_overrides(20, 32), *row.overrides()])
        assert config.lambdas_for("math") == {"math_expert": row.own, "largest_expert": row.other}
        assert config.lambdas_for("largest") == {"largest_expert": row.own, "math_expert": row.other}
        assert config.data.domain_weights == {domain: float(domain in row.domains) for domain in SETS}
        # A row without its own normalizer must be the same objective under either.
        assert (row.normalizer is None) == (row.other == 0)
        assert row.normalizer in (None, config.objective.normalizer)
        assert [(source.path, source.limit) for source in config.eval.data] == [(path, 32) for path in SETS.values()]
    assert (
        load_config(multitask_plan.CONFIG).lambda_tables()
        == load_config(multitask_plan.CONFIG, ROWS[0].overrides()).lambda_tables()
    ), "the file as it is written is MOPD"
