"""compute-sanitizer's memcheck and racecheck on one small case of every Triton kernel.

    python bench/sanitize.py [--tools memcheck,racecheck] [--json OUT] [--budget-s S] [--all-tiles] [--dry-run]
    python bench/sanitize.py --case NAME[,NAME]

The second form runs cases here, without a tool, and compares their results with float64. The first one does so in
child processes: without a tool, which also compiles the kernels, and then under each tool, all cases in one process,
because starting one under a tool is slow: what a tool reports of a kernel counts for each case that launches it. Cases
that did not end run again alone, while the budget lasts. At the end of each process under a tool a kernel commits a
fault on purpose (see sanitize_control.py): a tool that does not report it has checked nothing. Only our kernels are
instrumented, not those of torch and cuBLAS. Status 1 for a wrong result, an error of a tool, a fault that it missed,
or a kernel that was not launched.

memcheck sees reads and writes of global, local and shared memory outside of allocations, misaligned ones, and wrong
operands of wgmma. torch's caching allocator is off and allocations are padded, or accesses beyond one of them would
fall into the next. It does not see what reads past a row or a tile but stays inside an allocation (the results would
be wrong), and loads by TMA only from version 2026.2 on: they cannot leave their descriptor, which our code makes.
racecheck sees hazards in shared memory between threads of a block; none in global memory. By NVIDIA's release notes
versions before 2026.1 may report races that are none where warpgroups or mbarriers synchronise, as Triton's pipelines
do on sm_90: what it says is reported as it is, with its version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kernel_profile_about import about
from kernel_profile_launches import Launch, entry_kernels, function_name, record_launches
from sanitize_cases import CASES, run_case
from sanitize_control import run_control
from sanitize_processes import CONTROL, NO_FAULT, TOOLS, Child, Runner, checked_names, shown_command
from sanitize_report import OTHER, Findings, parse
from tcopd_kernels import _triton_tiles
from tcopd_kernels._triton_tiles import Tile

LOG_TAIL = 3000  # characters
LEAST_S = 20  # a process under a tool that has less is not started


@contextmanager
def tiles_of(all_tiles: bool) -> Iterator[None]:
    """Nothing is timed: the default tile of every kernel, or all candidates, each launched once."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TCOPD_KERNELS_CACHE=cache):
        name, instead = ("measure_ms", untimed) if all_tiles else ("choose_tile", default_tile)
        with mock.patch.object(_triton_tiles, name, instead):
            yield


def untimed(run: Callable[[], Any]) -> float:
    return 0.0


def default_tile(key: object, tiles: Sequence[Tile], launch: object, outputs: object = ()) -> Tile:
    return tiles[0]


def run_cases(names: Sequence[str], out: Path | None, control: str | None, all_tiles: bool) -> int:
    """One row per case, written after each of them. control: the tool that is watching. Status 1 for a wrong result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows: list[dict[str, Any]] = []
    with tiles_of(all_tiles):
        for name in names:
            rows.append(row_of(name, dtype, device))
            print(f"{name:28} {rows[-1]['seconds']:6.1f} s  {verdict(rows[-1])}", flush=True)
            if out is not None:
                partial = out.with_suffix(".partial")
                partial.write_text(json.dumps({"rows": rows}))
                os.replace(partial, out)
    if control in TOOLS:
        # A tool may end the kernel with an error, and takes another status than 0 for one more error.
        with suppress(RuntimeError):
            run_control(control, device)
            wait_for(device)
        return 0
    if control is not None:
        run_control(control, device)
        wait_for(device)
    return int(any(map(is_bad, rows)))


def row_of(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    began = time.monotonic()
    row: dict[str, Any] = {"case": name}
    with record_launches() as launches:
        try:
            row["wrong"] = run_case(name, dtype, device)[1]
            wait_for(device)
        # One case that fails must not hide the others.
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    kernels = dict(Counter(launch.kernel for launch in launches))
    return row | {"seconds": time.monotonic() - began, "kernels": kernels, "flags": flags_of(launches)}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def is_bad(row: dict[str, Any]) -> bool:
    return bool(row.get("failed") or row.get("wrong"))


def verdict(row: dict[str, Any]) -> str:
    if row.get("failed"):
        return f"failed: {row['failed']}"
    return f"wrong: {row['wrong']}" if row["wrong"] else "right"


def flags_of(launches: Sequence[Launch]) -> dict[str, list[Any]]:
    """kernel.FLAG -> the values of the switches that its launches had."""
    found: dict[str, set[Any]] = {}
    for launch in launches:
        for name, value in launch.options.items():
            if isinstance(value, bool):
                found.setdefault(f"{launch.kernel}.{name}", set()).add(value)
    return {name: sorted(values) for name, values in sorted(found.items())}


def without_tool(runner: Runner, cases: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """Every case in one of `jobs` processes side by side: are the results right, and which kernels run?

    A case that fails may cost those after it their CUDA context, so it is tried once more alone.
    """
    children = [runner.start(None, part) for j in range(jobs) if (part := cases[j::jobs])]
    found: dict[str, dict[str, Any]] = {}
    for child in children:
        child.wait(runner.left_s())
        found |= {row["case"]: row for row in child.rows()}
    rows = []
    for name in cases:
        row = found.get(name)
        if (row is None or row.get("failed")) and runner.left_s() > LEAST_S:
            child = runner.run(None, [name])
            row = {r["case"]: r for r in child.rows()}.get(name) or {"case": name, "failed": child.end()}
        rows.append(row or {"case": name, "failed": "time budget spent"})
    return rows


def under_tool(runner: Runner, tool: str, plain: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Findings of one tool: all cases together, then alone those that did not end.

    errors of a case: all reports of the kernels that it launches, whichever case they are from.
    plain: rows of without_tool.   share: of the time that is left.
    """
    plain = [row for row in plain if not row.get("failed")]
    if runner.left_s() < LEAST_S or not plain:
        return {"skipped": "time budget spent" if plain else "no case runs without the tool"}
    child = runner.run(tool, [row["case"] for row in plain], share)
    findings = findings_of(child, tool)
    ended = {row["case"]: row for row in child.rows()}
    rows = []
    for row in plain:
        own = ended.get(row["case"])
        if own is None or own.get("failed") or findings.errors is None:
            rows.append(alone(runner, tool, row["case"], share))
        else:
            names = {*map(function_name, row["kernels"]), OTHER}
            reports = {name: count for name, count in findings.by_kernel.items() if name in names}
            errors = {"errors": sum(reports.values()), "by_kernel": reports}
            rows.append({"case": row["case"], **errors, "seconds": own["seconds"], "wrong": own["wrong"]})
    return {
        "command": shown_command(child.command), "end": child.end(), "seconds": child.seconds,
        "log": child.log()[-LOG_TAIL:] if findings.errors is None else "",
        **asdict(findings), "control_reported": findings.by_kernel.get(CONTROL, 0) > 0, "rows": rows,
    }  # fmt: skip


def alone(runner: Runner, tool: str, case: str, share: float) -> dict[str, Any]:
    """errors: of the tool beside those of the control; None where it did not come to its summary."""
    if runner.left_s() < LEAST_S:
        return {"case": case, "errors": None, "skipped": "time budget spent"}
    child = runner.run(tool, [case], share)
    findings = findings_of(child, tool)
    errors = None if findings.errors is None else max(0, findings.errors - findings.by_kernel.get(CONTROL, 0))
    own = {row["case"]: row for row in child.rows()}.get(case, {})
    return {
        "case": case, "errors": errors, "seconds": child.seconds, "by_kernel": findings.by_kernel,
        "shown": findings.shown, "end": child.end(), "wrong": own.get("wrong"), "failed": own.get("failed"),
    }  # fmt: skip


def findings_of(child: Child, tool: str) -> Findings:
    return parse(child.log(), tool, checked_names())


def sanitizer_program() -> str | None:
    """compute-sanitizer on PATH, or where the CUDA toolkit has it."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitizer_version(program: str) -> str | None:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (\S+)", done.stdout, re.IGNORECASE)
    return found[1] if found else None


def faults_of(report: dict[str, Any]) -> list[str]:
    """What keeps the status from being 0, one line each."""
    faults = [f"{row['case']}: {verdict(row)}" for row in report["cases"] if is_bad(row)]
    faults += [f"never launched: {kernel}" for kernel in report["not_launched"]]
    for tool, found in report["tools"].items():
        if "skipped" in found:
            faults.append(f"{tool}: {found['skipped']}")
            continue
        faults += [f"{tool}: {row['case']}: {tool_verdict(row)}" for row in found["rows"] if row["errors"] != 0]
        faults += [f"{tool}: {row['case']}: {verdict(row)}" for row in found["rows"] if is_bad(row)]
        if not found["control_reported"]:
            faults.append(f"{tool} did not report the fault that was made on purpose: it may have checked nothing")
    return faults


def tool_verdict(row: dict[str, Any]) -> str:
    if row["errors"] is None:
        return row.get("skipped") or f"no summary; {row['end']}"
    return f"{row['errors']} errors in {', '.join(sorted(set(row['by_kernel']) - {CONTROL})) or OTHER}"


def check_all(args: argparse.Namespace) -> int:
    program = None if args.dry_run else sanitizer_program()
    report: dict[str, Any] = about("bench/sanitize.py", sys.argv[1:]) | {"dry_run": args.dry_run}
    report["compute_sanitizer"] = program and sanitizer_version(program)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(program, Path(folder), args.budget_s, args.all_tiles)
        report["cases"] = without_tool(runner, CASES, args.jobs)
        launched = {kernel for row in report["cases"] for kernel in row.get("kernels", ())}
        report["not_launched"] = sorted(set(entry_kernels()) - launched)
        report["tools"] = {}
        tools = [] if program is None else args.tools
        for place, tool in enumerate(tools):
            found = under_tool(runner, tool, report["cases"], 1 / (len(tools) - place))
            report["tools"][tool] = found
            print(f"{tool}: {found.get('skipped') or found['end']}, reports {found.get('by_kernel', {})}", flush=True)
    report["faults"] = faults_of(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_report(report)
    return int(bool(report["faults"]))


def print_report(report: dict[str, Any]) -> None:
    tools = report["tools"]
    print(f"\n{'case':28} {'result':8}" + "".join(f"{tool:>12}" for tool in tools))
    for row in report["cases"]:
        cells = []
        for found in tools.values():
            own = {r["case"]: r for r in found.get("rows", ())}.get(row["case"])
            cells.append("-" if own is None or own["errors"] is None else str(own["errors"]))
        print(f"{row['case']:28} {verdict(row)[:6]:8}" + "".join(f"{cell:>12}" for cell in cells))
    for fault in report["faults"]:
        print(f"FAULT {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=names_of(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--tools", type=names_of(TOOLS), default=list(TOOLS), metavar="A,B")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="end within about this time")
    parser.add_argument("--jobs", type=int, default=4 if torch.cuda.is_available() else 1, help="without a tool")
    parser.add_argument("--all-tiles", action="store_true", help="every tile that could be chosen, not the defaults")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in the interpreter, without a tool")
    parser.add_argument("--control", choices=[*TOOLS, NO_FAULT], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("no CUDA device; set TRITON_INTERPRET=1 to run a case in the interpreter")
        return run_cases(args.case, args.json, args.control, args.all_tiles)
    if not args.dry_run:
        if sanitizer_program() is None:
            parser.error("compute-sanitizer is not on PATH; it is part of the CUDA toolkit. --dry-run does without it")
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; --dry-run runs the cases on the CPU")
    elif torch.cuda.is_available():
        parser.error("--dry-run is for machines without a GPU; hide it with CUDA_VISIBLE_DEVICES=")
    return check_all(args)


def names_of(known: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known are {', '.join(known)}")
        return found

    return names


if __name__ == "__main__":
    sys.exit(main())
