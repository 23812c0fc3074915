"""Time, work done and error of every provider in one case, on the same inputs."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from tcopd_kernels import reference
from torch.utils.checkpoint import checkpoint

from kernel_suite import theory
from kernel_suite.cases import Case, Results
from kernel_suite.inputs import Inputs, mixture
from kernel_suite.providers import Provider, in_turn, on_logprob, summary

GEMM = "gemm"
EXACT_CHUNK = 256
# Gradients of larger heads are compared in the targets' rows and in every 8th.
COMPARED_ELEMENTS = 2**26
# Not all of their GEMMs are torch's.
NOT_COUNTED = ("cce", "cce_exact", "verl_triton", "quack", "ours_triton")
# Their first call compiles, which runs and times GEMMs of its own.
COMPILED = ("compile", "cce_torch_compile", "liger")


class GemmFlops:
    """Adds up 2·n·m·k over the matrix products that torch executes inside the context, wherever they are called."""

    # Place of the first of the two factors among the arguments.
    FACTORS: ClassVar = {
        "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
    }  # fmt: skip

    def __init__(self) -> None:
        self.flop = 0
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs every start and stop
        self._profile = torch.autograd.profiler.profile(use_kineto=False, record_shapes=True)

    def __enter__(self) -> GemmFlops:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        for event in self._profile.function_events:
            first = self.FACTORS.get(event.name)
            if first is not None:
                left, right = event.input_shapes[first : first + 2]
                self.flop += 2 * math.prod(left) * right[-1]


def exact_provider() -> Provider:
    """The plain definitions in row chunks whose logits are recomputed in the backward; for float64 inputs."""

    def in_chunks(function: Callable[..., torch.Tensor], rows: tuple[torch.Tensor, ...], *whole: Any) -> torch.Tensor:
        parts = zip(*(tensor.split(EXACT_CHUNK) for tensor in rows))
        return torch.cat([checkpoint(function, *part, *whole, use_reentrant=False) for part in parts])

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return in_chunks(lambda h, t, w: reference.linear_logprob(h, w, t).logprob, (hidden, targets), weight)

    def mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -logprob(hidden, weight, targets).mean()

    def full_vocab(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        _, coefficients = mixture(K)
        heads = x.teacher_weights[: len(coefficients)]

        def divergence(h: torch.Tensor, *frozen: Any) -> torch.Tensor:
            log_p = torch.log_softmax(h @ weight.T, 1)
            logs = [torch.log_softmax(g @ w.T, 1) for g, w in zip(frozen, heads)]
            return (log_p.exp() * (log_p - sum(a * log for a, log in zip(coefficients, logs)))).sum(1)

        rows = hidden, *x.teacher_hiddens[: len(coefficients)]
        return (x.weights * in_chunks(divergence, rows)).sum()

    return Provider("exact", logprob, mean, on_logprob(logprob), in_turn(logprob), full_vocab)


def clock_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA events"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall"


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        call()
        return clock() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def errors_of(found: Results, exact: Results, targets: torch.Tensor) -> dict[str, float]:
    """Largest absolute error of logprob or loss; of gradients that relative to the largest element, and ‖Δ‖/‖·‖."""
    out: dict[str, float] = {}
    for name, value in exact.items():
        mine = found[name]
        if name == "grad_weight" and value.numel() > COMPARED_ELEMENTS:
            rows = torch.cat([targets, torch.arange(0, len(value), 8, device=targets.device)]).unique()
            mine, value = mine[rows], value[rows]
        error = mine.double() - value
        if name.startswith("grad_"):
            out[f"{name}_max_error"] = (error.abs().amax() / value.abs().amax()).item()
            out[f"{name}_relative_error"] = (error.norm() / value.norm()).item()
        else:
            out[f"{name}_max_error"] = error.abs().amax().item()
    return out


def first_call(provider: Provider, case: Case, x: Inputs, exact: Results, device: torch.device) -> dict[str, Any]:
    """Time of the first call (with compilation and tuning), errors, certificate and executed FLOP."""
    found: Results = {}
    counted = provider.name.removesuffix("_tol") not in NOT_COUNTED
    compiling_s = seconds_of(partial(case.run, provider, x), device) if provider.name in COMPILED else None
    with GemmFlops() if counted else nullcontext() as count:
        seconds = seconds_of(lambda: found.update(case.run(provider, x)), device)
    row: dict[str, Any] = {"first_call_s": compiling_s or seconds} | errors_of(found, exact, x.targets)
    # NaN stands for a certificate that no backward has filled.
    row |= {key: value.item() for key, value in provider.certificate.items() if not value.isnan()}
    one = 2 * x.hidden.numel() * len(x.weight)
    if count is not None:
        return row | {"executed_flop": count.flop, "executed_by": "counted"}
    gemms = theory.executed_gemms(provider.name.removesuffix("_tol"), case)
    if "kept_column_sum" in row:
        gemms = case.gemms - 2 + 3 * row["kept_column_sum"] / (len(x.targets) * len(x.weight))
    return row if gemms is None else row | {"executed_flop": gemms * one, "executed_by": "formula"}


def measure_case(
    case: Case, providers: dict[str, Provider], x: Inputs, rounds: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields of the report) of the bare GEMM and of each provider that offers this case.

    Every round calls all of them once, in rotating order. A provider that raises is reported and left out.
    """
    exact = case.run(exact_provider(), x.double(case.frozen))
    one = 2 * x.hidden.numel() * len(x.weight)
    out = x.hidden.new_empty(len(x.hidden), len(x.weight))
    calls: dict[str, Callable[[], Any]] = {GEMM: lambda: torch.mm(x.hidden, x.weight.T, out=out)}
    calls[GEMM]()
    rows: dict[str, dict[str, Any]] = {GEMM: {"executed_flop": one, "executed_by": "formula"}}
    for name, provider in providers.items():
        if isinstance(provider.offer(case), str):
            continue
        try:
            rows[name] = first_call(provider, case, x, exact, device)
            calls[name] = partial(case.run, provider, x)
        # Peers fail in their own ways (an unsupported shape or version, memory), and one must not stop the others.
        except Exception as error:
            rows[name] = {"error": summary(error)}
    del exact
    if device.type == "cuda":
        torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        first_at = turn % len(names)
        for name in names[first_at:] + names[:first_at]:
            times[name].append(seconds_of(calls[name], device))
    for name, row in rows.items():
        if name in times:
            row |= timing(times[name], times[GEMM])
            gemms = 1 if name == GEMM else case.gemms
            row["effective_tflop_per_s"] = gemms * one / row["median_s"] / 1e12
            if "executed_flop" in row:
                row["executed_tflop_per_s"] = row["executed_flop"] / row["median_s"] / 1e12
        yield name, row


def timing(seconds: list[float], gemm_seconds: list[float]) -> dict[str, Any]:
    ratio = statistics.median(s / unit for s, unit in zip(seconds, gemm_seconds))
    return {"median_s": statistics.median(seconds), "ratio": ratio, "rounds_s": seconds}
