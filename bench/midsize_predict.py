"""What `tcopd plan` says of the mid-size run on one H100 of 80 GB, from shapes alone: the JSON and its markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from midsize_models import SHAPES, describe
from midsize_plan import PREDICTED_STAGES, SERIES, SPEED, config_tree, plan, predict, sizes
from midsize_report import GB, PAPER_GB, TITLES, Row, heading, per_teacher, provenance
from teacher_memory_report import PAPER_SHARE, signed, table

from tcopd_fast.plan.memory import CONTEXT_BYTES, FRAGMENTATION

DEVICE_BYTES = 80 * 10**9
# Whose teachers are as large as the paper's.
PAPER_SHAPE = "qwen3_4b"


def predictions(
    about: Mapping[str, Any], shapes: Sequence[str], counts: Sequence[int], placements: Sequence[str], tokens: int
) -> dict[str, Any]:
    """The JSON: one row per cell, as a measurement has it. about: `environment()`, of the machine that calculates."""
    rows = []
    with TemporaryDirectory() as folder:
        for shape in shapes:
            describe(Path(folder) / shape, SHAPES[shape], counts[-1])
        for cell in plan(shapes, counts, placements):
            tree = config_tree(Path(folder) / cell.shape, cell, tokens)
            rows.append({**asdict(cell), "predicted": predict(tree, cell, DEVICE_BYTES)})
    return {
        "predicted": True,
        "environment": dict(about),
        "gpu": "one H100 of 80 GB, from its data sheet; nothing was run on it",
        "device_bytes": DEVICE_BYTES,
        "speed": asdict(SPEED),
        "tokens": tokens,
        "shapes": {name: asdict(SHAPES[name]) | sizes(SHAPES[name], tokens) for name in shapes},
        "cells": rows,
    }


def block(data: Mapping[str, Any], results: str) -> str:
    """The block of docs/performance.md while nothing is measured. results: link to the JSON."""
    parts = []
    for shape in data["shapes"]:
        parts += [heading(data, shape, "Predicted, not measured: "), _table(data, shape)]
    return "\n\n".join([*parts, _note(data), provenance(data, results, "no GPU, no weights")])


def step_seconds(row: Row) -> float:
    """Seconds of a step without rollout: of the stages that take time."""
    return sum(row["predicted"]["stage_seconds"][stage] for stage in PREDICTED_STAGES)


def _table(data: Mapping[str, Any], shape: str) -> str:
    """GB and seconds by number of teachers, and what one more takes."""
    counts = sorted({row["teachers"] for row in data["cells"]})
    few, many = counts[0], counts[-1]
    head = ["teachers", *(f"K = {k}, GB" for k in counts), f"pinned, K = {many}, GB", f"step, K = {few}, s",
            "one more: GB", "s of scoring", "% of the step"]  # fmt: skip
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for placement in SERIES:
        own = [row for row in data["cells"] if (row["shape"], row["placement"]) == (shape, placement)]
        rows = {row["teachers"]: row for row in own}
        if not rows:
            continue
        more = ["–"] * 3
        if len(rows) > 1:
            one = per_teacher(
                {k: row["predicted"]["peak_bytes"] for k, row in rows.items()},
                {k: row["predicted"]["stage_seconds"]["scoring"] for k, row in rows.items()},
                {k: step_seconds(row) for k, row in rows.items()},
            )
            more = [signed(one["bytes"] / GB), f"{one['seconds']:.3f}", f"{100 * one['share']:.1f}"]
        pinned = rows[many]["predicted"]["host_bytes"]
        lines.append(
            [
                TITLES[placement],
                *(_size(rows[k]["predicted"]) for k in counts),
                f"{pinned / GB:.1f}" if pinned else "–",
                f"{step_seconds(rows[few]):.2f}",
                *more,
            ]
        )
    if shape == PAPER_SHAPE:
        blank = ["–"] * (len(counts) + 2)
        lines.append(["*the paper's second 4B teacher*", *blank, f"+{PAPER_GB}", "–", f"{100 * PAPER_SHARE:.1f}"])
    return table(lines)


def _size(predicted: Mapping[str, Any]) -> str:
    text = f"{predicted['peak_bytes'] / GB:.1f}"
    return text if predicted["fits"] else f"**{text}**"


def _note(data: Mapping[str, Any]) -> str:
    speed = data["speed"]
    return (
        f"GB of the fullest stage on one H100 of {data['device_bytes'] / GB:.0f} GB, without the allowances of "
        f"`tcopd plan` ({FRAGMENTATION:.0%} for fragments, {CONTEXT_BYTES / 2**30:.0f} GiB for the CUDA context); "
        f"bold: does not fit with them. Seconds: operations and bytes at {speed['compute_share']:.0%} of the compute, "
        f"{speed['hbm_share']:.0%} of the memory's and {speed['link_share']:.0%} of the link's peak. With logits (the "
        "paper's way): every model resident, the logits of every response token and their float32 copies; its seconds "
        "are those of the same products, moving the logits is not counted. Pinned: host memory. One more: "
        "least-squares slopes over K; % of the step with the fewest teachers. A step here has no rollout and no "
        "weight_sync, and no rollout engine holds a copy of the student; the paper's step includes a rollout, so its "
        f"{100 * PAPER_SHARE:.1f} % is a share of something longer."
    )
