"""What a person sees of a run while it goes: metric files, progress lines.

Files under the run directory, one strict JSON object per line: metrics.jsonl (a line per step), eval.jsonl
(a line per step and evaluation set), token_samples.jsonl (a line per kept response), timeline.jsonl (a line per step,
see `timeline`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tcopd_fast.config_sections import LoggingConfig
from tcopd_fast.errors import UserError
from tcopd_fast.timeline import StepTimeline

_RUNNING_STEPS = 10
_MAX_KL_COLUMNS = 4


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop every line of `path` whose "step" is above `step`, and a last line that a crash left unfinished.

    The file is replaced atomically; a missing file is left missing. Raises UserError for any other line that
    is not a JSON object with an integer "step".
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            line_step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise UserError(
                f"{path}:{number}: not a JSON object with a step; repair or delete the line before resuming"
            ) from error
        if line_step <= step:
            kept.append(line + b"\n")
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class MetricsLog:
    """Writer of a run's metric files, TensorBoard events and, if asked for, Weights & Biases.

    Every line is flushed before the call returns; non-finite numbers become null. Tensors and numpy values
    are written as plain numbers or lists.

    resume_step: None for a new run (UserError when the directory already holds metrics), else the step of the
    checkpoint to go on from: later lines of all four files are cut off, later TensorBoard events are purged.
    enabled: False makes every method do nothing (ranks other than 0).
    run_config: the resolved configuration, shown by Weights & Biases.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        resume_step: int | None,
        *,
        enabled: bool = True,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._files: dict[str, IO[str]] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "eval", "token_samples", "timeline"):
            path = run_dir / f"{name}.jsonl"
            if resume_step is not None:
                truncate_jsonl(path, resume_step)
            elif path.exists() and path.stat().st_size:
                raise UserError(f"run_dir {run_dir}: already holds {path.name}; resume that run or name another folder")
            if name != "timeline" or config.timeline:
                self._files[name] = path.open("a", encoding="utf-8")
        if config.tensorboard:
            self._tensorboard = _open_tensorboard(run_dir / "tensorboard", resume_step)
        if config.wandb_project:
            self._wandb = _open_wandb(run_dir, config.wandb_project, run_config)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics; `metrics` maps `<stage>/<name>` to a number."""
        self._write("metrics", {"step": step, **metrics})
        self._scalars(step, metrics)

    def log_eval(self, record: Mapping[str, Any]) -> None:
        """Append one evaluation record ("step", "set", "mean_at_k", ...)."""
        self._write("eval", record)
        prefix = f"eval/{record['set']}"
        flat = {f"{prefix}/{key}": value for key, value in record.items() if key not in ("step", "set")}
        for teacher, value in (record.get("reverse_kl") or {}).items():
            flat[f"{prefix}/reverse_kl/{teacher}"] = value
        self._scalars(record["step"], flat)

    def log_tokens(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append token samples, one line per kept response."""
        for record in records:
            self._write("token_samples", record)

    def log_timeline(self, timeline: StepTimeline) -> None:
        """Append one step's spans; nothing with `logging.timeline` off."""
        self._write("timeline", timeline.record())

    def close(self) -> None:
        """Flush and close everything; calling it again is harmless."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(_strict(record), allow_nan=False) + "\n")
            self._files[name].flush()

    def _scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._tensorboard is None and self._wandb is None:
            return
        numbers = {key: value for key, value in _strict(metrics).items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})


def _strict(value: Any) -> Any:
    """`value` in types that strict JSON has: non-finite floats become None, tensors become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _open_tensorboard(log_dir: Path, resume_step: int | None) -> Any:
    try:
        # The import takes a second, which a run without TensorBoard need not pay.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "logging.tensorboard=true: needs the package tensorboard; install it or set the key to false"
        ) from error
    return SummaryWriter(str(log_dir), purge_step=None if resume_step is None else resume_step + 1)


def _open_wandb(run_dir: Path, project: str, run_config: Mapping[str, Any] | None) -> Any:
    import wandb

    id_file = run_dir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
    run = wandb.init(
        project=project,
        name=run_dir.resolve().name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=dict(run_config or {}),
    )
    # A resumed run logs steps again; W&B's own counter refuses to go back, a metric of ours does not.
    run.define_metric("*", step_metric="step")
    return run


def format_step(step: int, total: int, metrics: Mapping[str, Any]) -> str:
    """One step as one line; a metric that is absent is left out, one that is not finite reads n/a."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    columns = [
        ("accuracy", "rollout/accuracy", ".3f"),
        ("reward", "reward/mean", "+.3f"),
        ("length", "rollout/response_length_mean", ".1f"),
        *((label, key, ".3f") for label, key in _kl_columns(metrics)),
        ("entropy", "loss/entropy", ".3f"),
        ("grad", "learner/grad_norm", ".2f"),
    ]
    parts += [f"{label} {_number(metrics[key], spec)}" for label, key, spec in columns if key in metrics]
    if "time_s/step" in metrics:
        parts.append(f"{_number(metrics['time_s/step'], '.1f')} s")
    return "  ".join(parts)


def format_eval(record: Mapping[str, Any]) -> str:
    """One evaluation record as one line."""
    k = record.get("k", "k")
    parts = [f"eval at step {record['step']}  {record['set']}"]
    accuracy = f"mean@{k} {_number(record.get('mean_at_k'), '.3f')}"
    if record.get("standard_error") is not None:
        accuracy += f" ± {_number(record['standard_error'], '.3f')}"
    parts.append(accuracy)
    # Before the first step both are 0 by definition.
    columns = [("change", "change", "+.3f"), ("forgotten", "forgetting", ".3f")] if record["step"] else []
    columns += [
        (f"pass@{k}", "pass_at_k", ".3f"),
        ("length", "response_length_mean", ".1f"),
        ("truncated", "truncation_rate", ".3f"),
    ]
    for label, key, spec in columns:
        if record.get(key) is not None:
            parts.append(f"{label} {_number(record[key], spec)}")
    for teacher, value in (record.get("reverse_kl") or {}).items():
        parts.append(f"kl({teacher}) {_number(value, '.3f')}")
    return "  ".join(parts)


def _kl_columns(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, key) of the reverse KLs; the domain is named only when there is more than one."""
    found = []
    for key in metrics:
        head, _, domain = key.partition("/reverse_kl/")
        if domain and head.startswith("scoring/"):
            found.append((head.removeprefix("scoring/"), domain, key))
    several = len({domain for _, domain, _ in found}) > 1
    labels = [f"kl({name}/{domain})" if several else f"kl({name})" for name, domain, _ in found]
    return list(zip(labels, [key for _, _, key in found], strict=True))[:_MAX_KL_COLUMNS]


def _number(value: Any, spec: str) -> str:
    return "n/a" if value is None or not math.isfinite(value) else format(float(value), spec)


class Progress:
    """One line per step, and on a terminal a progress bar below the lines.

    The bar shows the rollout accuracy averaged over the last 10 steps and what is going on inside the step.
    When the stream is not a terminal only whole lines without control characters are written.

    total_steps: steps of the whole run. start_step: steps already done (resume). enabled: False writes
    nothing (ranks other than 0). Use as a context manager, or call `close`.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, *, enabled: bool = True, stream: IO[str] | None = None
    ) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._stream = sys.stdout if stream is None else stream
        self._recent: deque[float] = deque(maxlen=_RUNNING_STEPS)
        self._bar: RichProgress | None = None
        if enabled and self._stream.isatty():
            columns = (
                TextColumn("step {task.completed}/{task.total}", markup=False),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("{task.fields[accuracy]}", markup=False),
                TextColumn("{task.fields[phase]}", markup=False, style="dim"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task("steps", total=total_steps, completed=start_step, accuracy="", phase="")
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the step's line and move the bar."""
        accuracy = metrics.get("rollout/accuracy")
        if accuracy is not None and math.isfinite(accuracy):
            self._recent.append(float(accuracy))
        self.message(format_step(step, self._total, metrics))
        if self._bar is not None:
            text = f"accuracy {sum(self._recent) / len(self._recent):.3f}" if self._recent else ""
            self._bar.update(self._task, completed=step, accuracy=text, phase="")

    def phase(self, label: str, done: int | None = None, total: int | None = None) -> None:
        """Show what goes on inside the step, on terminals only: `rollout 87/128`."""
        if self._bar is not None:
            text = label if done is None else f"{label} {done}" + ("" if total is None else f"/{total}")
            self._bar.update(self._task, phase=text)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write one evaluation record as a line."""
        self.message(format_eval(record))

    def message(self, text: str) -> None:
        """Write one line (above the bar on a terminal)."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar down; calling it again is harmless."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
