"""The section of the report that shows who worked when, and how far generation and learning overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from tcopd_fast.clock import STAGES
from tcopd_fast.report.collect import Run, mean, number
from tcopd_fast.report.parts import chip, colour_keys, run_headers, table
from tcopd_fast.report.style import STAGE_COLOURS
from tcopd_fast.report.text import MISSING, escape, fixed, percent, seconds
from tcopd_fast.timeline import GENERATE, Span, StepTimeline, Use, use

_COLOURS = {stage: STAGE_COLOURS[stage] for stage in STAGES} | {GENERATE: "#60a5fa"}
_LANES = 16
"""Ranks drawn, and engines."""
_TICKS = 8
_USES = (
    ("generating", "generating"),
    ("working", "working"),
    ("both at once", "both"),
)
_RATES = (
    ("tokens/s <small>trained on, of the whole step</small>", "batch/tokens_per_s"),
    ("tokens/s <small>generated, while generating</small>", "rollout/tokens_per_s"),
    ("tokens/s <small>scored, while scoring</small>", "scoring/tokens_per_s"),
    ("tokens/s <small>learned from, while learning</small>", "learner/tokens_per_s"),
)


def timeline_section(runs: Sequence[Run]) -> str:
    """The heading, a chart per run that recorded its timeline, and one table over them."""
    shown = [index for index, run in enumerate(runs) if run.timeline]
    if not shown:
        return '<h2>Timeline</h2><p class="missing">No run recorded when its ranks and engines worked.</p>'
    caption = (
        "Three neighbouring steps of about median length, without the first one, which includes start-up, and without "
        "what lies between steps (evaluation, checkpoints). A rank that waits for responses of engines in processes of "
        "their own is at its rollout."
    )
    charts = "".join(f"<h3>{chip(index)} {escape(runs[index].name)}</h3>{_chart(runs[index])}" for index in shown)
    return f'<h2>Timeline</h2><p class="caption">{caption}</p>{charts}{_numbers(runs, shown)}'


def steps_shown(timeline: Sequence[StepTimeline]) -> Sequence[StepTimeline]:
    """Three neighbouring steps (or what there is) whose total length is nearest to three times the median length.

    The run's first step is left out unless it is the only one.
    """
    steps = timeline[1:] or timeline
    count = min(3, len(steps))
    usual = count * median(step.seconds for step in steps)
    windows = [steps[i : i + count] for i in range(len(steps) - count + 1)]
    return min(windows, key=lambda window: abs(sum(step.seconds for step in window) - usual))


def _chart(run: Run) -> str:
    steps = steps_shown(run.timeline)
    offsets = [sum(step.seconds for step in steps[:i]) for i in range(len(steps))]
    length = sum(step.seconds for step in steps) or 1.0
    names = [*_drawn(steps, "rank"), *_drawn(steps, "engine")]
    borders = "".join(f'<u style="left:{100 * offset / length:.3f}%"></u>' for offset in offsets[1:])
    lanes = [_heads(steps, offsets, length)]
    for name in names:
        bars = "".join(
            _bar(span, step, offset, length)
            for step, offset in zip(steps, offsets, strict=True)
            for span in step.tracks.get(name, ())
        )
        lanes.append(f'<div class="lane"><b>{name}</b><div class="strip">{bars}{borders}</div></div>')
    lanes.append(_ticks(length))
    hidden = len({name for step in steps for name in step.tracks}) - len(names)
    more = f'<p class="caption">{hidden} more not shown.</p>' if hidden else ""
    present = {span.stage for step in steps for name in names for span in step.tracks.get(name, ())}
    keys = colour_keys({stage: colour for stage, colour in _COLOURS.items() if stage in present})
    return f'<div class="panel gantt">{"".join(lanes)}{more}{keys}</div>'


def _drawn(steps: Sequence[StepTimeline], kind: str) -> list[str]:
    names = {name for step in steps for name in step.tracks if name.startswith(f"{kind} ")}
    return sorted(names, key=lambda name: int(name.split()[1]))[:_LANES]


def _heads(steps: Sequence[StepTimeline], offsets: Sequence[float], length: float) -> str:
    cells = "".join(
        f'<span style="left:{100 * offset / length:.3f}%;width:{100 * step.seconds / length:.3f}%">'
        f"step {step.step}: {seconds(step.seconds)}</span>"
        for step, offset in zip(steps, offsets, strict=True)
    )
    return f'<div class="lane heads"><b></b><div class="strip">{cells}</div></div>'


def _bar(span: Span, step: StepTimeline, offset: float, length: float) -> str:
    start, end = max(span.start, step.start), min(span.end, step.end)
    if end <= start or span.stage not in _COLOURS:
        return ""
    left, width = 100 * (offset + start - step.start) / length, 100 * (end - start) / length
    tokens = f", {span.tokens} tokens" if span.tokens else ""
    label = f"step {step.step}: {span.stage}, {seconds(span.end - span.start)}{tokens}"
    style = f"left:{left:.3f}%;width:{width:.3f}%;background:{_COLOURS[span.stage]}"
    return f'<i style="{style}" title="{escape(label)}"></i>'


def _ticks(length: float) -> str:
    """Seconds since the first step shown began, at round numbers."""
    unit = 10 ** math.floor(math.log10(length / _TICKS))
    spacing = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit * _TICKS >= length)
    count = int(length * 0.97 / spacing)
    digits = max(0, -math.floor(math.log10(spacing) + 1e-9))
    cells = "".join(
        f'<span style="left:{100 * i * spacing / length:.3f}%">{i * spacing:.{digits}f} s</span>'
        for i in range(count + 1)
    )
    return f'<div class="lane ticks"><b></b><div class="strip">{cells}</div></div>'


def _numbers(runs: Sequence[Run], shown: Sequence[int]) -> str:
    """What each stage took, and beside it what overlapped and the rates."""
    caption = (
        "Means over all steps but the first. Per stage: seconds of a step, averaged over the ranks (generate: over the "
        "engines), and that share of the step. Generating: some engine (without engines of their own: some rank) "
        "generated. Working: some rank was at another stage than rollout. A step over max(generating, working) of 1 "
        "says that the longer of the two hid the other completely."
    )
    columns = {index: runs[index].timeline[1:] or runs[index].timeline for index in shown}
    uses = {index: [use(step) for step in steps] for index, steps in columns.items()}
    lengths = {index: mean([used.step for used in own]) for index, own in uses.items()}
    busy = {index: _stage_means(steps) for index, steps in columns.items()}
    stages = [
        _row(stage, (_time(busy[index].get(stage), lengths[index]) for index in shown))
        for stage in _COLOURS
        if any(stage in means for means in busy.values())
    ]
    overlap = [
        _row(label, (_time(mean([getattr(used, name) for used in uses[index]]), lengths[index]) for index in shown))
        for label, name in _USES
    ]
    overlap.append(_row("step", (seconds(lengths[index]) for index in shown)))
    overlap.append(_row("step ÷ max(generating, working)", (fixed(_over_ideal(uses[index]), 2) for index in shown)))
    overlap += [_row(label, (_rate(runs[index].per_step(key)) for index in shown)) for label, key in _RATES]
    head = '<th class="text">per step</th>' + run_headers(runs, shown, "")
    return (
        f'<p class="caption">{caption}</p><div class="pair">'
        f"<section><h3>Time by stage</h3>{table(head, stages, 'auto')}"
        f"</section><section><h3>Overlap and throughput</h3>{table(head, overlap, 'auto')}</section></div>"
    )


def _row(label: str, cells: Iterable[str]) -> str:
    return f'<tr><th class="text">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _stage_means(steps: Sequence[StepTimeline]) -> Mapping[str, float]:
    """Stage -> seconds per step, mean over the steps and the ranks (engines for `generate`)."""
    busy = [(step, step.busy()) for step in steps]
    means = {}
    for stage in _COLOURS:
        values = [
            tracks[name].get(stage, 0.0)
            for step, tracks in busy
            for name in (step.engines if stage == GENERATE else step.ranks)
        ]
        if any(values):
            means[stage] = mean(values) or 0.0
    return means


def _over_ideal(uses: Sequence[Use]) -> float | None:
    return mean([value for u in uses if (value := number(u.over_ideal)) is not None])


def _time(value: float | None, step: float | None) -> str:
    if value is None:
        return MISSING
    return f"{seconds(value)} <small>{percent(value / step)} %</small>" if step else seconds(value)


def _rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}".replace(",", " ")
