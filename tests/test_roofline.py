"""The predictions of docs/performance.md: arithmetic that can be checked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "bench"))

import roofline  # noqa: E402
import roofline_model as model  # noqa: E402

H100, A100 = model.GPUS
SHAPE = model.SHAPES[0]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "held"),
    [
        # 255 rounds up to 256 registers: 8192 per warp, 65536 for eight warps.
        (255, 8, 0, 1),
        (128, 8, 0, 2),
        # 228 KiB hold two programs of 96 KiB and what the system takes, not three.
        (32, 4, 96 << 10, 2),
        (32, 4, 0, 16),
        (16, 1, 0, 32),
    ],
)
def test_what_a_multiprocessor_holds(registers, warps, shared, held):
    assert model.programs_per_processor(H100, registers, warps, shared) == held


def rows():
    return json.loads(roofline.COMPILED.read_text())["rows"]


def test_floors_by_hand():
    kernels = {kernel.name: kernel for kernel in model.kernels(SHAPE, H100)}
    forward = model.fit(kernels["forward, plain"], H100, rows())
    assert forward.bound == "arithmetic"
    assert forward.floor_ms == pytest.approx(1e3 * 2 * 8192 * 151936 * 2560 / 989.4e12)
    few = {kernel.name: kernel for kernel in model.kernels(model.SHAPES[1], H100)}["forward, plain"]
    fit = model.fit(few, H100, rows())
    assert fit.bound == "memory" and fit.floor_ms == pytest.approx(1e3 * 2 * 151936 * 2560 / 3.35e12, rel=0.01)
    assert 0.0 < fit.full <= 1.0 and fit.waves == few.programs / 132


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("shape", model.SHAPES, ids=lambda shape: shape.name)
def test_every_default_tile_was_compiled_without_spills(gpu, shape):
    compiled = rows()
    for kernel in model.kernels(shape, gpu):
        if kernel.variant:
            row = model.compiled(compiled, gpu, kernel.variant)
            assert row["spill_bytes"] == 0 and row["hot"]
            assert model.fit(kernel, gpu, compiled).programs_per_processor >= 1


def test_a_variant_that_was_not_compiled_is_named():
    with pytest.raises(KeyError, match="sm_90/nothing is not in"):
        model.compiled(rows(), H100, "nothing")


def test_the_recomputing_backward_is_four_products_and_the_single_pass_three():
    flops = {kernel.name: kernel.flops for kernel in model.kernels(SHAPE, H100)}
    totals = [sum(flops[name] for name in names) / model.product(SHAPE) for names in model.OPERATIONS.values()]
    assert totals == [1.0, 4.0, 3.0]


def test_the_document_says_what_the_json_says():
    assert roofline.main(check=True) == 0


def test_the_json_is_what_the_code_computes():
    stored, fresh = json.loads(roofline.RESULT.read_text()), roofline.compute(json.loads(roofline.COMPILED.read_text()))
    assert stored["rows"] == fresh["rows"] and stored["shapes"] == fresh["shapes"]
