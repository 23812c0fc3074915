"""Peak memory of one call above its inputs, in a process that has done nothing else."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from kernel_suite import real_inputs, theory
from kernel_suite.cases import CASES, Case
from kernel_suite.inputs import PEAKED_ENTROPY, Inputs, Problem, peaked_inputs, random_inputs
from kernel_suite.providers import PROVIDERS, Provider, installed, summary

# (problem, case name)
Job = tuple[Problem, str]
# What takes long to import, and the provider that needs it.
PRELOADED = {
    "torch._inductor.compile_fx": "compile", "liger_kernel.chunked_loss": "liger", "cut_cross_entropy": "cce",
    "trl.trainer.utils": "trl",
}  # fmt: skip
WARM_UP_TOKENS = 4
# Providers that are measured side by side on one GPU, beside one of those that keep so much that two would not fit.
LIGHT_PROCESSES = 2
HEAVY_BYTES = 8 << 30


def make_inputs(problem: Problem, device: torch.device, teachers: int, folder: Path) -> Inputs:
    """The problem's inputs, the same in every process; `folder` holds the real ones."""
    if problem.source == "random":
        return random_inputs(problem, device, teachers)
    if problem.source in PEAKED_ENTROPY:
        return peaked_inputs(problem, device)
    return real_inputs.load(folder, problem, device)


def peak_of(provider: Provider, case: Case, x: Inputs) -> dict[str, int]:
    """Bytes above the inputs at the peak of a call after a first one, and those of its results.

    The first call compiles and tunes; where nothing is compiled, a few tokens do. GPU: the allocator's peak. CPU: the
    peak of the resident size, after freed memory was handed back to the system.
    """
    case.run(provider, x if x.hidden.is_cuda or "compile" in provider.name else x.head(WARM_UP_TOKENS))
    gc.collect()
    if x.hidden.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = case.run(provider, x)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = psutil.Process().memory_info().rss
        results = case.run(provider, x)
        peak = resident_peak() - before
    size = sum(value.numel() * value.itemsize for value in results.values())
    return {"peak_bytes": peak, "result_bytes": size, "extra_bytes": max(0, peak - size)}


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def measure_jobs(name: str, jobs: Sequence[Job], folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Per job peak_of and the theoretical figure, or the error."""
    provider = PROVIDERS[name]()
    rows = []
    for problem, case_name in jobs:
        case = CASES[case_name]
        row: dict[str, Any] = {"problem": problem, "case": case_name, "provider": name}
        torch.compiler.reset()
        try:
            x = make_inputs(problem, device, case.frozen, folder)
            row |= peak_of(provider, case, x)
            row["theory_extra_bytes"] = theory.extra_bytes(name, case, problem, x.hidden.itemsize)
            del x
        except Exception as error:
            row["memory_error"] = summary(error)
        rows.append(row)
    return rows


def _child(send: Connection, name: str, jobs: Sequence[Job], folder: Path, device: torch.device) -> None:
    try:
        send.send(measure_jobs(name, jobs, folder, device))
    except Exception as error:
        send.send(_failed(name, jobs, "memory_error", summary(error)))


def in_fresh_processes(
    work: Sequence[tuple[str, Job]], folder: Path, device: torch.device, deadline: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """One row per (provider, job). CPU: a process each; GPU: one per provider, because compiling takes long there.

    On a GPU a few run at a time, but of those that materialise the logits (by the theoretical figure) one.

    Children are forked from a server process that has imported everything and computed nothing. After the deadline
    (of time.monotonic) no child is started.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    modules = [module for module, provider in PRELOADED.items() if installed(provider)]
    context.set_forkserver_preload(["kernel_suite.memory", *modules])
    cuda = device.type == "cuda"
    groups: list[tuple[str, list[Job]]] = [(name, [job]) for name, job in work]
    if cuda:
        names = dict.fromkeys(name for name, _ in work)
        groups = [(name, [job for other, job in work if other == name]) for name in names]

    def run(group: tuple[str, list[Job]]) -> list[dict[str, Any]]:
        name, jobs = group
        if time.monotonic() > deadline:
            return _failed(name, jobs, "memory_skipped", "time budget spent")
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(send, name, jobs, folder, device))
        child.start()
        send.close()
        try:
            return receive.recv()
        except EOFError:
            child.join()
            return _failed(name, jobs, "memory_error", f"process ended with status {child.exitcode}")
        finally:
            child.join()

    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(LIGHT_PROCESSES) as side_by_side:
        pools = [side_by_side if cuda and not is_heavy(group) else alone for group in groups]
        for done in as_completed([pool.submit(run, group) for pool, group in zip(pools, groups)]):
            yield from done.result()


def is_heavy(group: tuple[str, Sequence[Job]]) -> bool:
    """Whether a job keeps more than HEAVY_BYTES beside inputs and results, as far as that is known; in bfloat16."""
    name, jobs = group
    sizes = [theory.extra_bytes(name, CASES[case], problem, 2) for problem, case in jobs]
    return any(size is not None and size > HEAVY_BYTES for size in sizes)


def _failed(name: str, jobs: Sequence[Job], key: str, reason: str) -> list[dict[str, Any]]:
    return [{"problem": problem, "case": case, "provider": name, key: reason} for problem, case in jobs]
