"""Who works when: a few steps of the rank and its engine, strictly on-policy and one batch ahead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from table1_figure import STYLE
from throughput_plan import AHEAD, STRICT

# Okabe and Ito's colours; waiting for responses is left white.
_COLOURS = {
    "generate": "#D55E00", "scoring": "#56B4E9", "reward": "#CC79A7", "batch": "#999999", "loss": "#F0E442",
    "learner": "#0072B2", "weight_sync": "#009E73",
}  # fmt: skip
_TRACKS = ("rank 0", "engine 0")


def draw(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write OUT (SVG): spans of both tracks against seconds, one panel per staleness, on one time scale."""
    workload = table["workloads"][-1]
    cells = {cell["name"]: cell for cell in workload["cells"]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name in zip(panels, (STRICT.name, AHEAD.name), strict=True):
            steps = cells[name]["timeline"]
            begin = steps[0]["start"]
            for step in steps:
                offset = step["start"] - begin
                axes.axvline(offset, color="#9ca3af", linewidth=0.8)
                for level, track in enumerate(_TRACKS):
                    for stage, start, end, *_ in step["tracks"][track]:
                        if stage in _COLOURS:
                            axes.broken_barh(
                                [(offset + start, end - start)], (-level - 0.4, 0.8), facecolor=_COLOURS[stage]
                            )
            axes.axvline(steps[-1]["end"] - begin, color="#9ca3af", linewidth=0.8)
            axes.set_yticks([0, -1], ["rank", "engine"])
            axes.set_title(f"{cells[name]['title']} ({workload['title'].split(',')[0]})", fontsize=10, loc="left")
        panels[-1].set_xlabel("seconds; grey lines: steps begin")
        panels[-1].set_xlim(left=0)
        handles = [Patch(color=colour, label=stage.replace("_", " ")) for stage, colour in _COLOURS.items()]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
        figure.subplots_adjust(left=0.07, right=0.99, top=0.93, bottom=0.22, hspace=0.35)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return [out]
