"""Every Triton kernel beside its floor on a GPU: time, registers, waves, tiles, and the ceilings of the same run.

    python bench/kernel_profile.py [--json OUT] [--rounds R] [--budget-s S] [--ncu] [--report] [--tiny]

For each shape of bench/roofline.py first the ceilings: cuBLAS' product of the head's shape in bfloat16, and a copy of
2 GiB (read and written bytes), random data, CUDA events, medians of interleaved rounds. Then every operation: a whole
call in the same rounds, and by torch.profiler what the device spends in each kernel, beside the floors that
bench/roofline_model.py predicts, with the peaks of the data sheet and with this run's ceilings. Of each kernel:
launches, tile, registers, spilled bytes, shared memory, whether it uses wgmma and TMA, programs and waves. Tiles are
chosen anew, so that the times of all candidates are known; `tile_cache` in the JSON is the content of a tile cache (see
tcopd_kernels/_tile_cache.py): saved as tiles-1.json in the folder TCOPD_KERNELS_CACHE it spares the choice on the same
GPU model, Triton version and sizes.

--ncu also asks Nsight Compute for the three hot kernels. --report writes the block of docs/performance.md from the JSON
and measures nothing. --tiny runs the same code at small sizes anywhere, on a CPU with the torch backend, or with
Triton's interpreter where TRITON_INTERPRET=1: its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernel_profile_report as report
import roofline_model as model
import torch
from kernel_profile_about import about
from kernel_profile_launches import TileChoice, record_tile_choices
from kernel_profile_measure import COPY_BYTES, measure_shape
from kernel_profile_ncu import run_ncu
from kernel_profile_operations import OPERATIONS, make_inputs
from kernel_profile_rows import operations
from plan_report import replace_block
from tcopd_kernels import _tile_cache

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "kernel_profile_gpu.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = "profile"
TINY = (model.Shape("tiny", 20, 40, 24), model.Shape("tiny, few tokens", 8, 40, 24))
TINY_COPY_BYTES = 1 << 20
NCU_S = 90
NCU_OPERATIONS = OPERATIONS[:3]


def measure(shapes: Sequence[model.Shape], args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    device, dtype, backend = where()
    run = about("bench/kernel_profile.py", sys.argv[1:])
    run |= {"tiny": args.tiny, "backend": backend, "dtype": str(dtype).removeprefix("torch."), "rounds": args.rounds}
    if device.type == "cuda":
        run["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    run |= {"shapes": [], "tiles": []}
    deadline = began + args.budget_s
    for shape in shapes:
        if time.monotonic() > deadline and run["shapes"]:
            print(f"{shape.name}: skipped, time budget spent", flush=True)
            continue
        with record_tile_choices() as choices:
            x = make_inputs(shape, dtype, device, backend)
            copy_bytes = TINY_COPY_BYTES if args.tiny else COPY_BYTES
            run["shapes"].append(measure_shape(shape, x, OPERATIONS, args.rounds, copy_bytes, deadline))
        run["tiles"] += map(choice_row, choices)
        del x
        write(run, began, args.json)
        print_shape(run, shape.name)
    if args.ncu:
        left_s = min(NCU_S, deadline - time.monotonic())
        run["ncu"] = run_ncu(shapes[0].name, left_s, args.tiny) if left_s > 1 else {"trouble": "time budget spent"}
        print(f"ncu: {run['ncu'].get('trouble') or len(run['ncu']['kernels'])}")
    write(run, began, args.json)
    return run


def where() -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and backend: bfloat16 kernels on a GPU, float16 in the interpreter, else torch in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16, "triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu"), torch.float16, "triton"
    return torch.device("cpu"), torch.float32, "torch"


def choice_row(choice: TileChoice) -> dict[str, Any]:
    _, _, kernel, dtype, bucket, vocab, dim, entropy = choice.key
    times_ms = {tile_name(tile): ms for tile, ms in choice.times_ms.items()}
    return {
        "kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "N_bucket": bucket, "V": vocab, "D": dim,
        "entropy": entropy, "chosen": min(times_ms, key=times_ms.__getitem__), "times_ms": times_ms,
    }  # fmt: skip


def tile_name(tile: Any) -> str:
    return model.label(tile) + " flat" * tile.flatten + " specialised" * tile.warp_specialize


def write(run: dict[str, Any], began: float, out: Path | None) -> None:
    run |= {"seconds": time.monotonic() - began, "tile_cache": _tile_cache.load()}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def print_shape(run: dict[str, Any], name: str) -> None:
    shape = run["shapes"][-1]
    print(
        f"{name}: product {shape['gemm']['ms']:.3f} ms, {shape['gemm']['flop_per_s'] / 1e12:.1f} TFLOP/s; "
        f"copy {shape['copy']['bytes_per_s'] / 1e9:.0f} GB/s"
    )
    for row in operations(run):
        if row["shape"] == name:
            ratio = f"{row['ratio']:.2f} of the ceiling" if row["ratio"] else ""
            print(f"  {row['operation']:56} {row['ms']:9.3f} ms {row['in_gemms']:6.2f} G  {ratio}", flush=True)


def ncu_target(name: str, shapes: Sequence[model.Shape]) -> int:
    """What ncu watches: each operation once before, and once between cudaProfilerStart and Stop."""
    device, dtype, backend = where()
    (shape,) = [shape for shape in shapes if shape.name == name]
    x = make_inputs(shape, dtype, device, backend)
    for operation in NCU_OPERATIONS:
        operation.call(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for operation in NCU_OPERATIONS:
        operation.call(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def write_report(result: Path, document: Path) -> None:
    """Raises ValueError where the document has no place for the block."""
    run = json.loads(result.read_text(encoding="utf-8"))
    text = report.block(run, f"../bench/results/{result.name}")
    document.write_text(replace_block(document.read_text(encoding="utf-8"), BLOCK, text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--budget-s", type=float, default=math.inf, help="begin nothing later than this")
    parser.add_argument("--ncu", action="store_true", help="also run Nsight Compute on the hot kernels")
    parser.add_argument("--report", action="store_true", help=f"only write the block of {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--ncu-target", metavar="SHAPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = TINY if args.tiny else model.SHAPES
    if args.report:
        if not (args.json or RESULT).is_file():
            parser.error(f"--report: {args.json or RESULT.relative_to(ROOT)} is not there; measure with --json first")
        try:
            write_report(args.json or RESULT, DOCUMENT)
        except ValueError as error:
            parser.error(f"--report: {DOCUMENT.relative_to(ROOT)} {error}")
        return 0
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("there is no CUDA device to measure on; --tiny runs the logic alone")
    if args.ncu_target:
        return ncu_target(args.ncu_target, shapes)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TCOPD_KERNELS_CACHE"] = cache  # ncu's process takes the tiles that this one chose
        run = measure(shapes, args)
    return int(any(op.get("trouble") or op.get("failed") for shape in run["shapes"] for op in shape["operations"]))


if __name__ == "__main__":
    sys.exit(main())
