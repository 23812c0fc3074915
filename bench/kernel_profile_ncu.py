"""Nsight Compute on the three hot kernels, where it may read the GPU's counters: in many containers it may not."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent / "kernel_profile.py"
KERNELS = ("forward_kernel", "dlogits_kernel", "keep_kernel")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy")
# Not every GPU and version has them: without them the sections alone are asked for.
METRICS = ("sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum.per_second")
MOST_LAUNCHES = 24
NUMBERS = {
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput",
    "Registers Per Thread", "Dynamic Shared Memory Per Block", "Waves Per SM", "Theoretical Occupancy",
    "Achieved Occupancy", *METRICS,
}  # fmt: skip


def ncu_program() -> str | None:
    """ncu on PATH, or where the CUDA toolkit has it."""
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def command(program: str, metrics: Sequence[str], target: Sequence[str]) -> list[str]:
    """Counts only between cudaProfilerStart and Stop: what compiles and chooses tiles comes before."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    chosen = ["--metrics", ",".join(metrics)] if metrics else []
    return [
        program, "--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none",
        *sections, *chosen,
        "--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--launch-count", str(MOST_LAUNCHES), *target,
    ]  # fmt: skip


def run_ncu(shape: str, limit_s: float, tiny: bool = False) -> dict[str, Any]:
    """{"kernels": rows}, or {"trouble": what ncu said} where it gives no numbers."""
    program = ncu_program()
    if program is None:
        return {"trouble": "ncu is not on PATH"}
    target = [sys.executable, str(SCRIPT), "--ncu-target", shape, *["--tiny"] * tiny]
    trouble = ""
    for metrics in (METRICS, ()):
        try:
            done = subprocess.run(
                command(program, metrics, target), capture_output=True, text=True, timeout=max(1.0, limit_s / 2),
                env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"trouble": f"ncu did not end within {limit_s / 2:.0f} s"}
        rows = parse(done.stdout)
        if rows:
            return {"kernels": rows}
        trouble = message_of(done.stdout + "\n" + done.stderr) or f"status {done.returncode}, no rows"
    return {"trouble": trouble}


def message_of(text: str) -> str:
    """What ncu says of itself, errors before warnings, else the last line."""
    for mark in ("==ERROR==", "==WARNING=="):
        found = [line for line in text.splitlines() if line.startswith(mark)]
        if found:
            return " ".join(found)[:600]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:600] if lines else ""


def parse(text: str) -> list[dict[str, Any]]:
    """One row per kernel, block and grid, of the details page as CSV: means over its launches, in base units.

    "ID",…,"Kernel Name",…,"Block Size","Grid Size",…,"Section Name","Metric Name","Metric Unit","Metric Value"
    "0",…,"forward_kernel",…,"(256, 1, 1)","(768, 1, 1)",…,"Occupancy","Achieved Occupancy","%","12.50"
    """
    # Lines of ncu begin with ==, those of the program may be anything.
    table = [line for line in text.splitlines() if line.startswith('"')]
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    launches: dict[tuple[str, str, str], set[str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(table))):
        name, number = row.get("Metric Name"), as_number(row.get("Metric Value"))
        if name not in NUMBERS or number is None:
            continue
        unit = row.get("Metric Unit") or ""
        key = (row["Kernel Name"].partition("(")[0], row["Block Size"], row["Grid Size"])
        values.setdefault(key, {}).setdefault(f"{name} [{unit}]" if unit else name, []).append(number)
        launches.setdefault(key, set()).add(row["ID"])
    return [
        {"kernel": key[0], "block": key[1], "grid": key[2], "launches": len(launches[key])}
        | {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
        for key, found in values.items()
    ]


def as_number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None  # "n/a", and the rows of rules
