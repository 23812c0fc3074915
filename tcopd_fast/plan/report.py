"""A plan as text, and as what goes into a JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tcopd_fast.config import Config
from tcopd_fast.plan.build import Plan
from tcopd_fast.plan.memory import CONTEXT_BYTES, FRAGMENTATION
from tcopd_fast.plan.workload import Frozen
from tcopd_fast.report.text import seconds
from tcopd_fast.scoring import REFERENCE

STREAMED = ("offload", "delta", "lora", "student")


def plan_text(plan: Plan, title: str, gpu: str) -> str:
    """The whole report. Sizes in GB (10⁹ bytes)."""
    cluster, work, placed = plan.cluster, plan.work, plan.placed
    lines = [
        f"PREDICTION for {title}: {cluster.ranks} × {gpu}, {gb(cluster.memory)} GB each. Nothing was run.",
        f"student: {plan.student.weights / 1e6:,.1f} million weights, {plan.student.layers} layers; "
        f"{len(placed.frozen)} frozen models; {plan.config.model.dtype}, ZeRO {plan.config.learner.zero_stage}, "
        f"gradient checkpointing {'on' if plan.config.model.gradient_checkpointing else 'off'}{_trained(plan)}",
        f"a step, on one rank: {work.sequences} sequences of {work.prompt:g} + {work.response:g} tokens; forwards of "
        f"up to {work.microbatch} tokens in the learner, {work.packed(work.scoring_budget)} in scoring",
        "",
        f"Memory of one rank, GB (largest: {placed.memory.fullest}, {gb(placed.memory.peak)} with "
        f"{FRAGMENTATION:.0%} for fragments and {gb(CONTEXT_BYTES)} for the CUDA context)",
        *table(_memory_rows(plan)),
        f"with every frozen model resident and float32 logits: {gb(plan.resident_logits)} GB",
        *([f"pinned host memory of one machine: {gb(placed.memory.host_total)} GB"] if placed.memory.host else []),
        "",
        f"Time of one step: {seconds(plan.seconds)}, without data, reward, judge and kernel launches",
        *table(_time_rows(plan)),
        "",
        "Placements",
        *table(_placement_rows(plan)),
        *(f"  looked at {words}: {gb(peak)} GB" for words, peak in placed.tried),
    ]
    return "\n".join([*lines, "", *_advice(plan)])


def _trained(plan: Plan) -> str:
    """What of the student is trained and where its optimizer lives, where that is not the usual."""
    offload = plan.config.learner.offload
    adapter = f", LoRA adapter of {plan.student.trained / 1e6:,.1f} million weights" if plan.student.adapter else ""
    return adapter + (f", offload {offload}" if offload != "none" else "")


def _memory_rows(plan: Plan) -> list[list[str]]:
    memory = plan.placed.memory
    rows = [["held", name, gb(size)] for name, size in memory.held.items()]
    rows.append(["", "all held", gb(memory.always)])
    for stage, parts in memory.stages.items():
        rows += [[stage, name, gb(size)] for name, size in parts.items()]
        rows.append(["", f"{stage}, peak", gb(memory.stage_peak(stage))])
    return [["stage", "what", "GB"], *rows]


def _time_rows(plan: Plan) -> list[list[str]]:
    rows = [["stage", "time", "bound by", "TFLOP", "GB moved"]]
    for name, cost in plan.costs.items():
        moved = ", ".join(f"{link} {number(size / 1e9)}" for link, size in cost.traffic.items() if size) or "–"
        rows.append([name, seconds(cost.seconds), cost.bound, number(cost.flops / 1e12), moved])
    return rows


def _placement_rows(plan: Plan) -> list[list[str]]:
    rows = [["model", "weights, GB", "placement", "tokens of a pass", "fetching takes less than computing"]]
    for model in plan.placed.frozen:
        cost = plan.costs[f"scoring: {', '.join(model.roles)}"]
        passed = plan.work.packed(plan.work.trip_budget if model.placement in STREAMED else plan.work.scoring_budget)
        hidden = "–"
        if cost.break_even:
            hidden = f"{'yes' if cost.bound == 'compute' else 'no'}: from {cost.break_even} tokens on"
        rows.append([", ".join(model.roles), gb(model.nbytes), str(model.placement), str(passed), hidden])
    return rows


def _advice(plan: Plan) -> list[str]:
    if plan.placed.fits:
        return ["It fits. To paste into the configuration:", *yaml_lines(plan.config, plan.placed.frozen)]
    lines = [f"It does not fit: {plan.placed.why}."]
    for remedy in plan.remedies:
        lines.append(f"  {' '.join(remedy.overrides)}: {gb(remedy.placed.memory.peak)} GB, fits, with")
        lines += [f"    {line}" for line in yaml_lines(plan.config, remedy.placed.frozen)]
    if not plan.remedies:
        lines.append("  no change of one machine's settings helps; take more or larger GPUs, or placement: server")
    return lines


def yaml_lines(config: Config, frozen: Iterable[Frozen]) -> list[str]:
    """The recommended placements as YAML; a reference that is not configured is placed by scoring.placement."""
    models = [model for model in frozen if not model.fixed]
    section = "scoring" if config.reference is None else REFERENCE
    lines = [f"{section}: {{placement: {model.placement}}}" for model in models if REFERENCE in model.roles]
    teachers = [
        f"  {role}: {{placement: {model.placement}}}"
        for model in models
        for role in model.roles
        if role != REFERENCE and "#" not in role and not role.endswith(".base")
    ]
    return [*lines, *(["teachers:", *teachers] if teachers else [])]


def plan_json(plan: Plan, title: str, gpu: str) -> dict[str, Any]:
    """Every number of a plan; bytes and seconds."""
    placed, memory = plan.placed, plan.placed.memory
    return {
        "prediction": True,
        "config": title,
        "gpu": gpu,
        "ranks": plan.cluster.ranks,
        "gpu_memory_bytes": plan.cluster.memory,
        "fits": placed.fits,
        "why_not": placed.why,
        "student": {"weights": plan.student.weights, "layers": plan.student.layers},
        "work": {
            "sequences": plan.work.sequences,
            "prompt_tokens": plan.work.prompt,
            "response_tokens": plan.work.response,
            "microbatch_tokens": plan.work.microbatch,
            "microbatches": plan.work.microbatches,
        },
        "memory": {
            "held_bytes": dict(memory.held),
            "stage_bytes": {name: dict(parts) for name, parts in memory.stages.items()},
            "stage_peak_bytes": {name: memory.stage_peak(name) for name in memory.stages},
            "peak_bytes": memory.peak,
            "fullest": memory.fullest,
            "host_bytes": memory.host_total,
            "resident_and_logits_peak_bytes": plan.resident_logits,
        },
        "placements": [
            {"roles": list(m.roles), "weights": m.shape.weights, "bytes": m.nbytes, "placement": m.placement}
            for m in placed.frozen
        ],
        "tried": [{"placements": words, "peak_bytes": peak} for words, peak in placed.tried],
        "time": {
            name: {
                "seconds": cost.seconds,
                "bound": cost.bound,
                "flops": cost.flops,
                "traffic_bytes": cost.traffic,
                "break_even_tokens": cost.break_even,
            }
            for name, cost in plan.costs.items()
        },
        "step_seconds": plan.seconds,
        "speed": vars(plan.speed),
        "remedies": [{"overrides": list(r.overrides), "peak_bytes": r.placed.memory.peak} for r in plan.remedies],
    }


def number(value: float) -> str:
    """Three digits, all of them from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gb(size: float) -> str:
    """Bytes in GB, one decimal from 1 GB on, three digits below."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, two spaces in front."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
