"""Peak memory and seconds of a step against the number of teachers, one line per placement, one row per shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from midsize_plan import LOGITS, SERIES
from midsize_report import GB, TITLES, measured, name_of, peak, stage_seconds
from table1_figure import STYLE

# Okabe and Ito's colours, told apart in every common form of colour blindness; markers tell the lines apart in grey.
_LINES = {
    "resident": ("#4b5563", "o"),
    LOGITS: ("#D55E00", "X"),
    "offload": ("#009E73", "P"),
    "delta": ("#0072B2", "s"),
    "lora": ("#56B4E9", "D"),
}


def draw(data: Mapping[str, Any], out: Path) -> None:
    """Write OUT (SVG). Cells that ran out of memory stand as crosses on the line of the GPU's memory."""
    shapes = list(data["shapes"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.1 * len(shapes) + 0.5))
        panels = figure.subplots(len(shapes), 2, squeeze=False)
        for (memory, seconds), shape in zip(panels, shapes, strict=True):
            _panel(memory, data, shape, lambda row: peak(row) / GB)
            _panel(seconds, data, shape, lambda row: stage_seconds(row, "step"))
            memory.set_title(f"{name_of(shape)}: peak memory, GB", fontsize=10, loc="left")
            seconds.set_title(f"{name_of(shape)}: a step without rollout, s", fontsize=10, loc="left")
            _out_of_memory(memory, data, shape)
        for axes in panels[-1]:
            axes.set_xlabel("teachers beside the reference")
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=5, label=TITLES[name])
            for name, (colour, marker) in _LINES.items()
            if any(measured(data, shape, name) for shape in shapes)
        ]
        figure.legend(handles=handles, loc="lower center", ncols=len(_LINES), frameon=False, fontsize=9)
        bottom = 0.75 / (3.1 * len(shapes) + 0.5)
        figure.subplots_adjust(left=0.06, right=0.985, top=0.94, bottom=bottom + 0.02, hspace=0.35, wspace=0.14)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})


def _panel(axes: Axes, data: Mapping[str, Any], shape: str, value: Callable[[Mapping[str, Any]], float]) -> None:
    for name in SERIES:
        rows = measured(data, shape, name)
        counts = sorted(rows)
        colour, marker = _LINES[name]
        axes.plot(counts, [value(rows[k]) for k in counts], color=colour, marker=marker, markersize=5, linewidth=1.6)
    axes.set_xticks(sorted({row["teachers"] for row in data["cells"]}))
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _out_of_memory(axes: Axes, data: Mapping[str, Any], shape: str) -> None:
    missing = [row for row in data["cells"] if row["shape"] == shape and row["result"] == "out of memory"]
    if not missing:
        return
    limit = data["device_bytes"] / GB
    axes.axhline(limit, color="#9ca3af", linewidth=0.8, linestyle="--")
    axes.annotate("out of memory", (1, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", ha="right", fontsize=8, color="#6b7280")  # fmt: skip
    for row in missing:
        axes.plot([row["teachers"]], [limit], color=_LINES[row["placement"]][0], marker="x", markersize=8)
