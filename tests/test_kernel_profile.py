"""bench/kernel_profile.py: its parsers and arithmetic on made-up numbers, and the whole of it at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "bench"))

import kernel_profile  # noqa: E402
import kernel_profile_launches as launches  # noqa: E402
import kernel_profile_measure as measure  # noqa: E402
import kernel_profile_report as report  # noqa: E402
import kernel_profile_rows as rows  # noqa: E402
import roofline_model as model  # noqa: E402
from kernel_profile_about import without_folder  # noqa: E402
from kernel_profile_operations import OPERATIONS, PRODUCTS  # noqa: E402
from tcopd_kernels import _triton_tiles  # noqa: E402
from tcopd_kernels._triton_tiles import Tile  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3"
QWEN = model.SHAPES[0]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny run is for machines without a GPU")


def event(name, us, device=DeviceType.CUDA, annotation=False):
    return SimpleNamespace(
        name=name, device_type=device, is_user_annotation=annotation, self_cpu_time_total=us,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )  # fmt: skip


def test_device_time_by_kernel_per_call():
    """Three calls: two launches of ours each, a product, and what else there is; nothing of the host is counted."""
    calls = [event("dlogits_kernel", 500.0)] * 6 + [event("nvjet_sm90_tst_128x256", 900.0)] * 3
    calls += [event("Memset (Device)", 3.0), event("at::native::vectorized_elementwise_kernel", 30.0)] * 3
    calls += [event("aten::mm", 7.0, DeviceType.CPU), event("a range", 1e6, annotation=True)]
    found = measure.kernel_times(calls, DeviceType.CUDA, {"dlogits_kernel", "forward_kernel"})
    assert found["kernels"] == {
        "dlogits_kernel": {"ms": pytest.approx(1.0), "launches": 2.0},
        PRODUCTS: {"ms": pytest.approx(0.9), "launches": 1.0},
    }
    assert found["others_ms"] == pytest.approx(0.033)
    assert list(found["others"]) == ["at::native::vectorized_elementwise_kernel", "Memset (Device)"]


@pytest.mark.parametrize(
    "name",
    ["nvjet_sm90_tss_64x8_64x16_4x1_v_bz_TNT", "sm90_xmma_gemm_bf16_bf16f32", "cutlass_80_tensorop", "aten::addmm_"],
)
def test_matrix_products_are_told_by_their_names(name):
    assert measure.is_product(name) and not measure.is_product("keep_kernel")


def test_what_a_compiled_kernel_says_of_itself():
    ptx = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 cp.async.bulk.tensor.2d"
    compiled = SimpleNamespace(
        asm={"ptx": ptx}, n_regs=168, n_spills=2, metadata=SimpleNamespace(shared=131072, num_warps=8)
    )
    assert launches.compiled_facts(compiled) == {
        "registers": 168, "spill_bytes": 8, "shared_bytes": 131072, "warps": 8, "wgmma": "m64n128k16",
        "mma_sync": False, "tma": True,
    }  # fmt: skip
    blocks = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    assert launches.tile_label(blocks | {"num_warps": 8, "num_stages": 3, "FLATTEN": True}) == "128x256x64/w8s3 flat"
    assert launches.tile_label(blocks) == "128x256x64" and launches.tile_label({"BLOCK": 128}) is None


def test_the_times_of_all_candidate_tiles(monkeypatch, tmp_path):
    """The launch is a partial already, as in the forward; tiles that are known are not timed, and not recorded."""
    monkeypatch.setenv("TCOPD_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton_tiles, "_chosen", {})
    tiles = [Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4, flatten=True)]
    times_ms = dict(zip(tiles, (3.0, 1.0, 2.0)))
    monkeypatch.setattr(_triton_tiles, "measure_ms", lambda run: times_ms[run.args[-1]])
    key = (H100, "3.6.0", "forward", torch.bfloat16, 8192, 151936, 2560, False)
    with launches.record_tile_choices() as choices:
        for _ in range(2):
            _triton_tiles.choose_tile(key, tiles, partial(lambda head, tile: None, "head"))
    (choice,) = choices
    assert choice.times_ms == times_ms
    row = kernel_profile.choice_row(choice)
    assert (row["kernel"], row["dtype"], row["N_bucket"], row["V"]) == ("forward", "bfloat16", 8192, 151936)
    assert row["chosen"] == "128x256x64/w8s3" and row["times_ms"]["128x128x64/w8s4 flat"] == 2.0


def made_up_run():
    """One shape on an H100: a product at half the data sheet, a copy at 80 %, and one operation."""
    gemm_s = model.product(QWEN) / (0.5 * 989.4e12)
    operation = {
        "operation": "logprob, forward", "ms": 15.0, "others_ms": 0.25, "first_call_s": 3.0,
        "kernels": {
            "forward_kernel": {"ms": 14.0, "launches": 1.0}, "combine_kernel": {"ms": 0.01, "launches": 1.0},
            "finish_kernel": {"ms": 0.01, "launches": 1.0},
        },
        "launched": [
            {
                "kernel": "_triton_forward.forward_kernel", "tile": "128x128x64/w8s4", "launches": 1, "programs": 768,
                "registers": 153, "spill_bytes": 0, "shared_bytes": 131072, "warps": 8, "wgmma": "m64n128k16",
                "mma_sync": False, "tma": True,
            }
        ],
    }  # fmt: skip
    shape = {
        "shape": QWEN.name, "N": QWEN.N, "V": QWEN.V, "D": QWEN.D,
        "gemm": {"ms": 1e3 * gemm_s, "flop_per_s": 0.5 * 989.4e12},
        "copy": {"ms": 1.6, "bytes_per_s": 0.8 * 3.35e12},
        "operations": [operation, {"operation": "3 models in one launch", "skipped": "time budget spent"}],
    }  # fmt: skip
    tile = {
        "kernel": "forward", "dtype": "bfloat16", "N_bucket": 8192, "V": QWEN.V, "D": QWEN.D, "entropy": False,
        "chosen": "128x256x64/w8s3", "times_ms": {"128x128x64/w8s4": 14.5, "128x256x64/w8s3": 14.0},
    }  # fmt: skip
    return {
        "device": H100, "driver": "580.65", "cuda": "13.0", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "git_sha": "0123456789abcdef", "command": "python bench/kernel_profile.py", "started": "2026-01-01T00:00:00Z",
        "dtype": "bfloat16", "multiprocessors": 132, "shapes": [shape], "tiles": [tile],
    }  # fmt: skip


def test_measured_beside_predicted():
    forward, combine, finish = rows.compare(made_up_run())
    assert forward["predicted"] == "forward, plain" and forward["floor_ms"] == pytest.approx(6.44, abs=0.01)
    # The product of this run took twice the data sheet's time, so the kernel's floor is twice as high.
    assert forward["ceiling_ms"] == pytest.approx(2 * forward["floor_ms"])
    assert forward["ratio"] == pytest.approx(14.0 / forward["ceiling_ms"])
    assert (forward["programs_per_processor"], forward["waves"]) == (1, 768 / 132)
    assert forward["full"] == pytest.approx(768 / 132 / 6)
    assert combine["ceiling_ms"] == pytest.approx(combine["floor_ms"] / 0.8)  # bound by memory
    assert "ratio" not in finish and finish["ms"] == 0.01
    (row,) = rows.operations(made_up_run())
    assert row["in_gemms"] == pytest.approx(15.0 / (2 * 6.44), rel=1e-3)
    assert row["kernels_ms"] == pytest.approx(14.02) and row["floor_ms"] == pytest.approx(6.4415, abs=1e-3)


def test_another_gpu_has_no_data_sheet():
    assert rows.data_sheet(H100) is model.GPUS[0] and rows.data_sheet("NVIDIA A100-SXM4-80GB") is model.GPUS[1]
    assert rows.data_sheet("NVIDIA L40S") is None
    forward = rows.compare(made_up_run() | {"device": "NVIDIA L40S"})[0]
    assert forward["floor_ms"] is None and forward["ratio"] > 1
    assert rows.operations(made_up_run() | {"device": "NVIDIA L40S"})[0]["floor_ms"] is None


def test_the_arithmetic_ceiling_is_the_best_product_of_the_run():
    run = made_up_run()
    few = {"gemm": {"flop_per_s": 1e12}, "copy": {"bytes_per_s": 3e12}}
    peaks = rows.measured_peaks([*run["shapes"], few])
    assert (peaks.flops, peaks.bandwidth) == (0.5 * 989.4e12, 3e12)


@pytest.mark.parametrize("shape", model.SHAPES, ids=lambda shape: shape.name)
def test_every_prediction_exists_and_every_kernel_is_measured(shape):
    predicted = {kernel.name for kernel in model.kernels(shape, model.GPUS[0])}
    named = {name for operation in OPERATIONS for name in operation.predicted.values()}
    assert named == predicted
    assert set(model.OPERATIONS) <= {operation.name for operation in OPERATIONS}


def test_the_block_of_the_document(tmp_path):
    result, document = tmp_path / "run.json", tmp_path / "performance.md"
    result.write_text(json.dumps(made_up_run()))
    document.write_text("before\n<!-- profile:begin -->\nold\n<!-- profile:end -->\nafter\n")
    kernel_profile.write_report(result, document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "NVIDIA H100 80GB HBM3, driver 580.65, CUDA 13.0; torch 2.11.0, triton 3.6.0; commit `012345678`" in text
    assert "| Qwen3-4B | 12.9 | 495 | 50% | 2680 | 80% |" in text
    assert "| logprob, forward | 6.44 | 12.9 | 15 | 1.16 | 1.16 | 0.25 |" in text
    assert "| forward, plain | 128x128x64/w8s4 | 1 | 6.44 | 12.9 | 14 | 1.09 | 153 | 128 | wgmma + TMA |" in text
    assert "128x256x64/w8s3 14, 128x128x64/w8s4 14.5" in text
    assert "Not measured: 3 models in one launch (time budget spent)." in text
    document.write_text("no place")
    with pytest.raises(ValueError, match="profile:begin"):
        kernel_profile.write_report(result, document)


def run_tiny(out, interpret, *words):
    command = [sys.executable, str(ROOT / "bench" / "kernel_profile.py"), "--tiny", "--rounds", "1", "--json", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_the_whole_run_in_the_interpreter(tmp_path):
    run = run_tiny(tmp_path / "run.json", "1")
    assert run["command"] == "python bench/kernel_profile.py --tiny --rounds 1 --json run.json"
    assert run["backend"] == "triton" and run["dtype"] == "float16" and run["versions"]["triton"]
    for shape in run["shapes"]:
        assert shape["gemm"]["ms"] > 0 and shape["copy"]["bytes_per_s"] > 0
        for found, operation in zip(shape["operations"], OPERATIONS, strict=True):
            assert found["operation"] == operation.name and "trouble" not in found and found["ms"] > 0
            assert set(operation.predicted) <= set(found["kernels"])
            launched = {launches.function_name(row["kernel"]): row for row in found["launched"]}
            assert set(launched) == set(found["kernels"]) - {PRODUCTS}
    compared = [row for row in rows.compare(run) if "ratio" in row]
    assert len(compared) == 2 * sum(len(operation.predicted) for operation in OPERATIONS)
    assert any(row["tile"] == "16x32x32" for row in compared if "tile" in row)
    block = report.block(run, "../bench/results/run.json")
    assert all(operation.name in block for operation in OPERATIONS)


def test_the_whole_run_with_the_torch_backend_and_no_time(tmp_path):
    run = run_tiny(tmp_path / "run.json", "0", "--budget-s", "0", "--ncu")
    assert [shape["shape"] for shape in run["shapes"]] == ["tiny"] and run["backend"] == "torch"
    assert all(operation["skipped"] == "time budget spent" for operation in run["shapes"][0]["operations"])
    assert run["ncu"] == {"trouble": "time budget spent"} and "time budget spent" in report.block(run, "run.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no CUDA device to measure on; --tiny runs the logic alone"),
        (["--tiny", "--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["--report", "--json", "nowhere.json"], "--report: nowhere.json is not there"),
    ],
)
def test_bad_input_gets_one_message(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["bench/kernel_profile.py", *words])
    with pytest.raises(SystemExit):
        kernel_profile.main()
    assert message in capsys.readouterr().err


def test_no_absolute_path_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert without_folder(str(tmp_path / "runs" / "x.json")) == "runs/x.json"
    assert without_folder("/elsewhere/x.json") == "x.json" and without_folder("--tiny") == "--tiny"


class FakeEvent:
    """CUDA events on a clock that one call advances."""

    now_ms = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at_ms = FakeEvent.now_ms

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What there is of torch.cuda without a device, for the branches that only a GPU takes."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernel_profile, "where", lambda: (cuda, torch.bfloat16, "triton"))
    return SimpleNamespace(targets=SimpleNamespace(is_cuda=True, device=cuda))


def test_times_on_a_gpu_are_those_of_its_events(as_on_a_gpu):
    def call(ms):
        FakeEvent.now_ms += ms

    found = measure.interleaved({"a": lambda: call(3.0), "b": lambda: call(5.0)}, 3, torch.device("cuda"))
    assert (found["a"]["ms"], found["b"]["rounds_ms"]) == (3.0, [5.0] * 3)


def test_an_operation_that_fails_does_not_cost_the_others(monkeypatch):
    def call(x):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    shape = kernel_profile.TINY[1]
    x = kernel_profile.make_inputs(shape, torch.float32, torch.device("cpu"), "torch")
    operations = [replace(OPERATIONS[0], name="fails", call=call), OPERATIONS[0]]
    found = measure.measure_shape(shape, x, operations, 1, 1 << 10, float("inf"))["operations"]
    assert found[0] == {"operation": "fails", "failed": "OutOfMemoryError: CUDA out of memory"}
    assert found[1]["ms"] > 0


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_sees_no_kernel_is_told(as_on_a_gpu):
    operation = SimpleNamespace(call=lambda x: None)
    assert measure.first_call(operation, as_on_a_gpu) >= 0
    assert measure.profile(operation, as_on_a_gpu)["trouble"] == "torch.profiler saw no kernel"


def test_a_run_on_a_gpu_knows_its_multiprocessors_and_ncu_counts_between_the_marks(as_on_a_gpu, monkeypatch):
    marks = []
    shape = made_up_run()["shapes"][0]
    monkeypatch.setattr(kernel_profile, "make_inputs", lambda *_: as_on_a_gpu)
    monkeypatch.setattr(kernel_profile, "measure_shape", lambda *_: shape)
    args = SimpleNamespace(tiny=False, rounds=1, budget_s=9.0, json=None, ncu=False)
    run = kernel_profile.measure([QWEN], args)
    assert run["multiprocessors"] == 132 and run["dtype"] == "bfloat16" and run["shapes"] == [shape]
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: marks.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: marks.append("stop"))
    call = SimpleNamespace(call=lambda x: marks.append("call"))
    monkeypatch.setattr(kernel_profile, "NCU_OPERATIONS", [call])
    assert kernel_profile.ncu_target(QWEN.name, [QWEN]) == 0
    assert marks == ["call", "start", "call", "stop"]


def test_compiled_kernels_are_described(monkeypatch):
    """As on a GPU, where a launch returns the compiled kernel: launches of one kernel and grid are one row."""
    metadata = SimpleNamespace(shared=16, num_warps=4)
    compiled = SimpleNamespace(asm={"ptx": "mma.sync"}, n_regs=32, n_spills=0, metadata=metadata)
    options = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}

    class Kernel:
        fn = measure.interleaved

        def run(self, *args, grid, warmup, **options):
            return compiled

    monkeypatch.setattr(launches, "forward_kernel", Kernel())
    monkeypatch.setattr(_triton_tiles, "INTERPRETED", False)

    with launches.record_launches() as recorded:
        for grid in [(4, 2)] * 6 + [(1,)] * 3:
            Kernel().run(grid=grid, warmup=False, **options)
    found = measure.launch_rows(recorded)
    assert [(row["programs"], row["launches"]) for row in found] == [(8, 2), (1, 1)]
    assert found[0]["kernel"] == "kernel_profile_measure.interleaved" and found[0]["tile"] == "64x64x32/w8s2"
    assert (found[0]["registers"], found[0]["mma_sync"], found[0]["wgmma"]) == (32, True, None)
