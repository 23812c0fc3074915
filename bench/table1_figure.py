"""Learning curves of Table 1: one panel per normalizer, evaluated checkpoints as dashed lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart in every common form of colour blindness; markers tell the lines apart in grey.
_LINES = {
    (1.0, 0.0): ("#56B4E9", "v"),
    (1.5, 0.0): ("#0072B2", "o"),
    (2.0, 0.0): ("#009E73", "^"),
    (1.5, -0.5): ("#D55E00", "s"),
    (1.5, -1.5): ("#A8467F", "D"),
}
_PANELS = {
    "none": "reward summed over teachers (normalizer: none)",
    "active": "reward divided by K (normalizer: active)",
}
_BASELINE = "#4b5563"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "tcopd-fast",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write OUT (SVG) and a PNG of the same name; returns both paths.

    Accuracy in percent at T=1 against training steps; line: mean over seeds, band: ± 1 standard error over seeds
    (none for a single seed). Baselines far below every curve are named at the lower edge instead of drawn.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.9))
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        low, high = _limits(table)
        for axes, (normalizer, title) in zip((left, right), _PANELS.items(), strict=True):
            _panel(axes, [row for row in table["rows"] if row["normalizer"] in (None, normalizer)])
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(low, high)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
            _baselines(axes, table, low)
        left.set_ylabel("accuracy on held-out problems, T=1 (%)")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(handles), frameon=False, columnspacing=1.4)
        seeds, samples = len(table["seeds"]), table["recipe"]["config"]["eval"]["samples"]
        caption = (
            f"(λ expert, λ anti-expert); lines: mean over seeds (n = {seeds}), {samples} samples per problem; "
            "bands: ± 1 standard error over seeds"
        )
        figure.text(0.5, 0.075, caption, ha="center", color=_BASELINE, fontsize=9)
        figure.subplots_adjust(left=0.065, right=0.99, top=0.93, bottom=0.22, wspace=0.04)
        out.parent.mkdir(parents=True, exist_ok=True)
        png = out.with_suffix(".png")
        figure.savefig(out, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=120)
    return [out, png]


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        weights = (row["lambdas"]["expert"], row["lambdas"]["anti_expert"])
        colour, marker = _LINES[weights]
        steps = [point["step"] for point in row["curve"]]
        means = [100 * point["mean"] for point in row["curve"]]
        errors = [100 * (point["standard_error"] or 0.0) for point in row["curve"]]
        label = f"{row['label']} ({weights[0]:g}, {weights[1]:g})".replace("-0", "−0").replace("-1", "−1")
        axes.plot(steps, means, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _baselines(axes: Axes, table: Mapping[str, Any], low: float) -> None:
    for entry in table["baselines"]:
        value = 100 * entry["final"]["t1"]["mean_at_k"]
        text = f"{entry['label']} {value:.1f}"
        # The name stands at the end where the curves are farther away.
        first, last = (
            min(abs(100 * row["curve"][end]["mean"] - value) for row in table["rows"]) for end in (0, -1)
        )
        at_left = first > last and value >= low
        if value >= low:
            axes.axhline(value, color=_BASELINE, linestyle="--", linewidth=1)
            level = value
        else:
            text, level = f"↓ {text}, below the axis", low
        axes.annotate(
            text,
            (0 if at_left else 1, level),
            xycoords=("axes fraction", "data"),
            xytext=(4 if at_left else -2, 3),
            textcoords="offset points",
            ha="left" if at_left else "right",
            color=_BASELINE,
            fontsize=8.5,
        )


def _limits(table: Mapping[str, Any]) -> tuple[float, float]:
    """Axis limits, percent: all curves with their bands and every baseline not far (20 points) below them."""
    ends = [
        100 * (point["mean"] + sign * (point["standard_error"] or 0.0))
        for row in table["rows"]
        for point in row["curve"]
        for sign in (-1, 1)
    ]
    levels = [100 * entry["final"]["t1"]["mean_at_k"] for entry in table["baselines"]]
    ends += [level for level in levels if level > min(ends) - 20]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin
