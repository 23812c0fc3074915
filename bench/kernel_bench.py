"""Time, memory, work and error of the head kernels beside plain torch and other packages, on the same inputs.

    python bench/kernel_bench.py [--json OUT] [--shapes tiny|small|full] [--inputs random,peaked,real] [--rounds R]
                                 [--providers A,B] [--budget-s S]

One G is 2·N·V·D FLOP, the head's forward GEMM. Cases: token logprobs (forward; forward and backward with a fixed
random gradient per token), their mean (the only form some packages have), the policy loss, logprobs of K = 1, 2, 4, 8
frozen models, and the loss over the whole vocabulary with one teacher (reverse KL) and two signed ones. Inputs:
random (flat distributions, the worst case), peaked (synthetic, mean entropy 0.5 and 3 nats), real (hidden states of a
trained model on its own samples at two entropies; bench/kernel_suite/real_inputs.py makes them).

Every round calls each provider once, in rotating order, together with one bare GEMM hidden @ weightᵀ into a ready
buffer; `ratio` is the median over the rounds of a call's time in units of that round's GEMM. First calls
(compilation, tuning) are reported apart. Effective FLOP are those the result needs (1G or 3G), executed FLOP those
really done, counted at the matrix products where they can be seen. Errors are against float64 on all tokens (of heads
with more than 2^26 elements the weight's gradient is compared in the targets' rows and every 8th). Memory is the peak
of a call above its inputs in a fresh process, with the results and without ("extra"), beside the figure that the
algorithm implies. Clock: CUDA events on a GPU; wall time on a CPU, and on one CPU thread that thread's CPU time, which
other work on the machine hardly touches. The JSON names it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_profile_about import command_line
from kernel_suite import real_inputs
from kernel_suite.cases import BACKWARD_CASES, CASES, MEMORY_CASES, Case, cases_of
from kernel_suite.inputs import MAX_TEACHERS, PEAKED_ENTROPY, Problem
from kernel_suite.measure import clock_of, measure_case
from kernel_suite.memory import Job, in_fresh_processes, make_inputs
from kernel_suite.providers import OURS, PROVIDERS, Provider, make_providers

from tcopd_fast.rundir import environment

HEADS_VD = ((151936, 1024), (151936, 2560), (128256, 4096), (262144, 2304))
SHAPES_NVD = {
    "tiny": [(64, 1000, 32)],
    # A real vocabulary with few tokens and a narrow model, and a real model scaled by a quarter.
    "small": [(256, 151936, 256), (1024, 37984, 640)],
    "full": [(N, V, D) for N in (8192, 2048, 32768) for V, D in HEADS_VD],
}
INPUTS = ("random", "peaked", "real")
# The others' work does not depend on the distribution, and was measured at low entropy.
AT_HIGH_ENTROPY = ("eager", "compile", "cce", *OURS)
# Of the time budget; the rest is for memory.
TIMING_SHARE = 0.7
SHOWN_ERRORS = ("logprob", "loss", "grad_hidden", "grad_weight")


def problems_of(shapes: str, inputs: str, folder: Path) -> list[Problem]:
    """The first random one, then those that are not random, then the other shapes: a short budget sees each kind."""
    random = [Problem("random", *shape) for shape in SHAPES_NVD[shapes]] if "random" in inputs.split(",") else []
    peaked = [Problem(source, *SHAPES_NVD[shapes][0]) for source in PEAKED_ENTROPY if "peaked" in inputs.split(",")]
    real = real_inputs.problems(folder) if "real" in inputs.split(",") else []
    return [*random[:1], *peaked, *real, *random[1:]]


def work_of(problems: list[Problem]) -> list[tuple[Problem, list[Case]]]:
    """What one model does on every problem; then, on the first random one, several models and the whole vocabulary."""
    first = next((p for p in problems if p.source == "random"), None)
    work = [(p, [case for case in cases_of(p.source, p == first) if not case.models]) for p in problems]
    several = [] if first is None else [case for case in cases_of("random", True) if case.models]
    return [*work, (first, several)] if first is not None else work


def memory_jobs(problems: list[Problem], providers: dict[str, Provider]) -> list[tuple[str, Job]]:
    """Every case of a single model on the random problem with most tokens, forward and backward on the real one."""
    most = max((p for p in problems if p.source == "random"), key=lambda p: p.N, default=None)
    jobs = [(problem, name) for problem in problems if problem == most for name in MEMORY_CASES]
    jobs += [(problem, name) for problem in problems if problem.source == "real_low" for name in BACKWARD_CASES]
    return [(name, job) for job in jobs for name, p in providers.items() if not isinstance(p.offer(CASES[job[1]]), str)]


def measure(
    problems: list[Problem], providers: dict[str, Provider], rounds: int, deadline: float, folder: Path
) -> Iterator[dict[str, Any]]:
    """One row per (problem, case, provider). Cases that would begin after the deadline give a row saying so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for problem, cases in work_of(problems):
        # Compiled code is kept per function, and only so much of it, before torch falls back to eager.
        torch.compiler.reset()
        x = None
        for case in cases:
            head = {**problem._asdict(), "case": case.name, "fp32_logits_bytes": 4 * problem.N * problem.V}
            if time.monotonic() > deadline:
                yield head | {"skipped": "time budget spent"}
                continue
            teachers = MAX_TEACHERS if any(other.models for other in cases) else 0
            x = x or make_inputs(problem, device, teachers, folder)
            chosen = {
                name: p for name, p in providers.items() if problem.source != "real_high" or name in AT_HIGH_ENTROPY
            }
            for name, row in measure_case(case, chosen, x, rounds, device):
                yield head | {"provider": name, "dtype": str(x.hidden.dtype).removeprefix("torch.")} | row


def print_row(row: dict[str, Any]) -> None:
    where = f"{row['source']:11} {row['case']:25} {row['N']:5}x{row['V']}x{row['D']:<5}"
    if "skipped" in row:
        print(f"{where} skipped: {row['skipped']}", flush=True)
        return
    where += f" {row['provider']:18}"
    if "error" in row:
        print(f"{where} failed: {row['error']}", flush=True)
        return
    work = f"{row['executed_flop'] / (2 * row['N'] * row['V'] * row['D']):6.2f}" if "executed_flop" in row else "     -"
    numbers = f"{row['median_s'] * 1e3:9.2f} {row['ratio']:6.2f} {work} {row['effective_tflop_per_s']:8.3f}"
    shown = [(name, row.get(f"{name}_relative_error", row.get(f"{name}_max_error"))) for name in SHOWN_ERRORS]
    print(f"{where} {numbers}  {' '.join(f'{name} {e:.1e}' for name, e in shown if e is not None)}", flush=True)


def print_memory(row: dict[str, Any]) -> None:
    where = f"{row['problem']!s:38} {row['case']:25} {row['provider']:18}"
    sizes = [row.get(key) for key in ("extra_bytes", "theory_extra_bytes", "result_bytes")]
    numbers = " ".join("        -" if size is None else f"{size / 2**20:9.1f}" for size in sizes)
    print(f"{where} {row.get('memory_error') or row.get('memory_skipped') or numbers}", flush=True)


def run_benchmark(args: argparse.Namespace, device: torch.device) -> int:
    began = time.monotonic()
    names = args.providers.split(",") if args.providers else list(PROVIDERS)
    providers, offers = make_providers(names)
    problems = problems_of(args.shapes, args.inputs, args.real)
    about: dict[str, Any] = environment(0)
    about |= {"command": command_line("bench/kernel_bench.py", sys.argv[1:])}
    about |= {"clock": clock_of(device), "rounds": args.rounds, "load_average": os.getloadavg()[0]}
    if "real" in args.inputs.split(","):
        about["real_inputs"] = real_inputs.about(args.real)

    print(f"{'case':37} {'NxVxD':>17} {'provider':18} {'ms':>9} {'xG':>6} {'G run':>6} {'TFLOP/s':>8}  errors")
    rows = []
    for row in measure(problems, providers, args.rounds, began + TIMING_SHARE * args.budget_s, args.real):
        print_row(row)
        rows.append(row)
    write_json(args.json, about, began, offers, rows)

    print(f"\n{'peak memory beside inputs and results':83} {'MiB':>9} {'theory':>9} {'results':>9}")
    by_key = {(*(row.get(key) for key in (*Problem._fields, "case", "provider")),): row for row in rows}
    for found in in_fresh_processes(memory_jobs(problems, providers), args.real, device, began + args.budget_s):
        print_memory(found)
        row = by_key.get((*found.pop("problem"), found.pop("case"), found.pop("provider")), {})
        row |= found
    write_json(args.json, about, began, offers, rows)
    broken = [row for row in rows if row.get("provider") in OURS and ("error" in row or "memory_error" in row)]
    return int(bool(broken) or not any("ratio" in row for row in rows))


def write_json(
    out: Path | None, about: dict[str, Any], began: float, offers: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        data = {**about, "seconds": time.monotonic() - began, "providers": offers, "rows": rows}
        out.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON")
    parser.add_argument("--shapes", choices=SHAPES_NVD, default="full" if cuda else "small")
    parser.add_argument("--inputs", default="random,peaked", metavar="A,B", help=f"of {', '.join(INPUTS)}")
    parser.add_argument("--real", type=Path, default=Path("runs/kernel_inputs"), help="folder of the real inputs")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5)
    parser.add_argument("--providers", metavar="A,B", help=f"of {', '.join(PROVIDERS)} (default: all that run here)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no case later than this")
    args = parser.parse_args()
    for option, known in (("providers", PROVIDERS), ("inputs", INPUTS)):
        for name in (getattr(args, option) or "").split(","):
            if name and name not in known:
                parser.error(f"--{option}: unknown {name!r}; known are {', '.join(known)}")
    if args.providers:
        for name, about in make_providers(args.providers.split(","))[1].items():
            reasons = set(about["offers"].values())
            if "runs" not in reasons:
                parser.error(f"--providers: {name} cannot run here ({'; '.join(sorted(reasons))}); leave it out")
    if "real" in args.inputs.split(",") and not real_inputs.problems(args.real):
        parser.error(f"--inputs real: {args.real} has none; make them: python bench/kernel_suite/real_inputs.py")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    return run_benchmark(args, device)


if __name__ == "__main__":
    sys.exit(main())
