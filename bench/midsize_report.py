"""From the cells of the mid-size benchmark to tables, costs per teacher and markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from midsize_plan import LOGITS, SERIES
from table1_report import replace_block
from teacher_memory_report import PAPER_SHARE, SHOWN_PACKAGES, signed, slope, table

from tcopd_fast.errors import UserError
from tcopd_fast.rundir import write_atomically

BEGIN, END = "<!-- midsize:begin -->", "<!-- midsize:end -->"
README_BEGIN, README_END = "<!-- midsize-summary:begin -->", "<!-- midsize-summary:end -->"
GB = 1e9
PAPER_GB = 8.2
# Stages of a step that take noticeable time or memory.
SHOWN = ("scoring", "loss", "learner")
TITLES = {
    "resident": "resident",
    LOGITS: "resident, with logits",
    "offload": "offload",
    "delta": "delta",
    "lora": "LoRA adapters",
}
NAMES = {"qwen3_0.6b": "Qwen3-0.6B", "qwen3_4b": "Qwen3-4B"}

Row = Mapping[str, Any]


def stage_peak(row: Row, stage: str) -> int:
    """Bytes, the largest of the measured steps."""
    return max(step[f"peak_memory_bytes/{stage}"] for step in row["steps"])


def peak(row: Row) -> int:
    """Bytes of the fullest stage."""
    return max(stage_peak(row, stage) for stage in SHOWN)


def stage_seconds(row: Row, stage: str) -> float:
    """Median over the measured steps; stage `step` is the whole."""
    return median(step[f"time_s/{stage}"] for step in row["steps"])


def measured(data: Mapping[str, Any], shape: str, placement: str) -> dict[int, Row]:
    """K -> cell, of those that ended well."""
    return {
        row["teachers"]: row
        for row in data["cells"]
        if row["result"] == "measured" and (row["shape"], row["placement"]) == (shape, placement)
    }


def costs(data: Mapping[str, Any], shape: str) -> list[dict[str, Any]]:
    """What one more teacher takes, per placement that was measured with at least two numbers of teachers."""
    out = []
    for placement in SERIES:
        rows = measured(data, shape, placement)
        if len(rows) < 2:
            continue
        peaks = {k: peak(row) for k, row in rows.items()}
        scoring, steps = ({k: stage_seconds(row, s) for k, row in rows.items()} for s in ("scoring", "step"))
        out.append({"placement": placement, "counts": sorted(rows), **per_teacher(peaks, scoring, steps)})
    return out


def per_teacher(
    peaks: Mapping[int, float], scoring: Mapping[int, float], steps: Mapping[int, float]
) -> dict[str, float]:
    """Least-squares slopes over K. bytes: of the fullest stage. seconds: of scoring. share: of the step with the fewest
    teachers."""
    seconds = slope(scoring)
    return {"bytes": slope(peaks), "seconds": seconds, "share": seconds / steps[min(steps)]}


def against_logits(data: Mapping[str, Any], shape: str) -> dict[str, float] | None:
    """The resident placement against the paper's way at the largest K that both have: bytes and seconds of the step of
    each, and |Δ loss| of the last step; None where there is no such K."""
    ours, theirs = measured(data, shape, "resident"), measured(data, shape, LOGITS)
    if not ours.keys() & theirs.keys():
        return None
    count = max(ours.keys() & theirs.keys())
    a, b = ours[count], theirs[count]
    return {
        "teachers": count,
        "bytes": peak(a),
        "logits_bytes": peak(b),
        "seconds": stage_seconds(a, "step"),
        "logits_seconds": stage_seconds(b, "step"),
        "loss_difference": abs(a["steps"][-1]["loss"] - b["steps"][-1]["loss"]),
    }


def cell_line(row: Row) -> str:
    """One cell in one line, for the terminal."""
    name = f"{row['shape']}, {row['teachers']} teachers, {TITLES[row['placement']]}"
    if row["result"] == "failed":
        return f"{name}: failed: {row['message'].splitlines()[-1]}"
    if row["result"] != "measured":
        return f"{name}: {outcome(row)}"
    stages = ", ".join(f"{s} {stage_peak(row, s) / GB:.2f} GB {stage_seconds(row, s):.2f} s" for s in SHOWN)
    return f"{name}: {stages}; cell took {row['cell_s']:.0f} s"


def outcome(row: Row) -> str:
    """What became of a cell that has no measurement."""
    if row["result"] == "out of memory":
        return f"out of memory in {row['out_of_memory']['stage']}"
    return str(row["result"])


def markdown(data: Mapping[str, Any], results: str, figure: str) -> str:
    """The block of docs/performance.md. results, figure: links to the JSON and to its figure."""
    parts = []
    for shape in data["shapes"]:
        parts += [heading(data, shape), _cells_table(data, shape)]
        if costs(data, shape):
            parts.append(_costs_table(data, shape))
        if data["device"] == "cuda" and any(measured(data, shape, name) for name in SERIES):
            parts.append(_plan_table(data, shape))
    return "\n\n".join(
        [
            *parts,
            f"![Peak memory and seconds of a step against teachers]({figure})",
            _note(data),
            provenance(data, results),
        ]
    )


def summary(data: Mapping[str, Any], results: str) -> str:
    """The README's paragraph."""
    said = []
    for shape in data["shapes"]:
        parts = [f"{TITLES[one['placement']]} {signed(one['bytes'] / GB)}" for one in costs(data, shape)]
        pair = against_logits(data, shape)
        text = f"{name_of(shape)}: GB per additional teacher: {', '.join(parts)}" if parts else ""
        if pair is not None:
            text += "; " if text else f"{name_of(shape)}: "
            text += (
                f"with {pair['teachers']:.0f} resident teachers {pair['bytes'] / GB:.1f} GB and "
                f"{pair['seconds']:.2f} s a step, with materialised logits {pair['logits_bytes'] / GB:.1f} GB and "
                f"{pair['logits_seconds']:.2f} s"
            )
        said += [f"{text}."] if text else []
    return (
        f"**A mid-size run, measured.** Steps without rollout on sequences of {data['tokens']} tokens. "
        f"{' '.join(said)} Tables: [docs/performance.md](docs/performance.md); {provenance(data, results)}"
    )


def name_of(shape: str) -> str:
    return NAMES.get(shape, shape)


def heading(data: Mapping[str, Any], shape: str, label: str = "") -> str:
    """What a table is of."""
    about = data["shapes"][shape]
    trained = "a LoRA adapter is trained" if about["lora"] else "all weights are trained"
    sequences = f"{about['sequences']} sequence{'s' if about['sequences'] > 1 else ''}"
    words = f"{about['dtype']}; {trained}; {sequences} of {data['tokens']} packed tokens a step"
    return f"**{label}{name_of(shape)}** ({words})"


def _cells_of(data: Mapping[str, Any], shape: str) -> list[Row]:
    """By placement, then K."""
    order = [*SERIES]
    cells = [row for row in data["cells"] if row["shape"] == shape]
    return sorted(cells, key=lambda row: (order.index(row["placement"]), row["teachers"]))


def _cells_table(data: Mapping[str, Any], shape: str) -> str:
    head = ["teachers", "K", *(f"{stage}, GB" for stage in SHOWN), "pinned, GB", *(f"{stage}, s" for stage in SHOWN)]
    rows = [[*head, "step, s"], ["---", *["---:"] * len(head)]]
    for row in _cells_of(data, shape):
        start = [TITLES[row["placement"]], str(row["teachers"])]
        if row["result"] != "measured":
            rows.append([*start, f"*{outcome(row)}*", *["–"] * (len(rows[0]) - 3)])
            continue
        sizes = [f"{stage_peak(row, stage) / GB:.2f}" for stage in SHOWN]
        pinned = f"{row['pinned_bytes'] / GB:.1f}" if row.get("pinned_bytes") else "–"
        times = [f"{stage_seconds(row, stage):.2f}" for stage in (*SHOWN, "step")]
        rows.append([*start, *sizes, pinned, *times])
    return table(rows)


def _plan_table(data: Mapping[str, Any], shape: str) -> str:
    """Measured over predicted, of memory and seconds."""
    head = ["measured ÷ predicted", "K", "peak", *(f"{s}, bytes" for s in SHOWN), *(f"{s}, s" for s in SHOWN)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in _cells_of(data, shape):
        if row["result"] != "measured":
            continue
        predicted = row["predicted"]
        sizes, times = predicted.get("stage_bytes", {}), predicted.get("stage_seconds", {})
        rows.append(
            [
                TITLES[row["placement"]],
                str(row["teachers"]),
                f"{peak(row) / predicted['peak_bytes']:.2f}",
                *(f"{stage_peak(row, s) / sizes[s]:.2f}" if s in sizes else "–" for s in SHOWN),
                *(f"{stage_seconds(row, s) / times[s]:.2f}" if s in times else "–" for s in SHOWN),
            ]
        )
    return table(rows)


def _costs_table(data: Mapping[str, Any], shape: str) -> str:
    rows = [["one more teacher", "over K =", "GB", "s of scoring", "% of the step"], ["---", *["---:"] * 4]]
    for one in costs(data, shape):
        rows.append([TITLES[one["placement"]], ", ".join(map(str, one["counts"])), signed(one["bytes"] / GB),
                     f"{one['seconds']:.3f}", f"{100 * one['share']:.1f}"])  # fmt: skip
    return table(rows)


def _note(data: Mapping[str, Any]) -> str:
    what = "peak of torch's allocator" if data["device"] == "cuda" else "peak resident memory of the process"
    pairs = [pair for shape in data["shapes"] if (pair := against_logits(data, shape)) is not None]
    same = ""
    if pairs:
        same = f"Loss of the two at the last step: at most {max(pair['loss_difference'] for pair in pairs):.1e} apart. "
    return (
        f"Random weights; each row is a fresh process. GB: {what} in each stage, the largest of "
        f"{data['measured_steps']} steps after one that does not count; seconds: their median. A step here has no "
        "rollout and no weight_sync, and no rollout engine holds a copy of the student, so a teacher's share of the "
        "step is larger than of a whole one. With logits (the paper's way): every model resident, logits of every "
        "response token in the model's dtype and in float32, the same optimizer and micro-batches, no entropy. "
        f"{same}Pinned: host memory that torch's allocator pinned. Predicted: by `tcopd plan`, without its allowances "
        "for fragments and the CUDA context. One more teacher: least-squares slopes over K. The TC-OPD paper states "
        f"{PAPER_GB} GB and {100 * PAPER_SHARE:.1f} % of a step, rollouts included, for a second 4B teacher."
    )


def provenance(data: Mapping[str, Any], results: str, ran_on: str | None = None) -> str:
    """Device (or what is given instead), versions, commit, date, command, link."""
    about = data["environment"]
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in SHOWN_PACKAGES if name in about["versions"])
    sha = about["git_sha"] or "unknown"
    return (
        f"{ran_on or about['device']}; {packages}; commit `{sha[:9]}{'+' if sha.endswith('+') else ''}`; "
        f"{about['started'][:10]}; `{about['command']}`; every number: [{Path(results).name}]({results})."
    )


def insert(doc: Path, block: str, begin: str, end: str) -> bool:
    """Put the block between two markers; False where the file has neither. Raises UserError for one without the other
    or more than one pair."""
    text = doc.read_text(encoding="utf-8")
    if begin not in text and end not in text:
        return False
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{doc}: needs the line {begin} once and the line {end} once after it")
    write_atomically(doc, replace_block(text, block, begin, end))
    return True
