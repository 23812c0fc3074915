"""From the throughput benchmark's numbers to the tables of docs/throughput.md and the README's summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from soak_report import provenance

BEGIN, END = "<!-- throughput:begin -->", "<!-- throughput:end -->"
RATES = {"rollout": "rollout/tokens_per_s", "scoring": "scoring/tokens_per_s", "learner": "learner/tokens_per_s"}
WORK = ("scoring", "reward", "batch", "loss", "learner", "weight_sync")


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The block of docs/throughput.md."""
    cells = [cell for workload in table["workloads"] for cell in workload["cells"]]
    lines = []
    for workload in table["workloads"]:
        rounds = len(workload["cells"][0]["rounds"])
        lines += [
            f"**{workload['title']}** ({rounds} round{'' if rounds == 1 else 's'})",
            "",
            "| engine | step, s | tokens/s, whole step | while generating | while scoring | while learning |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(rate_row(cell) for cell in workload["cells"]),
            "",
            f"| share of the step | engine generates | rollout | {' | '.join(WORK).replace('_', ' ')} |",
            f"| --- | ---: | ---: | {' | '.join('---:' for _ in WORK)} |",
            *(share_row(cell) for cell in workload["cells"]),
            "",
        ]
    titles = [workload["title"].split(",")[0] for workload in table["workloads"]]
    return "\n".join(
        [
            *lines,
            f"| what generating ahead gains; s of a step | {' | '.join(titles)} |",
            f"| --- | {' | '.join('---:' for _ in titles)} |",
            *overlap_rows([workload["overlap"] for workload in table["workloads"]]),
            "",
            f"Medians over the rounds of the medians over {counted(table)} steps of each of the {total(cells)} runs; "
            f"in brackets the rounds' least and largest. {provenance(table, results)}",
            "",
            f"![Who works when, at staleness 0 and 1]({figure})",
        ]
    )


def total(cells: Sequence[Mapping[str, Any]]) -> int:
    """Runs behind the tables."""
    return sum(len(cell["rounds"]) for cell in cells)


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


def overlap_rows(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Step times against what they could be, one column per workload."""

    def row(name: str, value: Callable[[Mapping[str, Any]], str]) -> str:
        return f"| {name} | {' | '.join(map(value, found))} |"

    return [
        row("the engine generates (staleness 0)", lambda one: f"{one['rollout']:.2f}"),
        row("the rank does anything else (staleness 0)", lambda one: f"{one['learn']:.2f}"),
        row("their sum", lambda one: f"{one['rollout'] + one['learn']:.2f}"),
        row("step at staleness 0", lambda one: f"{one['strict']:.2f}"),
        row("step at staleness 1", lambda one: f"{one['ahead']:.2f}"),
        row("the longer of the two, the least possible", lambda one: f"{max(one['rollout'], one['learn']):.2f}"),
        row("step at staleness 1 ÷ the longer", lambda one: with_range(one["ratio"])),
        row("of the shorter, hidden behind the longer", lambda one: with_range(percents(one["hidden"]), 0, " %")),
    ]


def percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def with_range(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """`median (least – largest)` over the rounds."""
    return f"{median(values):.{digits}f}{unit} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def summary(table: Mapping[str, Any], results: str) -> str:
    """The README's two lines."""
    workload = table["workloads"][-1]
    found, title = workload["overlap"], workload["title"]
    return (
        f"**Generating ahead, measured.** {title[0].upper()}{title[1:]}, a vLLM server on a core of its own: it "
        f"generates for {found['rollout']:.2f} s, the rank trains for {found['learn']:.2f} s, and a step takes "
        f"{found['strict']:.2f} s at staleness 0 and {found['ahead']:.2f} s at staleness 1, "
        f"{with_range(found['ratio'])} times the longer of the two. A CPU shows the overlap, not a GPU's speed: "
        f"[docs/throughput.md](docs/throughput.md). {provenance(table, results)}"
    )
