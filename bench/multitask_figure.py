"""Learning curves of the two-domain table: one panel per domain, evaluated checkpoints as dashed lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from multitask_report import DOMAINS
from table1_figure import STYLE

# Okabe and Ito's colours; the pairs that differ in the normalizer alone share one and differ in line and marker.
_LINES = {
    "mopd": ("#56B4E9", "v", "-"),
    "exopd": ("#0072B2", "o", "-"),
    "contrast_0.5_none": ("#D55E00", "s", "--"),
    "contrast_1.5_none": ("#A8467F", "D", "--"),
    "contrast_0.5_active": ("#D55E00", "s", "-"),
    "contrast_1.5_active": ("#A8467F", "D", "-"),
    "math_only": ("#009E73", "^", "-"),
    "largest_only": ("#B58900", "P", "-"),
}
_GREY = "#4b5563"


def draw(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write OUT (SVG) and a PNG of the same name; returns both paths.

    Accuracy in percent at T=1 against training steps; line: mean over seeds, band: ± 1 standard error over seeds
    (none for a single seed).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 5.6))
        panels = figure.subplots(1, len(DOMAINS), sharex=True)
        for axes, domain in zip(panels, DOMAINS, strict=True):
            _panel(axes, table, domain)
        panels[0].set_ylabel("accuracy on held-out problems, T=1 (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, columnspacing=1.4)
        samples = table["recipe"]["config"]["eval"]["samples"]
        caption = (
            "(λ own, λ other); ÷K: normalizer active. Lines: mean over seeds "
            f"(n = {len(table['seeds'])}), {samples} samples per problem; bands: ± 1 standard error over seeds"
        )
        figure.text(0.5, 0.125, caption, ha="center", color=_GREY, fontsize=9)
        figure.subplots_adjust(left=0.06, right=0.99, top=0.94, bottom=0.25, wspace=0.12)
        out.parent.mkdir(parents=True, exist_ok=True)
        png = out.with_suffix(".png")
        figure.savefig(out, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=120)
    return [out, png]


def _panel(axes: Axes, table: Mapping[str, Any], domain: str) -> None:
    for row in table["rows"]:
        colour, marker, line = _LINES[row["row"]]
        points = row["curve"][domain]
        steps, means = [point["step"] for point in points], [100 * point["mean"] for point in points]
        errors = [100 * (point["standard_error"] or 0.0) for point in points]
        axes.plot(steps, means, color=colour, marker=marker, linestyle=line, markersize=4.5, label=_label(row))
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    bottom = axes.get_ylim()[0]
    for entry in table["baselines"]:
        level = 100 * entry["final"][domain]["t1"]["mean_at_k"]
        text, at = f"{entry['label']} {level:.1f}", level
        if level < bottom - 20:
            text, at = f"↓ {text}, below the axis", bottom
        else:
            axes.axhline(level, color=_GREY, linestyle=":", linewidth=1)
        # Every curve begins at the student, so the experts' names are out of the way at the left.
        at_left = entry["name"] != "base"
        axes.annotate(
            text,
            (0 if at_left else 1, at),
            xycoords=("axes fraction", "data"),
            xytext=(4 if at_left else -2, 3),
            textcoords="offset points",
            ha="left" if at_left else "right",
            color=_GREY,
            fontsize=8.5,
        )
    axes.set_title(domain, fontsize=10)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _label(row: Mapping[str, Any]) -> str:
    weights = f"({row['lambdas']['own']:g}, {row['lambdas']['other']:g})".replace("-", "−")
    return f"{row['label']} {weights}" + (" ÷K" if row["normalizer"] == "active" else "")
