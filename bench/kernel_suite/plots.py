"""SVG plots from the JSON that kernel_bench.py writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernel_suite.cases import BACKWARD_CASES, CASES
from kernel_suite.report import CASE_TITLES, MIB, TITLES, Run, source_title

# Okabe and Ito's colours; hatching tells the bars apart in grey.
_OURS, _PEER, _LINE = "#0072B2", "#9ca3af", "#4b5563"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "tcopd-kernels",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_time(run: Run, out: Path) -> None:
    """Forward and backward in G: one panel per class, solid at low entropy, hatched at high."""
    high = run.low.replace("low", "high")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.6))
        panels = figure.subplots(1, 2, sharex=True)
        for axes, case in zip(panels, BACKWARD_CASES, strict=True):
            low_ratio, high_ratio = (run.find("ratio", source=s, case=case) for s in (run.low, high))
            names = [name for name in reversed(run.providers) if name in low_ratio]
            for offset, found, hatch in ((0.2, low_ratio, ""), (-0.2, high_ratio, "//")):
                places = [(place, name) for place, name in enumerate(names) if name in found]
                bars = axes.barh(
                    [place + offset for place, _ in places], [found[name] for _, name in places], height=0.38,
                    color=[_OURS if name.startswith("ours") else _PEER for _, name in places],
                    hatch=hatch, edgecolor="white",
                )  # fmt: skip
                axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
            _name(axes, names)
            axes.axvline(CASES[case].gemms, color=_LINE, linestyle="--", linewidth=1)
            axes.set_title(CASE_TITLES[case], fontsize=10)
            axes.set_xlabel("time in G (one bare GEMM of the head)")
        caption = f"solid: {source_title(run, run.low)}; hatched: {source_title(run, high)}; dashed: GEMMs needed"
        figure.text(0.5, 0.015, caption, ha="center", color=_LINE, fontsize=9)
        _save(figure, out)


def draw_memory(run: Run, out: Path) -> None:
    """Peak bytes beside inputs and results at low entropy, log scale, with the theoretical figures as ticks."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.6))
        panels = figure.subplots(1, 2, sharex=True)
        source = run.low if run.find("extra_bytes", source=run.low) else "random"
        for axes, case in zip(panels, BACKWARD_CASES, strict=True):
            found, theory = (run.find(key, source=source, case=case) for key in ("extra_bytes", "theory_extra_bytes"))
            names = [name for name in reversed(run.providers) if name in found]
            colours = [_OURS if name.startswith("ours") else _PEER for name in names]
            bars = axes.barh(names, [found[name] / MIB for name in names], height=0.6, color=colours)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
            known = [(place, theory[name] / MIB) for place, name in enumerate(names) if theory.get(name)]
            axes.plot([t for _, t in known], [p for p, _ in known], "|", color="#D55E00", markersize=16)
            logits = max(run.find("fp32_logits_bytes", source=source, case=case).values()) / MIB
            for share, style in ((1.0, "--"), (0.05, ":")):
                axes.axvline(share * logits, color=_LINE, linestyle=style, linewidth=1)
            _name(axes, names)
            axes.set_xscale("log")
            axes.set_xlim(left=0.5)
            axes.set_title(CASE_TITLES[case], fontsize=10)
            axes.set_xlabel("MiB beside inputs and results")
        caption = f"{source_title(run, source)}; tick: in theory; dashed: fp32 logits; dotted: 5 % of them"
        figure.text(0.5, 0.015, caption, ha="center", color=_LINE, fontsize=9)
        _save(figure, out)


def _name(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [TITLES[name].replace("*", "") for name in names])
    axes.tick_params(axis="y", length=0)


def _save(figure: Figure, out: Path) -> None:
    figure.subplots_adjust(left=0.18, right=0.97, top=0.93, bottom=0.2, wspace=0.65)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None})
