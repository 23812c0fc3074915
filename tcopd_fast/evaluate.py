"""Evaluation: sample k answers per problem, judge them, and say how sure the numbers are.

Problems are the unit of uncertainty: the k samples of one problem are not independent, so standard errors and
intervals resample problems, never samples. Letters: B problems, k samples of each.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcopd_fast.judges import Judges
from tcopd_fast.rollout import RolloutEngine
from tcopd_fast.types import Prompt, Rollout

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Evaluation:
    """Judged samples. rollouts: B·k, prompt-major. correct: bool [B, k]. seed: of the bootstrap."""

    rollouts: tuple[Rollout, ...]
    correct: np.ndarray
    seed: int

    @property
    def samples(self) -> int:
        """k."""
        return self.correct.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Response lengths in tokens, int64 [B, k]."""
        lengths = [len(rollout.token_ids) for rollout in self.rollouts]
        return np.array(lengths, dtype=np.int64).reshape(self.correct.shape)

    @property
    def truncated(self) -> np.ndarray:
        """Which responses were cut at the length limit, bool [B, k]."""
        cut = [rollout.finish_reason == "length" for rollout in self.rollouts]
        return np.array(cut, dtype=bool).reshape(self.correct.shape)

    def summary(self) -> dict[str, Any]:
        """See `summarize`."""
        return summarize(self.correct, self.lengths, self.truncated, self.seed)


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    judges: Judges,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    on_finished: Callable[[Rollout], None] | None = None,
) -> Evaluation:
    """Sample `samples` answers to every prompt and judge them; `seed` drives sampling and bootstrap.

    An empty `prompts` gives an empty evaluation (a rank may have no share). Every prompt must have an answer
    (`data.load_eval_sets` sees to it).
    """
    rollouts = engine.generate(
        prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_finished=on_finished,
    )
    return judged(rollouts, judges, samples, seed)


def judged(rollouts: Sequence[Rollout], judges: Judges, samples: int, seed: int) -> Evaluation:
    """The evaluation of B·k rollouts, prompt-major, with k = `samples`."""
    verdicts = [bool(verdict) for verdict in judges.rollouts(rollouts)]
    return Evaluation(tuple(rollouts), np.array(verdicts, dtype=bool).reshape(-1, samples), seed)


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the problems of all parts (the ranks' shares), in the order of their prompt ids.

    The order makes the intervals independent of how the problems were shared out.
    """
    correct = np.concatenate([part.correct for part in parts])
    rollouts = [rollout for part in parts for rollout in part.rollouts]
    n_problems, k = correct.shape
    order = sorted(range(n_problems), key=lambda b: rollouts[b * k].prompt.id)
    sorted_rollouts = tuple(rollout for b in order for rollout in rollouts[b * k : (b + 1) * k])
    return Evaluation(sorted_rollouts, correct[order], parts[0].seed)


def summarize(correct: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, seed: int) -> dict[str, Any]:
    """Means over problems with their uncertainty, as plain numbers.

    correct: bool [B, k]; lengths: integer [B, k], tokens; truncated: bool [B, k]. Keys: k, problems, mean_at_k,
    standard_error (of mean_at_k, clustered by problem: std of the per-problem means / √B; nan for one problem),
    ci_low and ci_high (of mean_at_k), pass_at_k with pass_at_k_ci, pass_at ({k': value} for k' = 1, 2, 4, …, k)
    with pass_at_ci, response_length_mean, truncation_rate and their _ci. Every interval is a 95% percentile
    bootstrap over problems with 1000 resamples drawn from `seed`, the same ones for all numbers.
    """
    n_problems, k = correct.shape
    if n_problems == 0:
        raise ValueError("summarize: no problems")
    ks = sorted({2**i for i in range(k.bit_length())} | {k})
    n_correct_B = correct.sum(1)
    mean_B = n_correct_B / k
    columns = {
        "mean_at_k": mean_B,
        "response_length_mean": lengths.mean(1),
        "truncation_rate": truncated.mean(1),
        **{str(k_prime): pass_at(n_correct_B, k, k_prime) for k_prime in ks},
    }
    values_BM = np.stack(list(columns.values()), 1)
    means = dict(zip(columns, values_BM.mean(0).tolist(), strict=True))
    intervals = dict(zip(columns, bootstrap_intervals(values_BM, seed).tolist(), strict=True))
    return {
        "k": k,
        "problems": n_problems,
        "mean_at_k": means["mean_at_k"],
        "standard_error": float(mean_B.std(ddof=1)) / math.sqrt(n_problems) if n_problems > 1 else math.nan,
        "ci_low": intervals["mean_at_k"][0],
        "ci_high": intervals["mean_at_k"][1],
        "pass_at_k": means[str(k)],
        "pass_at_k_ci": intervals[str(k)],
        "pass_at": {str(k_prime): means[str(k_prime)] for k_prime in ks},
        "pass_at_ci": {str(k_prime): intervals[str(k_prime)] for k_prime in ks},
        "response_length_mean": means["response_length_mean"],
        "response_length_mean_ci": intervals["response_length_mean"],
        "truncation_rate": means["truncation_rate"],
        "truncation_rate_ci": intervals["truncation_rate"],
    }


def pass_at(n_correct: np.ndarray, n_samples: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem, 1 − C(n−c, k) / C(n, k) (Chen et al., 2021), float64 [B].

    n_correct: c, integer [B], out of n_samples. The ratio is a product of k factors in 0..1.
    """
    j = np.arange(k)
    factors_BK = np.clip(n_samples - n_correct[:, None] - j, 0, None) / (n_samples - j)
    return 1.0 - factors_BK.prod(1)


def bootstrap_intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """Percentile intervals of the column means of `values` [B, M] under resampling of rows: float64 [M, 2]."""
    n_problems = len(values)
    rng = np.random.default_rng(seed % 2**64)
    counts_RB = rng.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=RESAMPLES)
    means_RM = counts_RB @ values / n_problems
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means_RM, [tail, 1 - tail], axis=0).T


def accuracy_change(record: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """What a run has gained and lost on one set, as shares: {"change", "forgetting"}.

    change: mean_at_k minus that of the evaluation at step 0, None when there was none. forgetting: the best mean_at_k
    up to this evaluation minus this one, so 0 when this one is the best (Chaudhry et al., 2018). `earlier` may hold
    any records; those of the same set, temperature and k count.
    """
    same = [r for r in earlier if all(r[key] == record[key] for key in ("set", "temperature", "k"))]
    means = {r["step"]: r["mean_at_k"] for r in [*same, record]}
    now = record["mean_at_k"]
    return {"change": now - means[0] if 0 in means else None, "forgetting": max(means.values()) - now}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an eval.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_samples(evaluation: Evaluation, path: Path) -> None:
    """Write every sample as a row of a parquet file; the file appears whole or not at all.

    Columns: id, domain, problem, answer, sample, response, correct, finish_reason, length (tokens), logprob_mean
    (nats per token; null for an empty response), version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rollouts = evaluation.rollouts
    table = pa.table(
        {
            "id": pa.array([r.prompt.id for r in rollouts], pa.string()),
            "domain": pa.array([r.prompt.domain for r in rollouts], pa.string()),
            "problem": pa.array([r.prompt.problem for r in rollouts], pa.string()),
            "answer": pa.array([r.prompt.answer for r in rollouts], pa.string()),
            "sample": pa.array([r.sample for r in rollouts], pa.int64()),
            "response": pa.array([r.text for r in rollouts], pa.string()),
            "correct": pa.array(evaluation.correct.reshape(-1).tolist(), pa.bool_()),
            "finish_reason": pa.array([r.finish_reason for r in rollouts], pa.string()),
            "length": pa.array([len(r.token_ids) for r in rollouts], pa.int64()),
            "logprob_mean": pa.array(
                [r.logprobs.mean().item() if len(r.token_ids) else None for r in rollouts], pa.float64()
            ),
            "version": pa.array([r.version for r in rollouts], pa.int64()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)
