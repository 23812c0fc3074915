"""From the records of single runs to the λ < 0 table: means, standard errors, the markdown block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from table1_report import difference, mean_and_error, plus_minus, provenance

from tcopd_fast.report.text import MISSING, fixed, percent, percent_pm

BEGIN, END = "<!-- lambda-safety:begin -->", "<!-- lambda-safety:end -->"


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """The table's numbers of one run.

    Last evaluation: accuracy as a share, kl_ref in nats per token. best: of all evaluations. Means over the last 10
    training steps: the rest; but negative_share_start is that of the first step.
    """
    last, training = record["curve"][-1], record["training"]
    return {
        "accuracy": last["accuracy"],
        "best": max(point["accuracy"] for point in record["curve"]),
        "kl_ref": last["reverse_kl"]["reference"],
        "negative_share_start": training["negative_share"][0],
        **record["last_steps"],
    }


def aggregate(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per row, in order of first appearance.

    metrics: mean, standard error and n over seeds of `measures`. difference: accuracy minus that of the same λ and
    normalizer without a guard, paired by seed. curve: accuracy over seeds at every evaluated step; training: mean over
    seeds of every recorded series. alarms: kind -> first and number of steps at which it fired, per seed.
    """
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["seed"]] = record
    rows = []
    for key, runs in by_row.items():
        first = next(iter(runs.values()))
        values = {seed: measures(record) for seed, record in sorted(runs.items())}
        base = _unguarded(by_row, first)
        paired = [seed for seed in values if seed in base] if first["guard"] != "none" else []
        changes = [values[seed]["accuracy"] - measures(base[seed])["accuracy"] for seed in paired]
        rows.append(
            {
                "row": key,
                **{field: first[field] for field in ("lambda", "normalizer", "guard")},
                "seeds": list(values),
                "metrics": {name: mean_and_error([v[name] for v in values.values()]) for name in values[first["seed"]]},
                "difference": mean_and_error(changes) if changes else None,
                "curve": [
                    {"step": points[0]["step"], **mean_and_error([point["accuracy"] for point in points])}
                    for points in zip(*(record["curve"] for record in runs.values()), strict=True)
                ],
                "training": {
                    name: [
                        fmean(at_step) for at_step in zip(*(r["training"][name] for r in runs.values()), strict=True)
                    ]
                    for name in first["training"]
                    if name != "step"
                }
                | {"step": first["training"]["step"]},
                "alarms": {
                    kind: [
                        {"first": steps[0] if steps else None, "steps": len(steps)}
                        for steps in (record["alarm_steps"][kind] for record in runs.values())
                    ]
                    for kind in first["alarm_steps"]
                },
            }
        )
    return rows


def _unguarded(by_row: Mapping[str, Mapping[int, Any]], like: Mapping[str, Any]) -> Mapping[int, Any]:
    """The runs of the same λ and normalizer without a guard; empty when there are none."""
    for runs in by_row.values():
        record = next(iter(runs.values()))
        if record["guard"] == "none" and all(record[key] == like[key] for key in ("lambda", "normalizer")):
            return runs
    return {}


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The block of docs/safety.md: table, how to read it, provenance, figure. figure, results: links from there."""
    head = ["λ anti-expert", "1/K", "guard", "accuracy", "Δ to no guard", "best", "KL to ref.", "entropy", "length"]
    head += ["truncated", "grad norm", "share", "share alarm", "entropy alarm"]
    cells = [head, ["---:", "---", "---", *["---:"] * (len(head) - 3)]]
    cells += [_cells(row) for row in table["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    link = f"![Accuracy, entropy and the anti-expert's share against training steps]({figure})"
    return "\n".join([*lines, "", _legend(table), "", _tokens(table), "", provenance(table, results), "", link])


def _cells(row: Mapping[str, Any]) -> list[str]:
    values = row["metrics"]
    lead = [fixed(row["lambda"], 1), {"none": "no", "active": "yes"}[row["normalizer"]], row["guard"]]
    accuracy = percent_pm(values["accuracy"]["mean"], values["accuracy"]["standard_error"])
    numbers = [percent(values["best"]["mean"]), plus_minus(values["kl_ref"], 3)]
    numbers += [fixed(values[name]["mean"], digits) for name, digits in (("entropy", 3), ("response_length", 1))]
    numbers += [percent(values["truncated_share"]["mean"]), fixed(values["grad_norm"]["mean"], 1)]
    shares = " → ".join(percent(values[name]["mean"]) for name in ("negative_share_start", "negative_share"))
    return [*lead, accuracy, difference(row["difference"]), *numbers, shares, *map(_alarm, row["alarms"].values())]


def _alarm(runs: Sequence[Mapping[str, Any]]) -> str:
    """`3/3, from 1, 12 steps`: runs that fired, earliest step, mean number of steps."""
    fired = [run for run in runs if run["steps"]]
    if not fired:
        return MISSING
    steps = fmean(run["steps"] for run in fired)
    return f"{len(fired)}/{len(runs)}, from {min(run['first'] for run in fired)}, {steps:.0f} steps"


def _legend(table: Mapping[str, Any]) -> str:
    samples = table["recipe"]["config"]["eval"]["samples"]
    objective = table["recipe"]["config"]["objective"]
    return (
        f"accuracy: % of {samples} samples per held-out problem at T=1 after the last step, mean ± standard error over "
        "seeds; Δ is paired by seed, in points; best: the highest evaluation of a run. KL to ref.: KL(student ‖ "
        "reference) on those samples, nats per token. Means over the last 10 training steps: entropy (nats per token), "
        "length (tokens), truncated (%), grad norm (before clipping). share: `reward/negative_share` of the first step "
        "and of the last 10, %. Alarms: "
        "runs in which it fired, earliest step, number of steps per such run, at "
        f"alarm_negative_share {objective['alarm_negative_share']:g} and "
        f"alarm_entropy_share {objective['alarm_entropy_share']:g}. "
        "1/K: `normalizer: active` (yes) or `none` (no). Guards: "
        + "; ".join(
            f"{name}: " + ", ".join(f"`{key}: {value:g}`" for key, value in keys.items())
            for name, keys in table["recipe"]["guards"].items()
            if name not in ("none", "all")
        )
        + "; all: these together."
    )


def _tokens(table: Mapping[str, Any]) -> str:
    """What the tokens of the sampled runs show, one sentence per run."""
    words = []
    for found in table["tokens"]:
        at = " / ".join(f"{100 * q:g}" for q in found["at"])
        ratios, advantages = (" / ".join(fixed(v, 2) for v in found[name]) for name in ("logratio", "advantage"))
        first = " and ".join(
            f"{fixed(value, 2, sign=True)} in {name} answers" for name, value in found["first_token_advantage"].items()
        )
        words.append(
            f"Tokens of `{found['of']}`, nats, quantiles {at} %: |log π_k − log π_ref| of both teachers {ratios}; |A| "
            f"{advantages}; mean A of a response's first token in the last 10 steps: {first}."
        )
    return "\n\n".join(words)
