"""Read run directories and reduce them to the numbers that a report shows.

Reading is lenient where writing is strict: a run that crashed, or has no evaluation or token samples, still gives
what it has, and `Run.notes` says what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tcopd_fast import timeline
from tcopd_fast.clock import STAGES
from tcopd_fast.errors import UserError
from tcopd_fast.timeline import StepTimeline

Item = TypeVar("Item")

LAST_STEPS = 10
"""Steps averaged where a training metric is reduced to one number."""


@dataclass(frozen=True)
class Run:
    """One run directory.

    metrics: one mapping per step, ascending. evals: one record per (step, set), ascending. tokens: kept responses.
    timeline: who did what when in every step, ascending; empty where that was not recorded.
    config and environment are empty mappings when their file is missing. notes: what is missing or unreadable, and
    which alarms fired.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    tokens: Sequence[Mapping[str, Any]]
    timeline: Sequence[StepTimeline]
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """The last step with metrics; 0 when there is none."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def planned_steps(self) -> int | None:
        """`steps` of the configuration."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def evaluated_only(self) -> bool:
        """True for a model that was evaluated without being trained: such a run plans no steps."""
        return bool(self.evals) and not self.metrics and self.planned_steps is None

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, steps without a finite value left out."""
        points = [(row["step"], value) for row in self.metrics if (value := number(row.get(key))) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def recent(self, key: str) -> float | None:
        """Mean of a metric over the last 10 steps that have it."""
        return mean(self.curve(key)[1][-LAST_STEPS:])

    def per_step(self, key: str) -> float | None:
        """Mean over all steps but the first, which includes start-up costs (the first when it is the only one)."""
        values = self.curve(key)[1]
        return mean(values[1:] or values)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds per step of every recorded stage, in order."""
        found = {stage: self.per_step(f"time_s/{stage}") for stage in STAGES}
        return {stage: value for stage, value in found.items() if value is not None}

    def stage_peaks(self) -> dict[str, float]:
        """Largest peak memory of every recorded stage over the run, bytes, in order."""
        found = {stage: self.curve(f"peak_memory_bytes/{stage}")[1] for stage in STAGES}
        return {stage: max(values) for stage, values in found.items() if values}

    def lambda_table(self) -> dict[str, Mapping[str, Any]]:
        """λ per domain and teacher; the domain is "" for a table that holds for every domain."""
        lambdas = _mapping(_mapping(self.config.get("objective")).get("lambdas"))
        nested = {str(key): value for key, value in lambdas.items() if isinstance(value, Mapping)}
        return nested or ({"": lambdas} if lambdas else {})

    def teachers(self) -> list[str]:
        """Teacher names: configured, then any that only the records know."""
        names = [str(name) for name in _mapping(self.config.get("teachers"))]
        names += [name for table in self.lambda_table().values() for name in table]
        names += [name for record in self.evals for name in _mapping(record.get("reverse_kl"))]
        names += [teacher for row in self.metrics for teacher, _ in reverse_kl_keys(row)]
        return list(dict.fromkeys(names))


def load_runs(run_dirs: Sequence[Path | str]) -> list[Run]:
    """Read every directory, in the given order, under names that tell them apart.

    Raises UserError when no directory is given, one is given twice, or one is not a run.
    """
    paths = [Path(path) for path in run_dirs]
    if not paths:
        raise UserError("report: no run directory given; name at least one folder that a training run wrote")
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if not path.is_dir():
            raise UserError(f"report: {path} is not a folder; give the run_dir of a training run")
        if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise UserError(
                f"report: {path} is not a run (no config.yaml or metrics.jsonl in it); "
                "give the run_dir of a training run"
            )
        if resolved.count(real) > 1:
            raise UserError(f"report: {path} is given twice; name every run once")
    return [_load_run(path, name) for path, name in zip(paths, _short_names(resolved), strict=True)]


def summary_table(run_dirs: Sequence[Path | str]) -> list[dict[str, Any]]:
    """Final numbers, one row per evaluation set and run (see `summary_rows`)."""
    return summary_rows(load_runs(run_dirs))


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per evaluation set and run, sets together.

    Keys: run, set, step, problems, k, temperature, start (mean@k at the run's first evaluation, None when that is
    also the last), mean_at_k, standard_error, change and forgetting (as `evaluate.accuracy_change` recorded them),
    pass_at_k, response_length (tokens), truncation_rate, reverse_kl (teacher -> nats per token), time_s_per_step.
    What a run lacks is None. A run without evaluation gets one row over its training rollouts of the last 10 steps.
    """
    rows = [row for run in runs for row in (_eval_rows(run) or [_rollout_row(run)])]
    order = {key: index for index, key in enumerate(dict.fromkeys(_set_key(row) for row in rows))}
    return sorted(rows, key=lambda row: order[_set_key(row)])


def reverse_kl_keys(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(teacher, domain) of every `scoring/<teacher>/reverse_kl/<domain>` in one step's metrics."""
    found = []
    for key in metrics:
        head, _, domain = key.partition("/reverse_kl/")
        if domain and head.startswith("scoring/"):
            found.append((head.removeprefix("scoring/"), domain))
    return found


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None when empty."""
    return sum(values) / len(values) if values else None


def _eval_rows(run: Run) -> list[dict[str, Any]]:
    """Last evaluation of every set, with the first one beside it."""
    by_set: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in run.evals:
        by_set.setdefault(_set_key(record), []).append(record)
    rows = []
    for records in by_set.values():
        first, last = records[0], records[-1]
        rows.append(
            {
                "run": run.name,
                "set": str(last.get("set", "")),
                "step": last["step"],
                "problems": last.get("problems"),
                "k": last.get("k"),
                "temperature": number(last.get("temperature")),
                "start": number(first.get("mean_at_k")) if first["step"] < last["step"] else None,
                "mean_at_k": number(last.get("mean_at_k")),
                "standard_error": number(last.get("standard_error")),
                "change": number(last.get("change")),
                "forgetting": number(last.get("forgetting")),
                "pass_at_k": number(last.get("pass_at_k")),
                "response_length": number(last.get("response_length_mean")),
                "truncation_rate": number(last.get("truncation_rate")),
                "reverse_kl": {k: number(v) for k, v in _mapping(last.get("reverse_kl")).items()},
                "time_s_per_step": run.per_step("time_s/step"),
            }
        )
    return rows


def _rollout_row(run: Run) -> dict[str, Any]:
    keys = reverse_kl_keys(run.metrics[-1]) if run.metrics else []
    several = len({domain for _, domain in keys}) > 1
    return {
        "run": run.name,
        "set": f"training rollouts, last {LAST_STEPS} steps",
        "step": run.last_step,
        "problems": None,
        "k": None,
        "temperature": number(_mapping(run.config.get("rollout")).get("temperature")),
        "start": None,
        "mean_at_k": run.recent("rollout/accuracy"),
        "standard_error": None,
        "change": None,
        "forgetting": None,
        "pass_at_k": None,
        "response_length": run.recent("rollout/response_length_mean"),
        "truncation_rate": run.recent("rollout/truncated_share"),
        "reverse_kl": {
            f"{teacher}/{domain}" if several else teacher: run.recent(f"scoring/{teacher}/reverse_kl/{domain}")
            for teacher, domain in keys
        },
        "time_s_per_step": run.per_step("time_s/step"),
    }


def _set_key(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(record.get(key, "")) for key in ("set", "temperature", "k"))


def _load_run(path: Path, name: str) -> Run:
    notes: list[str] = []
    config = _read_mapping(path / "config.yaml", notes)
    environment = _read_mapping(path / "environment.json", notes)
    metrics = _read_jsonl(path / "metrics.jsonl", notes)
    run = Run(
        name=name,
        path=path,
        config=config,
        environment=environment,
        metrics=sorted({row["step"]: row for row in metrics}.values(), key=lambda row: row["step"]),
        evals=sorted(_read_jsonl(path / "eval.jsonl", notes), key=lambda record: record["step"]),
        tokens=_read_jsonl(path / "token_samples.jsonl", notes),
        timeline=_read_timeline(path, notes),
        notes=notes,
    )
    if run.evaluated_only:
        notes[:] = [note for note in notes if not note.startswith(("metrics.jsonl", "token_samples.jsonl"))]
    elif run.planned_steps is not None and run.last_step < run.planned_steps:
        notes.append(f"stopped at step {run.last_step} of {run.planned_steps}")
    notes += _alarm_notes(run)
    return run


def _alarm_notes(run: Run) -> list[str]:
    """One note per alarm that fired (see tcopd_fast.alarm)."""
    notes = []
    for key in ("reward/alarm_negative_share", "loss/alarm_entropy"):
        fired = [step for step, flag in zip(*run.curve(key), strict=True) if flag]
        if fired:
            notes.append(f"{key} in {len(fired)} of {len(run.metrics)} steps, first at step {fired[0]}")
    return notes


def _read_mapping(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """A YAML or JSON mapping; empty, with a note, when it cannot be had."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return {}
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        tree = parse(path.read_bytes())
    except (ValueError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, Mapping):
        notes.append(f"{path.name} is not readable")
        return {}
    return tree


def _read_jsonl(path: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    """Every line that is an object with an integer "step"; others are counted in a note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    rows, bad = [], 0
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, Mapping) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    elif not rows:
        notes.append(f"{path.name} is empty")
    return rows


def _read_timeline(path: Path, notes: list[str]) -> list[StepTimeline]:
    """The steps of timeline.jsonl, which a run may lack; lines of another form are counted in a note."""
    if not (path / timeline.FILE).is_file():
        return []
    steps, bad = {}, 0
    for row in _read_jsonl(path / timeline.FILE, notes):
        try:
            step = timeline.parse(row)
        except ValueError:
            bad += 1
        else:
            steps[step.step] = step
    if bad:
        notes.append(f"{timeline.FILE}: {bad} line{'s' if bad > 1 else ''} of another form left out")
    return [steps[number] for number in sorted(steps)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest path endings, of equal depth, that differ."""
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def union(lists: Iterable[Iterable[Item]]) -> list[Item]:
    """Every item once, in order of first appearance."""
    return list(dict.fromkeys(item for items in lists for item in items))
