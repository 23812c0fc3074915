"""The cases of kernel_bench.py under pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import functools
from pathlib import Path

import kernel_bench
import pytest
import torch
from kernel_suite.cases import BACKWARD_CASES, CASES
from kernel_suite.inputs import MAX_TEACHERS, PEAKED_ENTROPY, Inputs, Problem
from kernel_suite.measure import GEMM
from kernel_suite.memory import make_inputs
from kernel_suite.providers import OURS, make_providers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Few, because each is timed in every case: the plain way, and ours. kernel_bench.py has all.
PROVIDERS = make_providers(["eager", *OURS])[0]
SOURCES = ("random", *PEAKED_ENTROPY)


@functools.lru_cache(maxsize=1)
def inputs(source: str) -> Inputs:
    problem = Problem(source, *kernel_bench.SHAPES_NVD["small"][0])
    return make_inputs(problem, DEVICE, MAX_TEACHERS if source == "random" else 0, Path())


def measured() -> list:
    """(source, case, provider) that exist; the bare GEMM with every source."""
    rows = []
    for source in SOURCES:
        rows.append(pytest.param(source, None, GEMM, id=f"{source}-{GEMM}"))
        for case in CASES if source == "random" else BACKWARD_CASES:
            offered = [name for name, p in PROVIDERS.items() if not isinstance(p.offer(CASES[case]), str)]
            rows += [pytest.param(source, case, name, id=f"{source}-{case}-{name}") for name in offered]
    return rows


@pytest.mark.parametrize(("source", "case", "name"), measured())
def test_kernel(benchmark, source, case, name):
    benchmark.group = f"{source} {case or GEMM}"
    x = inputs(source)

    def call():
        if case is None:
            torch.mm(x.hidden, x.weight.T)
        else:
            CASES[case].run(PROVIDERS[name], x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
