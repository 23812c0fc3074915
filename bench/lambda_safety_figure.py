"""The λ < 0 experiment at its harmful setting: accuracy, entropy and the anti-expert's share by guard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from lambda_safety_plan import HARMFUL, NORMAL
from matplotlib.figure import Figure
from table1_figure import STYLE

# Okabe and Ito's colours, told apart in every common form of colour blindness; markers tell the lines apart in grey.
_LINES = {
    "none": ("#D55E00", "s"),
    "logratio_clamp": ("#E69F00", "v"),
    "advantage_clamp": ("#56B4E9", "^"),
    "warm-up": ("#A8467F", "D"),
    "ref KL": ("#009E73", "P"),
    "all": ("#0072B2", "o"),
}
_GREY = "#4b5563"


def draw(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write OUT (its suffix is the format); returns [OUT]. Lines: means over seeds; bands: ± 1 standard error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 4.6))
        panels = figure.subplots(1, 3, sharex=True)
        titles = (
            "accuracy on held-out problems, T=1 (%)",
            "entropy (nats per token)",
            "anti-expert's share of the teachers' part (%)",
        )
        for row in table["rows"]:
            if row["row"] == NORMAL.key:
                label, colour, marker, dash = f"λ = {row['lambda']:g}, K = 2, no guard", _GREY, "", "--"
            elif (row["lambda"], row["normalizer"]) == HARMFUL:
                (colour, marker), dash = _LINES[row["guard"]], "-"
                label = "no guard" if row["guard"] == "none" else row["guard"]
            else:
                continue
            style = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.6}
            steps = [point["step"] for point in row["curve"]]
            means = [100 * point["mean"] for point in row["curve"]]
            errors = [100 * (point["standard_error"] or 0.0) for point in row["curve"]]
            panels[0].plot(steps, means, label=label.replace("-", "−") if dash == "--" else label, **style)
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            panels[0].fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            training = row["training"]
            panels[1].plot(training["step"], training["entropy"], **style)
            panels[2].plot(training["step"], [100 * share for share in training["negative_share"]], **style)
        bound = table["recipe"]["config"]["objective"]["alarm_negative_share"]
        panels[2].axhline(100 * bound, color=_GREY, linewidth=1, linestyle=":")
        panels[2].annotate("alarm", (1, 100 * bound), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        panels[1].set_ylim(bottom=0)
        panels[2].set_ylim(0, 100)
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("training step")
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(handles), frameon=False, columnspacing=1.2)
        caption = (
            f"Coloured: λ = {HARMFUL[0]:g}, reward not divided by K; lines: mean over seeds "
            f"(n = {len(table['seeds'])}); bands: ± 1 standard error over seeds"
        )
        figure.text(0.5, 0.085, caption.replace("-6", "−6"), ha="center", color=_GREY, fontsize=9)
        figure.subplots_adjust(left=0.04, right=0.99, top=0.92, bottom=0.24, wspace=0.16)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)
    return [out]
