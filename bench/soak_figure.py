"""Memory of a soak's processes over time, with its faults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from soak_plan import ENDING, ENGINE_KILLED, ENGINE_STOPPED, UNBROKEN
from table1_figure import STYLE

MB = 1e6
# Okabe and Ito's colours, told apart in every common form of colour blindness.
_COLOURS = {"rank 0": "#0072B2", "rank 1": "#56B4E9", "engine 0": "#D55E00"}
_GREY = "#4b5563"


def draw(table: Mapping[str, Any], out: Path) -> list[Path]:
    """Write OUT (SVG): resident MB of every process with its children against minutes; faults as numbered lines."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.6))
        axes = figure.subplots()
        named: set[str] = set()
        for life in table["memory"]:
            name = life["name"]
            if name == UNBROKEN:  # which ran after the soak
                continue
            minutes = [sample[0] / 60 for sample in life["samples"]]
            sizes = [sample[2] / MB for sample in life["samples"]]
            label = None if name in named else name
            axes.plot(minutes, sizes, color=_COLOURS[name], linewidth=1.5, label=label)
            named.add(name)
        top = 1.12 * axes.get_ylim()[1]
        axes.set_ylim(0, top)
        for number, fault in enumerate(table["faults"], start=1):
            minute, kind = fault["at"] / 60, fault["fault"]["kind"]
            style = "-" if kind in ENDING else "--" if kind in (ENGINE_KILLED, ENGINE_STOPPED) else ":"
            axes.axvline(minute, color=_GREY, linestyle=style, linewidth=0.9)
            # Two heights, so that numbers of faults soon after each other do not overlap.
            height = top * (0.985 if number % 2 else 0.94)
            axes.annotate(str(number), (minute, height), xytext=(2, 0), textcoords="offset points", va="top",
                          color=_GREY, fontsize=8.5)  # fmt: skip
        axes.set_xlabel("minutes")
        axes.set_ylabel("resident memory with children, MB")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        kinds = [f"{number} {fault['fault']['kind']}" for number, fault in enumerate(table["faults"], start=1)]
        half = (len(kinds) + 1) // 2
        for line, words in enumerate((kinds[:half], kinds[half:])):
            figure.text(0.5, 0.055 - 0.04 * line, "   ".join(words), ha="center", color=_GREY, fontsize=8)
        figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
        figure.subplots_adjust(left=0.075, right=0.99, top=0.93, bottom=0.18)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return [out]
