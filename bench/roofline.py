"""The floors of the Triton kernels on GPUs of data sheets: bench/results/roofline.json and docs/performance.md.

    python bench/roofline.py [--check]

Everything it writes is a prediction: arithmetic on shapes, data sheets and the offline compile. --check only compares
the document with the JSON: status 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import roofline_model as model
from plan_report import replace_block

from tcopd_fast.rundir import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "roofline.json"
COMPILED = ROOT / "bench" / "results" / "offline_compile.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = "roofline"


def compute(compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Every kernel at every shape on every GPU."""
    rows = [
        {"gpu": gpu.name, "shape": shape.name, **asdict(kernel), **asdict(model.fit(kernel, gpu, compiled["rows"]))}
        for gpu in model.GPUS
        for shape in model.SHAPES
        for kernel in model.kernels(shape, gpu)
    ]
    return {
        "prediction": "no GPU was measured",
        "device": "none: arithmetic on data sheets and on an offline compile",
        "triton": compiled["triton"],
        "compiled_at": compiled["commit"],
        "commit": environment()["git_sha"],
        "command": "python bench/roofline.py",
        "date": environment()["started"][:10],
        "gpus": [asdict(gpu) for gpu in model.GPUS],
        "shapes": [asdict(shape) for shape in model.SHAPES],
        "rows": rows,
    }


def tables(result: Mapping[str, Any]) -> str:
    """The document's block."""
    parts = [
        f"Predicted, not measured: arithmetic on data sheets and on the offline compile with triton {result['triton']} "
        f"(commit `{result['compiled_at'][:9]}`); `{result['command']}`; every number: "
        "[roofline.json](../bench/results/roofline.json)."
    ]
    for shape in result["shapes"]:
        parts.append(f"**{shape['name']}**: N = {shape['N']}, V = {shape['V']}, D = {shape['D']}, bfloat16.")
        parts.append(operations_table(result, shape["name"]))
        parts += [kernels_table(result, gpu["name"], shape["name"]) for gpu in result["gpus"]]
    return "\n\n".join(parts)


def operations_table(result: Mapping[str, Any], shape: str) -> str:
    """Sum of the floors of an operation's kernels, in ms and in G."""
    gpus = [gpu["name"] for gpu in result["gpus"]]
    lines = [
        "| operation | " + " | ".join(f"{gpu}, ms | in G" for gpu in gpus) + " |",
        "|---|" + "---:|" * (2 * len(gpus)),
    ]
    for operation, names in model.OPERATIONS.items():
        cells = []
        for gpu in result["gpus"]:
            own = [r for r in result["rows"] if (r["gpu"], r["shape"]) == (gpu["name"], shape) and r["name"] in names]
            total = sum(row["floor_ms"] for row in own)
            (size,) = [s for s in result["shapes"] if s["name"] == shape]
            g_ms = 1e3 * 2.0 * size["N"] * size["V"] * size["D"] / gpu["flops"]
            cells += [f"{total:.3g}", f"{total / g_ms:.2f}"]
        lines.append(f"| {operation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels_table(result: Mapping[str, Any], gpu: str, shape: str) -> str:
    """One line per kernel on one GPU."""
    lines = [
        f"| {gpu} | GFLOP | MB | floor, ms | bound | launches | registers | shared, KiB | programs | at once per SM "
        "| waves | full |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if (row["gpu"], row["shape"]) != (gpu, shape):
            continue
        cells = [f"{row['flops'] / 1e9:.0f}", f"{row['bytes'] / 1e6:.0f}", f"{row['floor_ms']:.3g}", row["bound"]]
        cells.append(str(row["launches"]))
        if row["variant"]:
            cells += [str(row["registers"]), f"{row['shared_bytes'] / 1024:.0f}", str(row["programs"])]
            cells += [str(row["programs_per_processor"]), f"{row['waves']:.2f}", f"{row['full']:.0%}"]
        else:
            cells += ["–"] * 6
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(check: bool) -> int:
    if not check:
        RESULT.write_text(json.dumps(compute(json.loads(COMPILED.read_text())), indent=1) + "\n", encoding="utf-8")
    block = tables(json.loads(RESULT.read_text(encoding="utf-8")))
    before = DOCUMENT.read_text(encoding="utf-8")
    after = replace_block(before, BLOCK, block)
    if check and before != after:
        print(f"{DOCUMENT.relative_to(ROOT)} is not what bench/results/roofline.json says; run bench/roofline.py")
        return 1
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    sys.exit(main(parser.parse_args().check))
