"""The measured block of docs/performance.md, from the JSON of bench/kernel_profile.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import kernel_profile_rows as rows
from kernel_profile_operations import PRODUCTS

MISSING = "–"


def block(run: Mapping[str, Any], link: str) -> str:
    """link: to the JSON, as seen from the document."""
    parts = [provenance(run, link), ceilings_table(run)]
    for shape in run["shapes"]:
        parts.append(f"**{shape['shape']}**: N = {shape['N']}, V = {shape['V']}, D = {shape['D']}, {run['dtype']}.")
        parts += [operations_table(run, shape["shape"]), kernels_table(run, shape["shape"])]
        missing = [op for op in shape["operations"] if "ms" not in op]
        if missing:
            reasons = [f"{op['operation']} ({op.get('failed') or op['skipped']})" for op in missing]
            parts.append(f"Not measured: {'; '.join(reasons)}.")
    if run["tiles"]:
        parts += ["Tiles by time, in ms; the first was chosen:", tiles_table(run["tiles"])]
    if run.get("ncu", {}).get("kernels"):
        parts += ["Nsight Compute, means over launches, base units:", ncu_table(run["ncu"]["kernels"])]
    elif run.get("ncu"):
        parts.append(f"Nsight Compute gave no numbers: {run['ncu']['trouble']}.")
    return "\n\n".join(parts)


def provenance(run: Mapping[str, Any], link: str) -> str:
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton") if name in run["versions"])
    sha = f"commit `{run['git_sha'][:9]}`; " if run["git_sha"] else ""
    return (
        f"Measured on {run['device']}, driver {run['driver'] or 'unknown'}, CUDA {run['cuda'] or 'none'}; {versions}; "
        f"{sha}`{run['command']}`; {run['started'][:10]}; every number: [{link.rpartition('/')[2]}]({link}). "
        "*Floor*: by the data sheet; *ceiling*: the same with the best product and copy of this run; *ratio*: measured "
        "over ceiling. *G* is the product of the head's shape in this run."
    )


def ceilings_table(run: Mapping[str, Any]) -> str:
    sheet = rows.data_sheet(run["device"])
    cells = []
    for shape in run["shapes"]:
        product, copy = shape["gemm"], shape["copy"]["bytes_per_s"]
        of_flops = share(product["flop_per_s"], sheet and sheet.flops)
        of_bandwidth = share(copy, sheet and sheet.bandwidth)
        speeds = number(product["ms"]), number(product["flop_per_s"] / 1e12), of_flops, number(copy / 1e9), of_bandwidth
        cells.append([shape["shape"], *speeds])
    head = ["", "G, ms", "TFLOP/s", "of the data sheet", "copy, GB/s", "of the data sheet"]
    return table(head, cells)


def operations_table(run: Mapping[str, Any], shape: str) -> str:
    cells = [
        [
            row["operation"], number(row["floor_ms"]), number(row["ceiling_ms"]), number(row["ms"]),
            number(row["ratio"]), f"{row['in_gemms']:.2f}", number(row["others_ms"]),
        ]
        for row in rows.operations(run) if row["shape"] == shape
    ]  # fmt: skip
    head = ["operation", "floor, ms", "ceiling, ms", "measured, ms", "ratio", "in G", "in torch's own kernels, ms"]
    return table(head, cells)


def kernels_table(run: Mapping[str, Any], shape: str) -> str:
    cells = []
    for row in rows.compare(run):
        if row["shape"] != shape or "ratio" not in row:
            continue
        regs = row.get("registers")
        spilled = f" + {row['spill_bytes']} B spilled" if row.get("spill_bytes") else ""
        loads = " + ".join(filter(None, (row.get("wgmma") and "wgmma", "TMA" if row.get("tma") else "")))
        cells.append(
            [
                "products (cuBLAS)" if row["kernel"] == PRODUCTS else row["predicted"], row.get("tile") or MISSING,
                f"{row['launches']:.0f}", number(row["floor_ms"]), number(row["ceiling_ms"]), number(row["ms"]),
                number(row["ratio"]), MISSING if regs is None else f"{regs}{spilled}",
                MISSING if regs is None else f"{row['shared_bytes'] / 1024:.0f}", loads or MISSING,
                number(row.get("waves")), f"{row['full']:.0%}" if "full" in row else MISSING,
            ]
        )  # fmt: skip
    head = [
        "kernel", "tile", "launches", "floor, ms", "ceiling, ms", "measured, ms", "ratio", "registers", "shared, KiB",
        "instructions", "waves", "full",
    ]  # fmt: skip
    return table(head, cells)


def tiles_table(tiles: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            tile["kernel"], tile["dtype"], str(tile["N_bucket"]), str(tile["V"]), str(tile["D"]),
            ", ".join(f"{name} {number(ms)}" for name, ms in sorted(tile["times_ms"].items(), key=lambda t: t[1])),
        ]
        for tile in tiles
    ]  # fmt: skip
    return table(["kernel", "dtype", "N up to", "V", "D", "tiles"], cells)


def ncu_table(kernels: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in kernels for name in row if name not in ("kernel", "block", "grid")))
    cells = [[row["kernel"], row["grid"], *(number(row.get(name)) for name in names)] for row in kernels]
    return table(["kernel", "grid", *names], cells)


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def share(value: float, of: float | None) -> str:
    return f"{value / of:.0%}" if of else MISSING


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
