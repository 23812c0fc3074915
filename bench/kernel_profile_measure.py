"""Times for bench/kernel_profile.py: the ceilings, whole calls, and what the device spends in each kernel."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import roofline_model as model
import torch
from kernel_profile_launches import (
    Launch,
    compiled_facts,
    function_name,
    record_launches,
    tile_label,
)
from kernel_profile_operations import PRODUCTS, Inputs, Operation
from kernel_suite.measure import seconds_of
from torch.autograd import DeviceType

COPY_BYTES = 2 << 30
GEMM, COPY = "gemm", "copy"
PROFILED_CALLS = 3
# How cuBLAS and CUTLASS name their kernels, and torch its operators, which is what a CPU has.
PRODUCT_NAMES = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm")
SHOWN_KERNELS = 12


def ceilings(x: Inputs, copy_bytes: int) -> dict[str, Callable[[], object]]:
    """One product hidden @ weightᵀ into a ready buffer, and one copy of copy_bytes."""
    hidden, weight = x.hiddens[0], x.weights[0]
    out = hidden.new_empty(len(hidden), len(weight))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=hidden.device).random_()
    target = torch.empty_like(source)
    return {GEMM: lambda: torch.mm(hidden, weight.T, out=out), COPY: lambda: target.copy_(source)}


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Median milliseconds; every round calls all once, in rotating order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(1e3 * seconds_of(calls[name], device))
    return {name: {"ms": statistics.median(values), "rounds_ms": values} for name, values in times.items()}


def first_call(operation: Operation, x: Inputs) -> float:
    """Seconds of the call that compiles the kernels and chooses their tiles."""
    began = time.perf_counter()
    operation.call(x)
    if x.targets.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def launch_rows(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """One row per kernel, tile and grid: launches per call, programs and what the compiler says of it."""
    groups: dict[tuple[str, str | None, int], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.kernel, tile_label(launch.options), launch.programs), []).append(launch)
    rows = []
    for (kernel, tile, programs), members in groups.items():
        row = {"kernel": kernel, "tile": tile, "launches": len(members) / PROFILED_CALLS, "programs": programs}
        compiled = members[0].compiled
        rows.append(row | ({} if compiled is None else compiled_facts(compiled)))
    return rows


def profile(operation: Operation, x: Inputs) -> dict[str, Any]:
    """What a call launches, and device milliseconds per call by kernel; `trouble` where the profiler saw none."""
    cuda = x.targets.is_cuda
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs every start and stop
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler, record_launches() as launches:
        for _ in range(PROFILED_CALLS):
            operation.call(x)
        if cuda:
            torch.cuda.synchronize()
    ours = {function_name(launch.kernel) for launch in launches}
    found = kernel_times(profiler.events(), DeviceType.CUDA if cuda else DeviceType.CPU, ours)
    if not found["kernels"]:
        found["trouble"] = "torch.profiler saw no kernel"
    return found | {"launched": launch_rows(launches)}


def kernel_times(events: Iterable[Any], device_type: DeviceType, ours: set[str]) -> dict[str, Any]:
    """Milliseconds and launches per call of our kernels, of the matrix products, and the longest of the others.

    events: of torch.profiler over PROFILED_CALLS calls; annotated ranges on the device hold kernels that are there as
    well. On a CPU an operator's own time stands for a kernel's.
    """
    totals: dict[str, list[float]] = {}
    for event in events:
        if event.device_type != device_type or (device_type == DeviceType.CUDA and event.is_user_annotation):
            continue
        us = event.time_range.elapsed_us() if device_type == DeviceType.CUDA else event.self_cpu_time_total
        totals.setdefault(event.name, []).append(us)
    kernels: dict[str, dict[str, float]] = {}
    others: dict[str, float] = {}
    for name, times in totals.items():
        kind = name if name in ours else PRODUCTS if is_product(name) else None
        per_call = 1e-3 * sum(times) / PROFILED_CALLS
        if kind is None:
            others[name] = per_call
            continue
        row = kernels.setdefault(kind, {"ms": 0.0, "launches": 0.0})
        row["ms"] += per_call
        row["launches"] += len(times) / PROFILED_CALLS
    longest = sorted(others.items(), key=lambda item: -item[1])[:SHOWN_KERNELS]
    return {"kernels": kernels, "others_ms": sum(others.values()), "others": dict(longest)}


def is_product(name: str) -> bool:
    return any(part in name for part in PRODUCT_NAMES)


def measure_shape(
    shape: model.Shape, x: Inputs, operations: Sequence[Operation], rounds: int, copy_bytes: int, deadline: float
) -> dict[str, Any]:
    """Ceilings, then every operation whose first call begins before the deadline (of time.monotonic)."""
    device = x.targets.device
    calls = ceilings(x, copy_bytes)
    for call in calls.values():
        call()
    rows: dict[str, dict[str, Any]] = {}
    for operation in operations:
        if time.monotonic() > deadline:
            rows[operation.name] = {"operation": operation.name, "skipped": "time budget spent"}
            continue
        row = rows[operation.name] = {"operation": operation.name}
        try:
            row |= {"first_call_s": first_call(operation, x), **profile(operation, x)}
            calls[operation.name] = partial(operation.call, x)
        # One operation that does not compile or fit must not cost the others.
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    times = interleaved(calls, rounds, device)
    for name, row in rows.items():
        row |= times.get(name, {})
    flops = model.product(shape) / (1e-3 * times[GEMM]["ms"])
    return {
        "shape": shape.name, "N": shape.N, "V": shape.V, "D": shape.D,
        "gemm": times[GEMM] | {"flop_per_s": flops},
        "copy": times[COPY] | {"bytes_per_s": 2 * copy_bytes / (1e-3 * times[COPY]["ms"])},
        "operations": list(rows.values()),
    }  # fmt: skip
