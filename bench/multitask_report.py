"""From the records of single runs to the two-domain table: means, standard errors, the markdown block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from table1_report import difference, mean_and_error, plus_minus, provenance

from tcopd_fast.report.text import MISSING, fixed, percent_pm

BEGIN, END = "<!-- multitask:begin -->", "<!-- multitask:end -->"
DOMAINS = ("math", "largest")
SAVED = "routed_away_share"


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run or evaluated checkpoint, shares and tokens.

    <domain>_t1, _t07, _greedy (accuracy), _length (tokens at T=1); <domain>_change, _forgetting from the run's own
    last evaluation; mean_t1, mean_t07, mean_greedy over the domains; routed_away_share where it was recorded.
    """
    values = {}
    for domain in DOMAINS:
        final = record["final"][domain]
        values |= {f"{domain}_{name}": final[name]["mean_at_k"] for name in ("t1", "t07", "greedy")}
        values[f"{domain}_length"] = final["t1"]["response_length_mean"]
        if "curve" in record:
            last = record["curve"][domain][-1]
            values |= {f"{domain}_{name}": last[name] for name in ("change", "forgetting")}
    for name in ("t1", "t07", "greedy"):
        values[f"mean_{name}"] = fmean(values[f"{domain}_{name}"] for domain in DOMAINS)
    if record.get(SAVED) is not None:
        values[SAVED] = record[SAVED]
    return values


def aggregate(records: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """One entry per row, in order of first appearance.

    metrics: over seeds. difference: this row minus `reference`, paired by seed over the seeds that both have.
    curve: domain -> accuracy over seeds at every evaluated step.
    """
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["seed"]] = record
    base = {seed: measures(record) for seed, record in by_row.get(reference, {}).items()}
    rows = []
    for key, runs in by_row.items():
        values = {seed: measures(record) for seed, record in sorted(runs.items())}
        paired = [seed for seed in values if seed in base and key != reference]
        first = next(iter(runs.values()))
        names = set.intersection(*(set(own) for own in values.values()))
        rows.append(
            {
                **{field: first[field] for field in ("row", "label", "lambdas", "normalizer", "domains")},
                "seeds": list(values),
                "metrics": {name: mean_and_error([v[name] for v in values.values()]) for name in sorted(names)},
                "difference_to": reference,
                "difference": {
                    name: mean_and_error([values[seed][name] - base[seed][name] for seed in paired])
                    for name in sorted(names)
                    if paired
                },
                "curve": {
                    domain: _mean_curve([record["curve"][domain] for record in runs.values()]) for domain in DOMAINS
                },
            }
        )
    return rows


def _mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    by_step: dict[int, list[float]] = {}
    for point in (point for curve in curves for point in curve):
        by_step.setdefault(point["step"], []).append(point["accuracy"])
    return [{"step": step, **mean_and_error(values)} for step, values in sorted(by_step.items())]


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The block between the markers: accuracies, what was gained and lost, provenance, figure (links as given)."""
    lead = ["row", "λ own", "λ other", "1/K"]
    accuracy = [[*lead, "math, T=1", "largest, T=1", "mean, T=1", "Δ mean to ExOPD"]]
    accuracy[0] += ["math, greedy", "largest, greedy", "mean, greedy"]
    accuracy += [_baseline_cells(entry) for entry in table["baselines"]]
    accuracy += [_accuracy_cells(row) for row in table["rows"]]
    moved = [[*lead, "change, math", "change, largest", "forgotten, math", "forgotten, largest", "tokens, math"]]
    moved[0] += ["tokens, largest", "routed away, %"]
    moved += [_moved_cells(row) for row in table["rows"]]
    link = f"![Accuracy on both domains against training steps]({figure})"
    parts = [_table(accuracy), _legend(table), _table(moved), _moved_legend(table), provenance(table, results), link]
    return "\n\n".join(parts)


def _table(cells: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def _lead(row: Mapping[str, Any]) -> list[str]:
    normalizer = {None: "either", "none": "no", "active": "yes"}[row["normalizer"]]
    return [row["label"], *(fixed(row["lambdas"][name], 1) for name in ("own", "other")), normalizer]


def _baseline_cells(entry: Mapping[str, Any]) -> list[str]:
    values = measures(entry)

    def cells(sampling: str) -> list[str]:
        errors = [entry["final"][domain][sampling]["standard_error"] for domain in DOMAINS]
        own = [percent_pm(values[f"{d}_{sampling}"], error) for d, error in zip(DOMAINS, errors, strict=True)]
        # The domains' problems are different ones, so their errors are independent.
        return [*own, percent_pm(values[f"mean_{sampling}"], math.hypot(*errors) / len(DOMAINS))]

    return [entry["label"], *[MISSING] * 3, *cells("t1"), MISSING, *cells("greedy")]


def _accuracy_cells(row: Mapping[str, Any]) -> list[str]:
    def cells(sampling: str) -> list[str]:
        entries = [row["metrics"][f"{name}_{sampling}"] for name in (*DOMAINS, "mean")]
        return [percent_pm(entry["mean"], entry["standard_error"]) for entry in entries]

    return [*_lead(row), *cells("t1"), difference(row["difference"].get("mean_t1")), *cells("greedy")]


def _moved_cells(row: Mapping[str, Any]) -> list[str]:
    metrics = row["metrics"]
    changes = [difference(metrics[f"{domain}_change"]) for domain in DOMAINS]
    lost = [percent_pm(*_both(metrics[f"{domain}_forgetting"])) for domain in DOMAINS]
    lengths = [plus_minus(metrics[f"{domain}_length"], 1) for domain in DOMAINS]
    saved = percent_pm(*_both(metrics[SAVED])) if SAVED in metrics else MISSING
    return [*_lead(row), *changes, *lost, *lengths, saved]


def _both(entry: Mapping[str, Any]) -> tuple[float, float | None]:
    return entry["mean"], entry["standard_error"]


def _legend(table: Mapping[str, Any]) -> str:
    final = table["recipe"]["final"]
    problems = " and ".join(str(table["baselines"][0]["final"][domain]["t1"]["problems"]) for domain in DOMAINS)
    return (
        f"Accuracy in % on {problems} held-out problems: mean of {final['t1']['samples']} samples each at T=1, one "
        f"greedy answer. Trained rows: mean over {len(table['seeds'])} seeds ± its standard error over seeds; Δ is "
        f"paired by seed. Evaluated checkpoints (first {len(table['baselines'])} rows): ± standard error over "
        "problems. λ own: of a domain's own expert; λ other: of the other domain's expert. 1/K: whether the reward is "
        "divided by the number of active teachers (`normalizer: active`) or not (`none`); with one active teacher both "
        "are the same run. Every row trains on as many prompts per step; the rows named `only` give them all to one "
        "domain."
    )


def _moved_legend(table: Mapping[str, Any]) -> str:
    config = table["recipe"]["config"]
    return (
        f"change and forgotten, percentage points, from the run's own evaluations every {config['eval']['every']} "
        f"steps with {config['eval']['samples']} samples per problem at T=1: the last accuracy minus that at step 0, "
        "and the best one minus the last. tokens: mean response length at T=1. routed away: "
        "`scoring/routed_away_share`, mean over the run."
    )
