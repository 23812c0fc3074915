"""What gpu_suite.sh ran on, and what came of it.

    python bench/gpu_summary.py about
    python bench/gpu_summary.py outcome --part PART [--dry-run] --steps STEPS.tsv --work FOLDER --out FOLDER

`outcome` reads one line per step (name, exit status, seconds), the tests' counts (WORK/gpu_tests.xml) and the demo's
runs (WORK/demo), writes OUT/gpu_PART.json and OUT/demo_gpu.json and prints a table. Exit status 1 when a step failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from tcopd_fast.machine import device_name, driver_version, source_commit

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "cut-cross-entropy", "trl", "verl")
COUNTS = ("tests", "failures", "errors", "skipped")
DEMO_RUNS = {"g_opd", "tc_opd"}


def about() -> dict[str, Any]:
    """Device, driver, versions and commit. Needs torch alone."""
    versions = {name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))}
    found: dict[str, Any] = {
        "device": device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }
    return found | {"git_sha": source_commit()}


def read_steps(file: Path) -> dict[str, dict[str, Any]]:
    """Step -> result in a word, exit status, seconds."""
    steps = {}
    for line in file.read_text().splitlines():
        name, status, seconds = line.split("\t")
        word = {"0": "passed", "124": "timed out", "137": "timed out"}.get(status, "failed")
        steps[name] = {"result": word, "exit_status": int(status), "seconds": int(seconds)}
    return steps


def judge_tests(step: dict[str, Any], report: Path) -> None:
    """Adds the counts. Tests that all skip have shown nothing."""
    counts = {}
    if report.is_file():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {key: int(suite.get(key, 0)) for key in COUNTS}
        step |= counts
    if step["result"] == "passed" and counts.get("tests", 0) - counts.get("skipped", 0) == 0:
        step |= {"result": "failed", "reason": "no test ran"}


def judge_demo(step: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The demo's runs: environment, evaluations and metrics. A demo without its two evaluations failed."""
    runs: dict[str, Any] = {}
    for run in sorted(path.parent for path in folder.glob("*/eval.jsonl")):
        runs[run.name] = {
            "environment": json.loads((run / "environment.json").read_text()),
            "eval": lines(run / "eval.jsonl"),
        }
        if (run / "metrics.jsonl").is_file():
            runs[run.name]["metrics"] = lines(run / "metrics.jsonl")
    missing = DEMO_RUNS - set(runs)
    if step["result"] == "passed" and missing:
        step |= {"result": "failed", "reason": f"no eval numbers of {', '.join(sorted(missing))}"}
    return runs


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def outcome(args: argparse.Namespace) -> int:
    steps = read_steps(args.steps)
    if "gpu_tests" in steps:
        judge_tests(steps["gpu_tests"], args.work / "gpu_tests.xml")
    if "demo" in steps:
        runs = judge_demo(steps["demo"], args.work / "demo")
        if runs:
            (args.out / "demo_gpu.json").write_text(
                json.dumps({"dry_run": args.dry_run, "runs": runs}, indent=1) + "\n"
            )
    command = f"bash bench/gpu_suite.sh{' --dry-run' * args.dry_run} {args.part}"
    report = {"dry_run": args.dry_run, "command": command, **about(), "steps": steps}
    (args.out / f"gpu_{args.part}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'step':14} {'result':10} {'seconds':>7}")
    for name, found in steps.items():
        detail = ", ".join(f"{found[key]} {key}" for key in COUNTS if key in found)
        print(f"{name:14} {found['result']:10} {found['seconds']:7}  {found.get('reason', '') or detail}")
    return int(any(found["result"] != "passed" for found in steps.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("about", help="device, driver and versions, in a line")
    judging = commands.add_parser("outcome", help="JSON and table of a part")
    judging.add_argument("--part", required=True)
    judging.add_argument("--dry-run", action="store_true")
    for name in ("steps", "work", "out"):
        judging.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "outcome":
        return outcome(args)
    found = about()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(
        f"{found['device']}; driver {found['driver']}; Python {found['python']}; CUDA {found['cuda']}; {versions}; "
        f"commit {found['git_sha']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
