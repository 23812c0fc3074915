"""The cases of kernel_bench.py under pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import functools

import kernel_bench
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = [kernel_bench.GEMM, *kernel_bench.available_providers(DEVICE)]


@functools.lru_cache(maxsize=1)
def inputs(shape: tuple[int, int, int]) -> kernel_bench.Inputs:
    return kernel_bench.make_inputs(shape, DEVICE, max(map(kernel_bench.teachers_of, kernel_bench.CASES)))


@functools.cache
def provider(name: str) -> kernel_bench.Provider:
    return kernel_bench.PROVIDERS[name]()


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", kernel_bench.available_cases(DEVICE))
@pytest.mark.parametrize("shape", kernel_bench.SHAPES_NVD["small"], ids=lambda shape: "x".join(map(str, shape)))
def test_kernel(benchmark, shape, case, name):
    benchmark.group = f"{case} {shape}"
    x = kernel_bench.inputs_of(case, inputs(shape))

    def call():
        if name == kernel_bench.GEMM:
            kernel_bench.bare_gemm(x)
        else:
            kernel_bench.CASES[case](provider(name), x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
