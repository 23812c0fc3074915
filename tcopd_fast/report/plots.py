"""Curves as SVG images in data URIs, drawn without matplotlib's global figure state."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RUN_COLOURS = (
    "#2563eb",
    "#d9480f",
    "#0f9d76",
    "#a21caf",
    "#b58900",
    "#0e7490",
    "#be123c",
    "#4d7c0f",
    "#6d4aff",
    "#57534e",
)
_LINE_STYLES = ("-", "--", ":", "-.")
_MARKED_UP_TO = 15
_SMOOTHED_FROM = 30
SMOOTHING_STEPS = 5
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "tcopd-fast",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#4b5563",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
}


@dataclass(frozen=True)
class Series:
    """One run's line: x and y of equal length; low and high bound a band when given; `run` picks the colour.

    level: the first value holds for every step and is drawn as a dashed line across the chart.
    """

    run: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    level: bool = False


def run_colour(run: int) -> str:
    """Colour of the run with this index; the line style changes when colours start over."""
    return RUN_COLOURS[run % len(RUN_COLOURS)]


def curves(series: Sequence[Series], last_step: int) -> str:
    """A line chart over steps 0 to `last_step` as a data URI.

    Once a line has 30 points, every line is drawn faintly, with its mean over 5 steps on top; lines with
    a band are never smoothed.
    """
    longest = max(len(line.x) for line in series)
    smooth = longest >= _SMOOTHED_FROM and all(line.low is None for line in series)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            _draw(axes, line, smooth, markers=longest <= _MARKED_UP_TO)
        axes.set_xlabel("step")
        axes.set_xlim(-0.02 * last_step, 1.02 * last_step or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw(axes: Axes, line: Series, smooth: bool, markers: bool) -> None:
    colour = run_colour(line.run)
    style = _LINE_STYLES[line.run // len(RUN_COLOURS) % len(_LINE_STYLES)]
    if line.level:
        axes.axhline(line.y[0], color=colour, linewidth=1.5, linestyle="--")
        return
    y = line.y
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if smooth:
        axes.plot(line.x, y, color=colour, alpha=0.22, linewidth=1, linestyle=style)
        y = _running_mean(y, SMOOTHING_STEPS)
    axes.plot(line.x, y, color=colour, linewidth=1.8, linestyle=style, marker="o" if markers else None, markersize=3.5)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each value, fewer at the ends."""
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(near) / len(near) for near in around]
