"""The report page: one HTML file that loads nothing from anywhere and runs no script."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tcopd_fast import __version__
from tcopd_fast.clock import STAGES
from tcopd_fast.report.collect import Run, load_runs, number, reverse_kl_keys, summary_rows, union
from tcopd_fast.report.parts import chip, colour_keys, run_headers, table
from tcopd_fast.report.plots import SMOOTHING_STEPS, Series, curves, run_colour
from tcopd_fast.report.style import PAGE_STYLE, STAGE_COLOURS
from tcopd_fast.report.text import MISSING, escape, percent, seconds, size, summary_columns
from tcopd_fast.report.timeline import timeline_section
from tcopd_fast.report.tokens import token_section, token_style

_NO_FETCH = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_METER_PIXELS = 110
_ALWAYS_COMPARED = ("normalizer K", "steps", "seed", "device", "git SHA")
_EXPECTED_TO_DIFFER = ("started", "command")

_ROLLOUT_CHARTS = (
    ("rollout/accuracy", "Rollout accuracy", "%", 100.0),
    ("rollout/response_length_mean", "Response length", "tokens", 1.0),
    ("rollout/truncated_share", "Truncated responses", "%", 100.0),
)
_LEARNING_CHARTS = (
    ("batch/token_share", "Share of the response tokens", "%", 100.0),
    ("loss/entropy", "Entropy of the student", "nats per token", 1.0),
    ("loss/entropy_estimate", "Entropy of the student, estimated", "nats per token", 1.0),
    ("reward/mean", "Reward r", "nats per token", 1.0),
    ("reward/advantage_mean", "Advantage A, mean", "nats per token", 1.0),
    ("reward/advantage_std", "Advantage A, standard deviation", "nats per token", 1.0),
    ("reward/negative_share", "Teachers with λ < 0, share of what teachers add to A", "%", 100.0),
    ("loss/effective_sample_size", "Effective sample size", "share of the tokens", 1.0),
    ("learner/grad_norm", "Gradient norm", "before clipping", 1.0),
    ("batch/tokens_per_s", "Throughput", "response tokens trained on per second", 1.0),
    ("rollout/overlap_share", "Generating while ranks work, share of generating", "%", 100.0),
)


def write_report(run_dirs: Sequence[Path | str], out: Path) -> Path:
    """Write one self-contained HTML page that compares the runs; returns `out`.

    The page has results, settings, curves, time and memory by stage and sampled responses token by token, whatever
    of it each run has. Raises UserError for a directory that is not a run.
    """
    runs = load_runs(run_dirs)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(_page(runs), encoding="utf-8")
    os.replace(partial, out)
    return out


def _page(runs: Sequence[Run]) -> str:
    title = f"Distillation report: {', '.join(run.name for run in runs)}"
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sections = [_results(runs), _settings(runs), _curves(runs), _stages(runs), timeline_section(runs), _tokens(runs)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NO_FETCH}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{token_style()}</style></head><body><main>"
        f"<h1>On-policy distillation report</h1>{_lead(runs)}{_run_list(runs)}{_notes(runs)}{''.join(sections)}"
        f"<footer>tcopd-fast {escape(__version__)}, written {written}</footer></main></body></html>\n"
    )


def _lead(runs: Sequence[Run]) -> str:
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    students = union([str(_config(run, "model.path"))] for run in runs if _config(run, "model.path") is not None)
    return f'<p class="lead">{count} of {escape(", ".join(students) or "an unknown student")}</p>'


def _run_list(runs: Sequence[Run]) -> str:
    items = []
    for index, run in enumerate(runs):
        planned = run.planned_steps
        progress = f"step {run.last_step}" + (f" of {planned}" if planned else "")
        progress = "evaluated only" if run.evaluated_only else progress
        items.append(f"<li>{chip(index)}{escape(run.name)} <small>{escape(progress)}</small></li>")
    return f'<ul class="runs">{"".join(items)}</ul>'


def _notes(runs: Sequence[Run]) -> str:
    notes = [f"<li><b>{escape(run.name)}</b>: {escape('; '.join(run.notes))}</li>" for run in runs if run.notes]
    return f'<ul class="caption notes">{"".join(notes)}</ul>' if notes else ""


def _results(runs: Sequence[Run]) -> str:
    rows = summary_rows(runs)
    columns = summary_columns(rows)
    index = {run.name: i for i, run in enumerate(runs)}
    body, group = [], ""
    for position, row in enumerate(rows):
        if _set_title(row) != group:
            group = _set_title(row)
            body.append(f'<tr class="group"><th colspan="{len(columns) + 1}"><span>{escape(group)}</span></th></tr>')
        cells = "".join(f"<td>{escape(cells[position])}</td>" for _, _, cells in columns)
        body.append(f'<tr><th class="text">{chip(index[row["run"]])}{escape(row["run"])}</th>{cells}</tr>')
    heads = (f"<th>{escape(title)}<br><small>{escape(unit)}</small></th>" for title, unit, _ in columns)
    head = '<th class="text">run</th>' + "".join(heads)
    caption = (
        "The last evaluation of every run. mean@k: share of correct samples over k samples per problem, "
        "± one standard error. before: mean@k at the run's first evaluation. change: mean@k minus that at step 0. "
        "forgotten: the set's best mean@k so far minus the last one. pass@k: share of problems with at "
        "least one correct sample. KL: reverse KL(student ‖ teacher), nats per token. time/step: mean over all "
        "steps but the first."
    )
    return f'<h2>Results</h2><p class="caption">{caption}</p>{table(head, body)}'


def _set_title(row: Mapping[str, Any]) -> str:
    """`chains: 512 problems, k = 8, T = 1`."""
    facts = [f"{row['problems']} problems"] if row["problems"] is not None else []
    facts += [f"k = {row['k']}"] if row["k"] is not None else []
    facts += [f"T = {row['temperature']:g}"] if row["temperature"] is not None else []
    return f"{row['set']}: {', '.join(facts)}" if facts else row["set"]


def _settings(runs: Sequence[Run]) -> str:
    """Side by side what differs or matters most; below it, once, what all runs share."""
    body, shared = [], []
    for label, values in _setting_rows(runs):
        known = list(dict.fromkeys(value for value in values if value != MISSING))
        if len(known) == 1 and label not in _ALWAYS_COMPARED and not label.startswith("λ "):
            shared.append(f"<div><dt>{escape(label)}</dt><dd>{escape(known[0])}</dd></div>")
            continue
        mark = ' class="differs"' if len(known) > 1 and label not in _EXPECTED_TO_DIFFER else ""
        cells = "".join(f'<td class="text">{escape(value)}</td>' for value in values)
        body.append(f'<tr{mark}><th class="text">{escape(label)}</th>{cells}</tr>')
    head = '<th class="text">setting</th>' + run_headers(runs, range(len(runs)), "text")
    caption = '<p class="caption">Shaded rows differ between the runs.</p>' if len(runs) > 1 else ""
    title = "Equal in all runs that have it" if len(runs) > 1 else "All other settings"
    common = f'<h3>{title}</h3><dl class="panel shared">{"".join(shared)}</dl>' if shared else ""
    return f"<h2>Settings</h2>{caption}{table(head, body, 'auto')}{common}"


def _setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(label, one value per run); rows that no run fills are left out."""
    rows = [(f"λ {name}", [_lambda(run, name) for run in runs]) for name in union(run.teachers() for run in runs)]
    for label, key in (
        ("normalizer K", "objective.normalizer"),
        ("student", "model.path"),
        ("dtype", "model.dtype"),
        ("reference", "reference.path"),
        ("steps", "steps"),
        ("prompts per step", "rollout.prompts_per_step"),
        ("domain weights", "data.domain_weights"),
        ("samples per prompt", "rollout.samples_per_prompt"),
        ("longest response, tokens", "rollout.max_new_tokens"),
        ("temperature", "rollout.temperature"),
        ("rollout engine", "rollout.engine"),
        ("minibatches per rollout batch", "learner.minibatches"),
        ("epochs per rollout batch", "learner.epochs"),
        ("learning rate", "learner.lr"),
        ("warm-up, optimizer steps", "learner.warmup_steps"),
        ("ZeRO stage", "learner.zero_stage"),
        ("aggregation", "objective.aggregation"),
        ("warm-up of negative λ, steps", "objective.lambda_warmup_steps"),
        ("log-ratio clamp, nats", "objective.logratio_clamp"),
        ("advantage clamp, nats", "objective.advantage_clamp"),
        ("KL penalty to the reference", "objective.ref_kl_coef"),
        ("seed", "seed"),
    ):
        rows.append((label, [_plain(_config(run, key)) for run in runs]))
    rows.append(("device", [_plain(run.environment.get("device")) for run in runs]))
    rows.append(("git SHA", [_short_sha(_plain(run.environment.get("git_sha"))) for run in runs]))
    rows += [(key, [_plain(run.environment.get(key)) for run in runs]) for key in ("started", "command")]
    packages = union(map(str, _versions(run)) for run in runs)
    rows += [(f"{name} version", [_plain(_versions(run).get(name)) for run in runs]) for name in packages]
    return [(label, values) for label, values in rows if any(value != MISSING for value in values)]


def _lambda(run: Run, teacher: str) -> str:
    tables = run.lambda_table()
    if not tables or teacher not in union([map(str, _mapping(run.config.get("teachers"))), *tables.values()]):
        return MISSING
    values = {domain: number(table.get(teacher, 0.0)) for domain, table in tables.items()}
    texts = {d: MISSING if v is None else f"{v:g}".replace("-", "−") for d, v in values.items()}
    return ", ".join(f"{domain}: {text}" if domain else text for domain, text in texts.items())


def _curves(runs: Sequence[Run]) -> str:
    pairs = union((pair for row in run.metrics for pair in reverse_kl_keys(row)) for run in runs)
    divergences = [
        (f"scoring/{teacher}/reverse_kl/{domain}", f"Reverse KL to {teacher}, domain {domain}", "nats per token", 1.0)
        for teacher, domain in pairs
    ]
    names = union(row for run in runs for row in run.metrics)
    charts = [chart for own in (*_ROLLOUT_CHARTS, *divergences, *_LEARNING_CHARTS) for chart in _by_domain(names, *own)]
    figures = [*_eval_figures(runs), *(_metric_figure(runs, *chart) for chart in charts)]
    figures = [figure for figure in figures if figure]
    caption = (
        "Colours are the runs in the list at the top. Faint lines are single steps, strong lines their mean over "
        f"the {SMOOTHING_STEPS} steps around each. Evaluations are not smoothed; their band is the recorded "
        "confidence interval, and dashed lines are models that were evaluated only."
    )
    content = f'<div class="grid">{"".join(figures)}</div>' if figures else '<p class="missing">No metrics yet.</p>'
    return f'<h2>Curves</h2><p class="caption">{caption}</p>{content}'


def _by_domain(names: Iterable[str], key: str, title: str, *scale: Any) -> list[tuple[Any, ...]]:
    """A chart, and the same one for every domain that the metric is recorded for."""
    domains = [name.removeprefix(f"{key}/") for name in names if name.startswith(f"{key}/")]
    return [(key, title, *scale), *((f"{key}/{domain}", f"{title}, domain {domain}", *scale) for domain in domains)]


def _eval_figures(runs: Sequence[Run]) -> list[str]:
    keys = union((_eval_key(record) for record in run.evals) for run in runs)
    figures = []
    for key in keys:
        series = []
        for index, run in enumerate(runs):
            records = [r for r in run.evals if _eval_key(r) == key and number(r.get("mean_at_k")) is not None]
            if records:
                low, high = zip(*(_interval(record) for record in records), strict=True)
                steps, values = [r["step"] for r in records], [100 * r["mean_at_k"] for r in records]
                series.append(Series(index, steps, values, low, high, level=run.evaluated_only))
        if series:
            figures.append(_figure(f"Evaluation: {key}", "%", series, _last_step(runs)))
    return figures


def _eval_key(record: Mapping[str, Any]) -> str:
    temperature = number(record.get("temperature"))
    at = "" if temperature is None else f", T = {temperature:g}"
    return f"{record.get('set', '')}, mean@{record.get('k', 'k')}{at}"


def _interval(record: Mapping[str, Any]) -> tuple[float, float]:
    """Recorded confidence interval, else one standard error around the mean, in percent."""
    low, high, mean = (number(record.get(key)) for key in ("ci_low", "ci_high", "mean_at_k"))
    error = number(record.get("standard_error")) or 0.0
    mean = mean or 0.0
    return 100 * (mean - error if low is None else low), 100 * (mean + error if high is None else high)


def _metric_figure(runs: Sequence[Run], key: str, title: str, unit: str, factor: float) -> str:
    series = []
    for index, run in enumerate(runs):
        steps, values = run.curve(key)
        if steps:
            series.append(Series(index, steps, [factor * value for value in values]))
    return _figure(title, unit, series, _last_step(runs)) if series else ""


def _last_step(runs: Sequence[Run]) -> int:
    """The right end of every chart."""
    return max(row["step"] for run in runs for row in (*run.metrics, *run.evals))


def _figure(title: str, unit: str, series: Sequence[Series], last_step: int) -> str:
    caption = f"<figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
    image = f'<img alt="{escape(title)} over steps" src="{curves(series, last_step)}">'
    return f'<figure class="panel">{caption}{image}</figure>'


def _stages(runs: Sequence[Run]) -> str:
    timed = [index for index, run in enumerate(runs) if run.stage_seconds() or run.stage_peaks()]
    if not timed:
        return '<h2>Time and memory by stage</h2><p class="missing">No stage was timed.</p>'
    caption = (
        "Time is the mean over all steps but the first, which includes start-up; memory is the largest peak while the "
        "stage ran (device memory on a GPU, resident set of the process on a CPU)."
    )
    head = '<th class="text">stage</th>' + run_headers(runs, timed, "")
    times = {index: _with_rest(runs[index]) for index in timed}
    peaks = {index: runs[index].stage_peaks() for index in timed}
    return (
        f'<h2>Time and memory by stage</h2><p class="caption">{caption}</p>{_stage_bars(runs, times)}'
        f'<div class="pair"><section><h3>Time per step</h3>{table(head, _stage_rows(times, _time_cell, sum), "auto")}'
        f"</section><section><h3>Peak memory</h3>"
        f"{table(head, _stage_rows(peaks, lambda value, _: size(value), max), 'auto')}</section></div>"
    )


def _with_rest(run: Run) -> dict[str, float]:
    """Seconds per stage, and under "other" what the step took beyond its stages."""
    times = run.stage_seconds()
    step = run.per_step("time_s/step")
    if times and step is not None:
        times["other"] = max(0.0, step - sum(times.values()))
    return times


def _stage_bars(runs: Sequence[Run], times: Mapping[int, Mapping[str, float]]) -> str:
    longest = max(sum(time.values()) for time in times.values()) or 1.0
    bars = []
    for index, time in times.items():
        pieces = "".join(
            f'<i style="width:{100 * value / longest:.2f}%;background:{STAGE_COLOURS[stage]}" '
            f'title="{escape(f"{stage}: {seconds(value)}")}"></i>'
            for stage, value in time.items()
        )
        total = seconds(sum(time.values())) if time else MISSING
        name = f"<b>{escape(runs[index].name)}</b>"
        bars.append(f'<div class="bar">{name}<div class="stack">{pieces}</div><span>{total}</span></div>')
    return f'<div class="panel bars">{"".join(bars)}{colour_keys(STAGE_COLOURS)}</div>'


def _stage_rows(
    columns: Mapping[int, Mapping[str, float]],
    cell: Callable[[float, float], str],
    total: Callable[[Any], float],
) -> list[str]:
    """One row per stage and a last one for the step, one column per run index.

    A meter under each number is scaled to the table's largest.
    """
    largest = max((value for column in columns.values() for value in column.values()), default=0.0) or 1.0
    rows = []
    for stage in (*STAGES, "other"):
        if not any(stage in column for column in columns.values()):
            continue
        cells = []
        for index, column in columns.items():
            if stage not in column:
                cells.append(f"<td>{MISSING}</td>")
                continue
            width = f"width:{_METER_PIXELS * column[stage] / largest:.0f}px;background:{run_colour(index)}"
            text = cell(column[stage], sum(column.values()))
            cells.append(f'<td>{text}<div class="meter" style="{width}"></div></td>')
        rows.append(f'<tr><th class="text">{stage}</th>{"".join(cells)}</tr>')
    totals = "".join(f"<th>{cell(total(c.values()), sum(c.values())) if c else MISSING}</th>" for c in columns.values())
    return [*rows, f'<tr><th class="text">step</th>{totals}</tr>']


def _time_cell(value: float, step: float) -> str:
    share = f" <small>{percent(value / step)} %</small>" if 0 <= value < step else ""
    return seconds(value) + share


def _tokens(runs: Sequence[Run]) -> str:
    caption = (
        "Responses that the student sampled in training. First line: the advantage A = r − (log π_old − log π_ref) of "
        "every token. Then what each teacher adds to the reward r: (λ/K)(log π_teacher − log π_ref)."
    )
    sampled = [index for index, run in enumerate(runs) if not run.evaluated_only]
    blocks = [
        f'<details class="run"{" open" if index == sampled[0] else ""}><summary>{chip(index)} '
        f"{escape(runs[index].name)}</summary>{token_section(runs[index])}</details>"
        for index in sampled
    ]
    if not blocks:
        return '<h2>Sampled responses</h2><p class="missing">No run was trained.</p>'
    return f'<h2>Sampled responses</h2><p class="caption">{caption}</p>{"".join(blocks)}'


def _config(run: Run, key: str) -> Any:
    """A dotted key of the configuration; None when any part of the way is missing."""
    node: Any = run.config
    for part in key.split("."):
        node = _mapping(node).get(part)
    return node


def _short_sha(sha: str) -> str:
    """The first 10 digits; a trailing + (local changes) stays."""
    return sha[:10] + ("+" if sha.endswith("+") and len(sha) > 10 else "")


def _versions(run: Run) -> Mapping[str, Any]:
    return _mapping(run.environment.get("versions"))


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
