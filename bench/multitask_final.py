"""Final evaluation of one checkpoint of the two-domain table, on the held-out problems of every domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multitask_plan import BASELINES, SETS, baseline_file, table_config
from table1_final import Job, checkpoint_of, evaluate_checkpoint, write_results
from table1_plan import Run

from tcopd_fast.config import Config


def evaluation_jobs(out: Path, finished: Sequence[Run], steps: int, limit: int | None) -> list[Job]:
    """Final evaluations of the baselines and of finished runs."""
    baselines = [
        Job(name, baseline_file(out, name), 0, steps, limit, model=f"miniature:{name}") for name in BASELINES
    ]
    return baselines + [Job(run.name, run.final, run.seed, steps, limit, run_dir=run.folder) for run in finished]


def evaluate_job(job: Job) -> float:
    """Evaluate on every domain's held-out problems and write job.out; returns the mean accuracy at T=1."""
    config = table_config(job.steps, job.limit)
    with checkpoint_of(job) as model:
        results = {
            domain: evaluate_checkpoint(_only(config, path), model, job.seed) for domain, path in SETS.items()
        }
    write_results(job, results)
    return sum(result["t1"]["mean_at_k"] for result in results.values()) / len(results)


def _only(config: Config, path: str) -> Config:
    """The configuration with one of its held-out sets."""
    data = [source for source in config.eval.data if source.path == path]
    return config.model_copy(update={"eval": config.eval.model_copy(update={"data": data})})
