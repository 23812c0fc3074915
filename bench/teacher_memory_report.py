"""From the cells of the teachers' memory benchmark to growth per teacher, verdicts and markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tcopd_fast.errors import UserError

BEGIN, END = "<!-- teacher-memory:begin -->", "<!-- teacher-memory:end -->"
README_BEGIN, README_END = "<!-- teacher-cost:begin -->", "<!-- teacher-cost:end -->"
MB = 1e6
# A placement is flat when each teacher adds less than this share of a checkpoint.
FLAT_SHARE = 0.05
PAPER_SHARE = 0.035
TITLES = {
    "resident": "resident",
    "offload": "offload",
    "delta": "delta",
    "lora": "LoRA adapter",
    "sharded 1": "sharded, 1 rank",
    "sharded 2": "sharded, 2 ranks",
}
SHOWN_PACKAGES = ("python", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Series:
    """One placement: K -> peak bytes over the scoring passes (largest rank) above a process without frozen models.

    growth, anonymous_growth, mapped_growth: bytes per teacher. seconds_per_teacher: of a scoring pass.
    difference: largest |Δ logprob| over all K to the same teachers, resident (None: not compared).
    """

    name: str
    bytes: Mapping[int, int]
    growth: float
    parts: Mapping[str, float]
    seconds_per_teacher: float
    difference: float | None


def slope(points: Mapping[int, float]) -> float:
    """Least-squares slope of value over count. Raises ValueError for fewer than two counts."""
    if len(points) < 2:
        raise ValueError(f"slope: {len(points)} points; two counts at least are needed")
    mean_x = sum(points) / len(points)
    mean_y = sum(points.values()) / len(points)
    spread = sum((x - mean_x) ** 2 for x in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread


def measure_name(data: Mapping[str, Any]) -> str:
    """What is plotted: peak resident set, or what torch's allocator gave out on a GPU."""
    return "cuda_allocated_bytes" if data["device"] == "cuda" else "resident_set_bytes"


def peak(cell: Mapping[str, Any], measure: str) -> int:
    """Largest value over passes and ranks."""
    return max(one[measure] for process in cell["processes"] for one in process["passes"])


def series_of(data: Mapping[str, Any]) -> list[Series]:
    """Every placement measured, in the order of TITLES."""
    measure = measure_name(data)
    idle = next(cell for cell in data["cells"] if cell["series"] == "none")
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for cell in data["cells"]:
        name = f"sharded {cell['ranks']}" if cell["series"] == "sharded" else cell["series"]
        grouped.setdefault(name, []).append(cell)
    out = []
    for name in (title for title in TITLES if title in grouped):
        cells = {cell["teachers"]: cell for cell in grouped[name]}
        differences = [c["max_abs_difference"] for c in cells.values() if c["max_abs_difference"] is not None]
        out.append(
            Series(
                name=name,
                bytes={k: peak(cell, measure) - peak(idle, measure) for k, cell in cells.items()},
                growth=slope({k: peak(cell, measure) for k, cell in cells.items()}),
                parts={
                    part: slope({k: peak(cell, part) for k, cell in cells.items()})
                    for part in ("resident_set_bytes", "anonymous_bytes", "mapped_bytes")
                },
                seconds_per_teacher=slope({k: last_pass_seconds(cell) for k, cell in cells.items()}),
                difference=max(differences, default=None),
            )
        )
    return out


def last_pass_seconds(cell: Mapping[str, Any]) -> float:
    """Of the last pass, the slowest rank."""
    return max(process["passes"][-1]["seconds"] for process in cell["processes"])


def verdict(series: Series, checkpoint: int) -> str:
    """`flat`, or growth in checkpoints per teacher."""
    share = series.growth / checkpoint
    return "flat" if abs(share) < FLAT_SHARE else f"{share:.2f} of a checkpoint"


def summary_lines(data: Mapping[str, Any]) -> list[str]:
    """What the command prints: growth per teacher and verdict of each placement, then the steps."""
    checkpoint = data["bytes"]["full"]
    lines = [f"one checkpoint: {checkpoint / MB:.0f} MB; flat: less than {FLAT_SHARE:.0%} of it per teacher"]
    for one in series_of(data):
        parts = ", ".join(f"{name.removesuffix('_bytes')} {size / MB:+.1f}" for name, size in one.parts.items())
        lines.append(
            f"{TITLES[one.name]}: {one.growth / MB:+.1f} MB per teacher ({verdict(one, checkpoint)}); of it {parts}; "
            f"{one.seconds_per_teacher:.2f} s per teacher; largest |Δ logprob| {difference_text(one.difference)}"
        )
    for row in step_rows(data):
        lines.append(
            f"step with {row['placement']} teachers: {row['scoring_s']:.2f} s per teacher, {row['share']:.1%} of a "
            f"step of {row['step_s']:.2f} s"
        )
    return lines


def difference_text(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def step_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per placement: seconds of scoring per additional teacher, of a step with one teacher, and their ratio.

    scoring_s is the slope over K of the median `time_s/scoring`; step_s the median `time_s/step` at the smallest K.
    """
    rows = []
    runs = data.get("steps", {}).get("runs", [])
    for placement in dict.fromkeys(run["placement"] for run in runs):
        own = [run for run in runs if run["placement"] == placement]
        counts = sorted({run["teachers"] for run in own})
        medians = {
            stage: {k: median(s for run in own if run["teachers"] == k for s in run[f"time_s/{stage}"]) for k in counts}
            for stage in ("scoring", "step")
        }
        scoring, step = slope(medians["scoring"]), medians["step"][counts[0]]
        rows.append({"placement": placement, "medians": medians, "scoring_s": scoring, "step_s": step,
                     "share": scoring / step})  # fmt: skip
    return rows


def memory_block(runs: Sequence[tuple[Mapping[str, Any], str, str]]) -> str:
    """Markdown of every JSON: tables, how to read them, figure. runs: (content, link to it, link to its figure)."""
    parts = []
    for data, results, figure in runs:
        parts += [_memory_table(data), _memory_note(data), f"![Memory against the number of teachers]({figure})"]
        if step_rows(data):
            parts += [_steps_table(data), _steps_note(data)]
        parts.append(provenance(data, results))
    return "\n\n".join(parts)


def readme_block(runs: Sequence[tuple[Mapping[str, Any], str, str]]) -> str:
    """The README's paragraph. runs: (content, link to it, any)."""
    out = []
    for data, results, _ in runs:
        most = max(k for one in series_of(data) for k in one.bytes)
        costs = ", ".join(f"{TITLES[one.name]} {signed(one.growth / MB)}" for one in series_of(data))
        steps = ", ".join(f"{row['placement']} {100 * row['share']:.1f} %" for row in step_rows(data))
        share = f" Scoring by one more teacher takes, of a step with one: {steps} (on one CPU thread)." if steps else ""
        where = "GPU memory" if data["device"] == "cuda" else "resident memory on a CPU"
        out.append(
            f"**What one more teacher costs, measured.** Of a checkpoint of {data['bytes']['full'] / MB:.0f} MB, MB of "
            f"{where} per teacher, 0 to {most} teachers: {costs}.{share} "
            f"Tables: [docs/teachers.md](docs/teachers.md#what-they-cost-measured); {provenance(data, results)}"
        )
    return "\n\n".join(out)


def _memory_table(data: Mapping[str, Any]) -> str:
    checkpoint = data["bytes"]["full"]
    measured = series_of(data)
    counts = sorted({count for one in measured for count in one.bytes})
    rows = [["teachers K", *map(str, counts), "MB per teacher", "growth", "s per teacher", "max abs Δ logprob"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for one in measured:
        peaks = [f"{one.bytes[k] / MB:.0f}" if k in one.bytes else "–" for k in counts]
        word = verdict(one, checkpoint)
        rows.append([TITLES[one.name], *peaks, signed(one.growth / MB), f"**{word}**" if word == "flat" else word,
                     f"{one.seconds_per_teacher:.2f}", difference_text(one.difference)])  # fmt: skip
    return table(rows)


def _memory_note(data: Mapping[str, Any]) -> str:
    shape, sizes = data["shape"], data["bytes"]
    if data["device"] == "cuda":
        what = "Peak bytes that torch's allocator gave out on the GPU"
        parts = " In host memory, where offloaded models wait, one more teacher takes " + _list(
            f"{signed(one.parts['resident_set_bytes'] / MB)} MB ({TITLES[one.name]})" for one in series_of(data)
        )
        parts += "."
    else:
        what = "Peak resident set over two scoring passes, largest rank, above that of a process without frozen models"
        parts = " Of the growth, mapped file pages, which the kernel may drop, are " + _list(
            f"{signed(one.parts['mapped_bytes'] / MB)} MB ({TITLES[one.name]})" for one in series_of(data)
        )
        parts += "; the rest is anonymous memory."
    deltas = f"a delta {sizes['delta'] / MB:.0f} MB, a LoRA adapter (rank 16) {sizes['lora'] / MB:.0f} MB"
    clock = f" Seconds: {data['jobs']} processes shared the machine." if data["jobs"] > 1 else ""
    return (
        f"{what}, in MB; each cell is a fresh process with a `Scorer`, reference included, and at K = 0 it is the only "
        f"model. Base: random Qwen3, {shape['layers']} layers of width {shape['hidden']}, vocabulary {shape['vocab']}, "
        f"bfloat16; one checkpoint is {sizes['full'] / MB:.0f} MB, {deltas}. Teachers differ from the base "
        f"in 5 % of their weights (LoRA: in the layers' matrices). "
        f"{data['packed_tokens']} packed tokens, {data['scored_tokens']} of them scored. "
        f"Growth is the least-squares slope over K; flat: below {FLAT_SHARE:.0%} of a checkpoint per teacher.{parts} "
        "Δ logprob: against the same teachers, resident (LoRA: merged in float32 and rounded); on every rank of "
        f"`sharded` the same rollouts.{clock}"
    )


def _list(words: Any) -> str:
    found = list(words)
    return ", ".join(found[:-1]) + " and " + found[-1] if len(found) > 1 else found[0]


def _steps_table(data: Mapping[str, Any]) -> str:
    rows = step_rows(data)
    counts = sorted(rows[0]["medians"]["step"])
    head = ["placement", *(f"scoring, K = {k}" for k in counts), f"step, K = {counts[0]}"]
    lines = [[*head, "per additional teacher", "share of the step"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        scoring = [f"{row['medians']['scoring'][k]:.2f} s" for k in counts]
        lines.append([row["placement"], *scoring, f"{row['step_s']:.2f} s", f"{row['scoring_s']:.2f} s",
                      f"{100 * row['share']:.1f} %"])  # fmt: skip
    return table(lines)


def _steps_note(data: Mapping[str, Any]) -> str:
    steps = data["steps"]
    return (
        f"Real `tcopd train` steps (rollout engine hf) with a student and teachers of {steps['weights'] / 1e6:.0f}M "
        f"weights, bfloat16; {steps['sequences']} responses of at most {steps['response_tokens']} tokens per "
        f"step, medians over {steps['measured_steps']} steps of {steps['rounds']} interleaved rounds. The paper states "
        f"{100 * PAPER_SHARE:.1f} % for a second 4B teacher on its own hardware, engine and response lengths, so the "
        "two are not comparable one to one: on one CPU thread a scoring pass, which is compute, weighs far more "
        "against decoding than on a GPU."
    )


def provenance(data: Mapping[str, Any], results: str) -> str:
    """Device, versions, commit, date, command, link."""
    about = data["environment"]
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in SHOWN_PACKAGES if name in about["versions"])
    sha = about["git_sha"] or "unknown"
    return (
        f"{about['device']}; {data['threads']} thread per process; {packages}; commit "
        f"`{sha[:9]}{'+' if sha.endswith('+') else ''}`; {about['started'][:10]}; `{about['command']}`; "
        f"every number: [{Path(results).name}]({results})."
    )


def signed(value: float) -> str:
    """One decimal, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def insert(doc: Path, block: str, begin: str, end: str) -> None:
    """Replace what stands between two markers. Raises UserError unless each is there once."""
    text = doc.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{doc}: needs the line {begin} once and the line {end} once; add them where the table belongs")
    new = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)
    partial = doc.with_name(f"{doc.name}.partial")
    partial.write_text(new, encoding="utf-8")
    os.replace(partial, doc)
