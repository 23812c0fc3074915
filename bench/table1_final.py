"""Final evaluation of one checkpoint: accuracy at three temperatures, response length, reverse KL to frozen models."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table1_plan import FINAL, table_config

from tcopd_fast import rundir
from tcopd_fast.config import Config
from tcopd_fast.data import load_prompts
from tcopd_fast.dist import World
from tcopd_fast.evaluate import evaluate
from tcopd_fast.export import run_export
from tcopd_fast.inputs import sampling_seed
from tcopd_fast.judges import Judges
from tcopd_fast.models import check_models
from tcopd_fast.rollout.hf import HfEngine
from tcopd_fast.scoring import Scorer
from tcopd_fast.types import Rollout


@dataclass(frozen=True)
class Job:
    """What to evaluate, either a run's last checkpoint or `model` as it is, and the file that gets the results."""

    name: str
    out: Path
    seed: int
    steps: int
    limit: int | None
    run_dir: Path | None = None
    model: str = ""


def evaluate_job(job: Job) -> float:
    """Evaluate and write job.out, whole or not at all; returns accuracy at T=1."""
    with checkpoint_of(job) as model:
        results = evaluate_checkpoint(table_config(job.steps, job.limit), model, job.seed)
    write_results(job, results)
    return results["t1"]["mean_at_k"]


@contextlib.contextmanager
def checkpoint_of(job: Job) -> Iterator[str]:
    """The job's model as a folder or name that loads; a run's last checkpoint stays exported while this is open."""
    if job.run_dir is None:
        yield job.model
        return
    with tempfile.TemporaryDirectory() as folder:
        # DeepSpeed's conversion reports its progress, which says nothing about this table.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_export(job.run_dir, Path(folder) / "student", job.steps)
        yield str(Path(folder) / "student")


def write_results(job: Job, results: dict[str, Any]) -> None:
    """Write job.out with the environment beside the results, whole or not at all."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": rundir.environment(job.seed), "results": results}
    rundir.write_atomically(job.out, json.dumps(record, indent=1) + "\n")


def evaluate_checkpoint(config: Config, model: str, seed: int) -> dict[str, dict[str, Any]]:
    """`evaluate.summarize` of every final evaluation, with temperature and, at T=1, the reverse KL."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = check_models(config)
    prompts = load_prompts(config.eval.data, models.tokenizer, config.data).prompts
    scorer = Scorer(config, models, World(0, 1, device))
    engine = HfEngine(
        model,
        models.tokenizer,
        dtype=config.model.dtype,
        max_batch_size=config.rollout.max_batch_size,
        vocab_size=models.vocab_size,
        device=device,
    )
    results = {}
    with Judges(config.judge) as judges:
        for name, sampling in FINAL.items():
            evaluation = evaluate(
                engine,
                prompts,
                judges,
                samples=sampling.samples,
                temperature=sampling.temperature,
                max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
                seed=sampling_seed(seed, -1),
            )
            summary = {key: _strict(value) for key, value in evaluation.summary().items()}
            results[name] = {"temperature": sampling.temperature, **summary}
            if name == "t1":
                results[name]["reverse_kl"] = reverse_kl(scorer, evaluation.rollouts)
    engine.close()
    return results


def reverse_kl(scorer: Scorer, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Monte-Carlo KL(sampler ‖ frozen model) per sampled token at T=1, nats, by role."""
    n_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    out = {}
    for role, key in scorer.roles.items():
        scores = scorer.logprobs(key, rollouts, range(len(rollouts)), temperature=1.0)
        total = sum(float((rollout.logprobs - scores[i]).double().sum()) for i, rollout in enumerate(rollouts))
        out[role] = total / n_tokens
    return out


def _strict(value: Any) -> Any:
    """JSON has no NaN: the standard error of a single problem becomes null."""
    return None if isinstance(value, float) and math.isnan(value) else value
