"""Summaries against direct computation and simulation; samples survive the trip to disk."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcopd_fast.config_sections import JudgeConfig
from tcopd_fast.evaluate import bootstrap_intervals, evaluate, merge, pass_at, summarize, write_samples
from tcopd_fast.judges import Judges
from tcopd_fast.types import Prompt, Rollout


class ScriptedEngine:
    """Answers prompt i's sample s with i + s, cut at `max_new_tokens` characters (one character is one token)."""

    version = 3

    def generate(self, prompts, *, samples, max_new_tokens, temperature, seed, on_finished=None):
        rollouts = []
        for prompt, sample in itertools.product(prompts, range(samples)):
            text = f"\\boxed{{{int(prompt.id) + sample}}}"[:max_new_tokens]
            rollout = Rollout(
                prompt=prompt,
                sample=sample,
                token_ids=tuple(map(ord, text)),
                logprobs=torch.full((len(text),), -0.5),
                finish_reason="length" if len(text) == max_new_tokens else "stop",
                version=self.version,
                text=text,
            )
            rollouts.append(rollout)
            if on_finished:
                on_finished(rollout)
        return rollouts


def make_prompts(n: int, answered: bool = True) -> list[Prompt]:
    return [Prompt(str(i), "math", (1, 2), f"problem {i}", str(i) if answered else None, "set.jsonl") for i in range(n)]


def run(prompts, samples=4, max_new_tokens=9):
    with Judges(JudgeConfig()) as judges:
        return evaluate(
            ScriptedEngine(),
            prompts,
            judges,
            samples=samples,
            temperature=1.0,
            max_new_tokens=max_new_tokens,
            seed=0,
        )


def test_verdicts_lengths_and_truncation_belong_to_their_samples():
    evaluation = run(make_prompts(12), max_new_tokens=10)
    assert evaluation.correct.tolist() == [[True, False, False, False]] * 12
    # "\boxed{7}" has 9 characters, "\boxed{10}" 10, which is the limit.
    assert evaluation.lengths.tolist() == [[9 + (i + s > 9) for s in range(4)] for i in range(12)]
    assert evaluation.truncated.tolist() == [[i + s > 9 for s in range(4)] for i in range(12)]
    summary = evaluation.summary()
    assert summary["mean_at_k"] == 0.25
    assert summary["pass_at"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert summary["pass_at_k"] == 1.0
    assert summary["response_length_mean"] == evaluation.lengths.mean()
    assert summary["truncation_rate"] == evaluation.truncated.mean()
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_shares_merge_to_the_same_evaluation(world_size):
    prompts = [replace(prompt, answer=str(i + i % 3)) for i, prompt in enumerate(make_prompts(4))]
    whole = merge([run(prompts)])
    merged = merge([run(prompts[rank::world_size]) for rank in range(world_size)])
    assert merged.summary() == whole.summary()
    key = [(r.prompt.id, r.sample, r.text) for r in merged.rollouts]
    assert key == [(r.prompt.id, r.sample, r.text) for r in whole.rollouts]
    assert (merged.correct == whole.correct).all()


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_is_the_share_of_subsets_with_a_correct_sample(n, data):
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    samples = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at(np.array([c]), n, k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_is_stable_for_many_samples():
    c, n, k = 3, 2048, 1024
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at(np.array([c]), n, k)[0] == pytest.approx(expected, rel=1e-10)


def test_standard_error_counts_problems_not_samples():
    """Copies of a sample carry no information, so they must not shrink the error."""
    rng = np.random.default_rng(0)
    one = rng.random((50, 1)) < 0.5
    copies = np.repeat(one, 16, axis=1)
    lengths, cut = np.ones_like(copies, dtype=int), np.zeros_like(copies)
    single = summarize(one, lengths[:, :1], cut[:, :1], seed=0)
    repeated = summarize(copies, lengths, cut, seed=0)
    for key in ("mean_at_k", "standard_error", "ci_low", "ci_high"):
        assert repeated[key] == single[key]
    p = one.mean()
    assert single["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 49))


def test_intervals_are_seeded_bracket_the_mean_and_narrow():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, 2))
    first = bootstrap_intervals(values, 7)
    assert (first == bootstrap_intervals(values, 7)).all()
    assert (first != bootstrap_intervals(values, 8)).any()
    assert (first[:, 0] < values.mean(0)).all() and (values.mean(0) < first[:, 1]).all()
    width = (first[:, 1] - first[:, 0]).mean()
    assert width == pytest.approx(2 * 1.96 / 20, rel=0.15)
    narrow = bootstrap_intervals(values[:100], 7)
    assert (narrow[:, 1] - narrow[:, 0]).mean() == pytest.approx(2 * width, rel=0.25)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    """Problems of differing difficulty: 300 evaluations of 60 problems × 4 samples; truth is the mean difficulty."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        difficulty = rng.beta(0.7, 0.7, size=(60, 1))
        correct = rng.random((60, 4)) < difficulty
        summary = summarize(correct, np.ones((60, 4), dtype=int), np.zeros((60, 4), dtype=bool), seed=trial)
        covered += summary["ci_low"] <= 0.5 <= summary["ci_high"]
    # Three standard deviations around 0.95; resampling samples instead of problems covers 0.81.
    assert 0.90 <= covered / 300 <= 0.99


def test_one_problem_has_no_standard_error():
    one = np.ones((1, 2), dtype=bool)
    summary = summarize(one, one.astype(int), one, seed=0)
    assert math.isnan(summary["standard_error"])
    assert (summary["ci_low"], summary["ci_high"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no problems"):
        summarize(one[:0], one[:0], one[:0], seed=0)


def test_samples_round_trip_through_parquet(tmp_path):
    evaluation = run(make_prompts(3), samples=2)
    path = tmp_path / "eval" / "step_000001_set.parquet"
    write_samples(evaluation, path)
    write_samples(evaluation, path)
    rows = pq.read_table(path).to_pylist()
    assert list(rows[0]) == [
        "id",
        "domain",
        "problem",
        "answer",
        "sample",
        "response",
        "correct",
        "finish_reason",
        "length",
        "logprob_mean",
        "version",
    ]
    assert rows[3] == {
        "id": "1",
        "domain": "math",
        "problem": "problem 1",
        "answer": "1",
        "sample": 1,
        "response": "\\boxed{2}",
        "correct": False,
        "finish_reason": "length",
        "length": 9,
        "logprob_mean": -0.5,
        "version": 3,
    }
    assert [row["correct"] for row in rows] == evaluation.correct.reshape(-1).tolist()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_empty_response_has_no_mean_logprob(tmp_path):
    evaluation = run(make_prompts(1), samples=1, max_new_tokens=0)
    write_samples(evaluation, tmp_path / "s.parquet")
    (row,) = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert (row["length"], row["logprob_mean"], row["correct"]) == (0, None, False)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.parquet"
    write_samples(run(make_prompts(2), samples=1), path)
    before = path.read_bytes()

    def fail(table, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_samples(run(make_prompts(3), samples=1), path)
    assert path.read_bytes() == before
