"""The table of delta sizes, from the JSON that delta_sizes.py writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_memory_report import provenance, table

BEGIN, END = "<!-- delta-sizes:begin -->", "<!-- delta-sizes:end -->"


def title(row: Mapping[str, Any]) -> str:
    """Which fine-tune of which base."""
    if row["kind"] == "rl":
        return f"{row['name']}, RL, learning rate {row['lr']:g}, {row['steps']} step{'s' * (row['steps'] > 1)}"
    if row["kind"] == "lora":
        return f"{row['name']}, LoRA adapter of rank {row['rank']}"
    return str(row["name"])


def changed_shares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Percent of the weights that differ, and of those that are not 0 in the base."""
    if "changed" not in row:
        return "–", "–"
    nonzero = (row["changed"] - row["changed_zeros"]) / (row["weights"] - row["zeros"])
    return f"{100 * row['changed'] / row['weights']:.1f} %", f"{100 * nonzero:.1f} %"


def forms(row: Mapping[str, Any]) -> str:
    """Tensors by form."""
    return ", ".join(f"{count} {form}" for form, count in row.get("forms", {}).items()) or "factors"


def summary_lines(data: Mapping[str, Any]) -> list[str]:
    """What the command prints."""
    return [
        f"{title(row)}: {row['delta_bytes'] / 1e6:.1f} MB, {row['delta_bytes'] / row['base_bytes']:.1%} of the base; "
        f"{changed_shares(row)[0]} of its weights differ ({changed_shares(row)[1]} of those not 0); {forms(row)}"
        for row in data["rows"]
    ]


def sizes_block(data: Mapping[str, Any], results: str) -> str:
    """Markdown: table, how to read it, provenance. results: link to the JSON."""
    rows = [["teacher", "dtype", "base", "weights that differ", "of those not 0", "delta", "of the base", "tensors"]]
    rows.append(["---", "---", *["---:"] * 5, "---"])
    for row in data["rows"]:
        share = f"{100 * row['delta_bytes'] / row['base_bytes']:.1f} %"
        sizes = [f"{row[key] / 1e6:.1f} MB" for key in ("base_bytes", "delta_bytes")]
        rows.append([title(row), row["dtype"], sizes[0], *changed_shares(row), sizes[1], share, forms(row)])
    zeros = next((row["zeros"] / row["weights"] for row in data["rows"] if row["kind"] == "rl"), 0.0)
    per_step = data["rollout"]["prompts_per_step"] * data["rollout"]["samples_per_prompt"]
    note = (
        f"RL: real `tcopd train` runs with float32 master weights, {per_step} answers to one-digit sums per step, the "
        "judge's verdict as reward and KL to the start. The base is Gemma 3 270M as far as its package has it: weights "
        f"of 4 bits, unpacked and rounded to bfloat16, which leaves {100 * zeros:.1f} % of them exactly 0, where any "
        "update shows (hence the column without them; a model that was trained in bfloat16 has hardly any); its "
        f"vocabulary is cut to {data['vocabulary']} tokens. Real runs take hundreds of steps: the share grows with "
        "steps and learning rate. Every delta was rebuilt and its digest compared. LoRA: an adapter of every linear "
        "layer with random factors, since only its size counts."
    )
    return "\n\n".join([table(rows), note, provenance(data, results)])
