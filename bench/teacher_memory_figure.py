"""Memory of frozen models against the number of teachers, one line per placement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from table1_figure import STYLE
from teacher_memory_report import MB, TITLES, series_of

# Okabe and Ito's colours, told apart in every common form of colour blindness; markers tell the lines apart in grey.
_LINES = {
    "resident": ("#4b5563", "o"),
    "sharded 1": ("#E69F00", "^"),
    "sharded 2": ("#D55E00", "v"),
    "lora": ("#56B4E9", "D"),
    "delta": ("#0072B2", "s"),
    "offload": ("#009E73", "P"),
}


def draw(data: Mapping[str, Any], out: Path) -> None:
    """Write OUT (SVG): peak MB above a process without frozen models, and the same in checkpoints on the right."""
    checkpoint = data["bytes"]["full"] / MB
    with matplotlib.rc_context({**STYLE, "axes.spines.right": True}):
        figure = Figure(figsize=(8.6, 4.6))
        axes = figure.subplots()
        ends = []
        for one in series_of(data):
            colour, marker = _LINES[one.name]
            counts = sorted(one.bytes)
            values = [one.bytes[k] / MB for k in counts]
            axes.plot(counts, values, color=colour, marker=marker, markersize=5, linewidth=1.6)
            ends.append((values[-1], TITLES[one.name], colour, counts[-1]))
        top = max(value for value, *_ in ends)
        # Names stand at the lines' ends, moved up where they would overlap.
        level = float("-inf")
        for value, title, colour, last in sorted(ends):
            level = max(value, level + 0.055 * top)
            axes.annotate(title, (last, level), xytext=(38, 0), textcoords="offset points", va="center", color=colour,
                          fontsize=9, annotation_clip=False)  # fmt: skip
        axes.set_ylim(0, 1.04 * top)
        right = axes.twinx()
        right.set_ylim(0, 1.04 * top / checkpoint)
        right.tick_params(axis="y", colors="#6b7280", length=2, pad=1, labelsize=8)
        right.set_title(f"in checkpoints of {checkpoint:.0f} MB", fontsize=9, color="#6b7280", loc="right")
        axes.set_xticks(sorted({k for one in series_of(data) for k in one.bytes}))
        axes.set_xlabel("teachers beside the reference")
        kind = "peak GPU memory" if data["device"] == "cuda" else "peak resident memory"
        axes.set_ylabel(f"{kind} of the frozen models, MB")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.subplots_adjust(left=0.09, right=0.75, top=0.92, bottom=0.12)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})
