"""Measured beside predicted: pure arithmetic on what bench/kernel_profile.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import roofline_model as model
from kernel_profile_launches import function_name
from kernel_profile_operations import OPERATIONS


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of a dense bfloat16 product and bytes/s of memory."""

    flops: float
    bandwidth: float

    def floor_ms(self, flops: float, bytes_: float) -> float:
        return 1e3 * max(flops / self.flops, bytes_ / self.bandwidth)


def data_sheet(device: str) -> model.Gpu | None:
    """The GPU of roofline_model that a device's name tells, "NVIDIA H100 80GB HBM3"; None for another one."""
    return next((gpu for gpu in model.GPUS if gpu.name.split()[0] in device), None)


def measured_peaks(shapes: Sequence[Mapping[str, Any]]) -> Peaks:
    """The best product and the best copy of a run: with few tokens a product is bound by memory, and no ceiling."""
    return Peaks(
        max(shape["gemm"]["flop_per_s"] for shape in shapes), max(shape["copy"]["bytes_per_s"] for shape in shapes)
    )


def compare(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, operation and kernel of ours (or products): floors, measured, ratio, and its grid.

    floor_ms: by the data sheet, None for an unknown GPU.   ceiling_ms: the floor by the run's own ceilings.
    ratio: measured over ceiling_ms.
    """
    sheet, ceilings = data_sheet(run["device"]), measured_peaks(run["shapes"])
    # Another GPU is predicted with the launches and bytes of the H100, whose tiles it most likely shares.
    gpu = sheet or model.GPUS[0]
    rows = []
    for shape in run["shapes"]:
        size = model.Shape(shape["shape"], shape["N"], shape["V"], shape["D"])
        predicted = {kernel.name: kernel for kernel in model.kernels(size, gpu)}
        for found in shape["operations"]:
            if "ms" not in found:
                continue
            (operation,) = [op for op in OPERATIONS if op.name == found["operation"]]
            for name, measured in found["kernels"].items():
                row = {"shape": shape["shape"], "operation": operation.name, "kernel": name, **measured}
                row |= grid_of(found["launched"], name, run)
                if name in operation.predicted:
                    row |= beside(predicted[operation.predicted[name]], measured["ms"], sheet, ceilings)
                rows.append(row)
    return rows


def beside(kernel: model.Kernel, ms: float, sheet: model.Gpu | None, ceilings: Peaks) -> dict[str, Any]:
    ceiling_ms = ceilings.floor_ms(kernel.flops, kernel.bytes)
    floor_ms = Peaks(sheet.flops, sheet.bandwidth).floor_ms(kernel.flops, kernel.bytes) if sheet else None
    return {
        "predicted": kernel.name, "predicted_launches": kernel.launches, "floor_ms": floor_ms,
        "ceiling_ms": ceiling_ms, "ratio": ms / ceiling_ms, "tflop_per_s": kernel.flops / ms / 1e9 if ms else None,
        "gbyte_per_s": kernel.bytes / ms / 1e6 if ms else None,
    }  # fmt: skip


def grid_of(launched: Sequence[Mapping[str, Any]], name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """Of the launches of a kernel those with most programs: tile, registers, waves. Nothing for products."""
    own = [row for row in launched if function_name(row["kernel"]) == name]
    if not own:
        return {}
    row = dict(max(own, key=lambda row: row["programs"]))
    del row["kernel"], row["launches"]
    processors = run.get("multiprocessors")
    if processors and "registers" in row:
        waves = row["programs"] / processors
        gpu = data_sheet(run["device"]) or model.GPUS[0]
        held = model.programs_per_processor(gpu, row["registers"], row["warps"], row["shared_bytes"])
        row |= {"programs_per_processor": held, "waves": waves, "full": waves / math.ceil(waves)}
    return row


def operations(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and operation: the sums of its kernels' floors beside the time of a whole call."""
    kernels, found = compare(run), []
    for shape in run["shapes"]:
        for operation in shape["operations"]:
            if "ms" not in operation:
                continue
            own = [
                row for row in kernels
                if (row["shape"], row["operation"]) == (shape["shape"], operation["operation"]) and "ceiling_ms" in row
            ]  # fmt: skip
            floors = [row["floor_ms"] for row in own]
            ceiling_ms = sum(row["ceiling_ms"] for row in own)
            found.append(
                {
                    "shape": shape["shape"], "operation": operation["operation"], "ms": operation["ms"],
                    "in_gemms": operation["ms"] / shape["gemm"]["ms"],
                    "floor_ms": sum(floors) if floors and None not in floors else None,
                    "ceiling_ms": ceiling_ms or None,
                    "ratio": operation["ms"] / ceiling_ms if ceiling_ms else None,
                    "kernels_ms": sum(row["ms"] for row in operation["kernels"].values()),
                    "others_ms": operation["others_ms"],
                }
            )  # fmt: skip
    return found
