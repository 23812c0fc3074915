"""From the throughput benchmark's numbers to the tables of docs/throughput.md and the README's summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from soak_report import provenance

BEGIN, END = "<!-- throughput:begin -->", "<!-- throughput:end -->"
RATES = {"rollout": "rollout/tokens_per_s", "scoring": "scoring/tokens_per_s", "learner": "learner/tokens_per_s"}
WORK = ("scoring", "reward", "batch", "loss", "learner", "weight_sync")


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The block of docs/throughput.md."""
    return "\n".join(
        [
            "| engine | step, s | tokens/s, whole step | while generating | while scoring | while learning |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(rate_row(cell) for cell in table["cells"]),
            "",
            "Share of a step's wall time, per stage; in server mode rollout is the rank waiting for responses:",
            "",
            f"| engine | engine generates | rollout | {' | '.join(WORK).replace('_', ' ')} |",
            f"| --- | ---: | ---: | {' | '.join('---:' for _ in WORK)} |",
            *(share_row(cell) for cell in table["cells"]),
            "",
            *overlap_rows(table["overlap"]),
            "",
            f"Medians over {table['rounds']} rounds of the medians over {counted(table)} steps of a run. "
            f"{provenance(table, results)}",
            "",
            f"![Who works when, at staleness 0 and 1]({figure})",
        ]
    )


def counted(table: Mapping[str, Any]) -> int:
    """Steps of a run that count."""
    return table["steps"] - table["warm_up_steps"] - 1


def rate_row(cell: Mapping[str, Any]) -> str:
    found = cell["median"]
    rates = " | ".join(f"{found['rates'][name]:,.0f}" for name in RATES.values())
    return f"| {cell['title']} | {found['step_s']:.2f} | {found['rates']['batch/tokens_per_s']:,.0f} | {rates} |"


def share_row(cell: Mapping[str, Any]) -> str:
    shares = cell["median"]["shares"]
    apart = shares.get("generate", 0.0)
    cells = [f"{100 * apart:.0f} %" if apart else "in rollout"]
    cells += [f"{100 * shares.get(stage, 0.0):.0f} %" for stage in ("rollout", *WORK)]
    return f"| {cell['title']} | {' | '.join(cells)} |"


def overlap_rows(found: Mapping[str, Any]) -> list[str]:
    """Step times against what they could be."""
    longest, together = max(found["rollout"], found["learn"]), found["rollout"] + found["learn"]
    return [
        "| of a step, s | |",
        "| --- | ---: |",
        f"| the engine generates (staleness 0) | {found['rollout']:.2f} |",
        f"| the rank does anything else (staleness 0) | {found['learn']:.2f} |",
        f"| both, one after the other | {together:.2f} |",
        f"| step at staleness 0 | {found['strict']:.2f} |",
        f"| step at staleness 1 | {found['ahead']:.2f} |",
        f"| the longer of the two: the least that overlap can reach | {longest:.2f} |",
        f"| step at staleness 1 ÷ the longer | {with_range(found['ratio'])} |",
        f"| of the shorter, hidden behind the longer | {with_range([100 * h for h in found['hidden']], 0)} % |",
    ]


def with_range(values: Sequence[float], digits: int = 2) -> str:
    """`median (least – largest)` over the rounds."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def summary(table: Mapping[str, Any], results: str) -> str:
    """The README's two lines."""
    found = table["overlap"]
    return (
        f"**Generating ahead, measured.** With an engine on a core of its own, generating for {found['rollout']:.2f} s "
        f"and training for {found['learn']:.2f} s, a step takes {found['strict']:.2f} s at staleness 0 and "
        f"{found['ahead']:.2f} s at staleness 1: {with_range(found['ratio'])} times the longer of the two. A CPU shows "
        f"the overlap, not a GPU's speed: [docs/throughput.md](docs/throughput.md). {provenance(table, results)}"
    )
