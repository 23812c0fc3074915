"""What compute-sanitizer printed: how many errors, and in which kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

PREFIX = "========="
OTHER = "other"  # reports that name none of the kernels
# Of a process that ended with a status: its cases say what that means.
ENDS = ("Error: process didn't terminate successfully", "Target application returned an error")
SHOWN_REPORTS, SHOWN_LINES = 5, 4
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) errors?"),
    "racecheck": re.compile(
        r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"
    ),
}


@dataclass(frozen=True)
class Findings:
    """errors and warnings of the tool's summary, None without one: the tool did not get to its end.

    by_kernel: printed reports per kernel; fewer than the errors where the print limit was reached.
    shown: the first lines of the first reports of each kernel.
    """

    errors: int | None
    warnings: int | None
    by_kernel: dict[str, int] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)


def parse(text: str, tool: str, kernels: Iterable[str]) -> Findings:
    """kernels: function names to look for in the reports.

    ========= Invalid __global__ write of size 4 bytes
    =========     at forward_kernel+0x160 in _triton_forward.py:57
    =========     by thread (0,0,0) in block (0,0,0)
    =========
    ========= ERROR SUMMARY: 1 error
    """
    summary = SUMMARIES[tool].search(text)
    names = re.compile(rf"\b({'|'.join(map(re.escape, kernels))})\b")
    by_kernel: dict[str, int] = {}
    shown = []
    for report in reports_of(text):
        match = names.search("\n".join(report))
        name = match[1] if match else OTHER
        by_kernel[name] = by_kernel.get(name, 0) + 1
        if by_kernel[name] <= SHOWN_REPORTS:
            shown.append("\n".join(report[:SHOWN_LINES]))
    if summary is None:
        return Findings(None, None, by_kernel, shown)
    counts = summary.groupdict()
    return Findings(int(counts["errors"]), int(counts.get("warnings") or 0), by_kernel, shown)


def reports_of(text: str) -> list[list[str]]:
    """The lines of each report, without the prefix; the banner and the summary are none."""
    reports: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith(PREFIX):
            continue
        content = line.removeprefix(PREFIX).rstrip()
        if content.strip() == "COMPUTE-SANITIZER" or "SUMMARY:" in content:
            content = ""
        if content and not content.startswith("  "):
            reports.append([])  # a report begins without an indent
        if content:
            reports[-1].append(content.strip())
        elif reports[-1]:
            reports.append([])
    return [report for report in reports if report and not report[0].startswith(ENDS)]
