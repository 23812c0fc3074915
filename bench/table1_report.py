"""From the records of single runs to Table 1: means, standard errors, the markdown block and its place."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tcopd_fast.errors import UserError
from tcopd_fast.report.text import MISSING, fixed, percent, percent_pm

BEGIN, END = "<!-- table1:begin -->", "<!-- table1:end -->"
ACCURACIES = ("t1", "t07", "greedy")
SHOWN_PACKAGES = ("python", "torch", "transformers", "deepspeed")
MANDATORY = ("command", "date", "environment", "recipe", "seeds", "baselines", "runs", "rows")


def measures(results: Mapping[str, Any]) -> dict[str, float]:
    """The table's numbers of one evaluated checkpoint: accuracies as shares, length in tokens, KL in nats per token."""
    return {
        **{name: results[name]["mean_at_k"] for name in ACCURACIES},
        "length": results["t1"]["response_length_mean"],
        "kl_expert": results["t1"]["reverse_kl"]["expert"],
    }


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error std/√n with n − 1 degrees of freedom (None for one value), n."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "standard_error": error, "n": len(values)}


def aggregate(records: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """One entry per row, in order of first appearance.

    records: one per run, with row, label, lambdas, normalizer, seed, final (see `measures`) and curve ({"step",
    "accuracy"} each). metrics are over seeds; differences are paired: this row minus `reference` at the same seed,
    over the seeds that both have; curve is over seeds at every evaluated step.
    """
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["seed"]] = record
    base = {seed: measures(record["final"]) for seed, record in by_row.get(reference, {}).items()}
    rows = []
    for key, runs in by_row.items():
        values = {seed: measures(record["final"]) for seed, record in sorted(runs.items())}
        paired = [seed for seed in values if seed in base]
        names = list(next(iter(values.values())))
        first = next(iter(runs.values()))
        rows.append(
            {
                **{field: first[field] for field in ("row", "label", "lambdas", "normalizer")},
                "seeds": list(values),
                "metrics": {name: mean_and_error([v[name] for v in values.values()]) for name in names},
                "difference_to": reference,
                "difference": {
                    name: mean_and_error([values[seed][name] - base[seed][name] for seed in paired])
                    for name in names
                    if paired and key != reference
                },
                "curve": _mean_curve([record["curve"] for record in runs.values()]),
            }
        )
    return rows


def _mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for point in curve:
            by_step.setdefault(point["step"], []).append(point["accuracy"])
    return [{"step": step, **mean_and_error(values)} for step, values in sorted(by_step.items())]


def markdown(table: Mapping[str, Any], figure: str, results: str) -> str:
    """The README block: table, how to read its errors, provenance, figure. figure, results: links from the README."""
    head = ["row", "λ expert", "λ anti-expert", "1/K", "accuracy, T=1", "Δ to G-OPD (1.5, 0)", "T=0.7", "greedy"]
    head += ["tokens", "KL to expert"]
    cells = [head, ["---", *["---:"] * (len(head) - 1)]]
    cells += [_baseline_cells(entry) for entry in table["baselines"]]
    cells += [_row_cells(row) for row in table["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    link = f"![Accuracy on held-out problems against training steps]({figure})"
    return "\n".join([*lines, "", _legend(table), "", provenance(table, results), "", link])


def _baseline_cells(entry: Mapping[str, Any]) -> list[str]:
    results, values = entry["final"], measures(entry["final"])
    errors = {name: results[name]["standard_error"] for name in ACCURACIES}
    accuracy = {name: percent_pm(values[name], errors[name]) for name in ACCURACIES}
    lead = [entry["label"], MISSING, MISSING, MISSING, accuracy["t1"], MISSING]
    # The expert's KL to itself is rounding noise around 0; adding 0.0 drops the sign of −0.
    kl = fixed(round(values["kl_expert"], 3) + 0.0)
    return [*lead, accuracy["t07"], accuracy["greedy"], fixed(values["length"], 1), kl]


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = {
        name: percent_pm(row["metrics"][name]["mean"], row["metrics"][name]["standard_error"]) for name in ACCURACIES
    }
    numbers = [plus_minus(row["metrics"][name], digits) for name, digits in (("length", 1), ("kl_expert", 3))]
    weights = [fixed(row["lambdas"][name], 1) for name in ("expert", "anti_expert")]
    normalizer = {None: "either", "none": "no", "active": "yes"}[row["normalizer"]]
    lead = [row["label"], *weights, normalizer, accuracy["t1"], difference(row["difference"].get("t1"))]
    return [*lead, accuracy["t07"], accuracy["greedy"], *numbers]


def plus_minus(entry: Mapping[str, Any], digits: int) -> str:
    """`mean ± standard error` of a `mean_and_error`."""
    error = entry["standard_error"]
    return fixed(entry["mean"], digits) + ("" if error is None else f" ± {fixed(error, digits)}")


def difference(entry: Mapping[str, Any] | None) -> str:
    """A `mean_and_error` of differences of shares, in percentage points with its sign."""
    if entry is None:
        return MISSING
    error = entry["standard_error"]
    return fixed(100 * entry["mean"], 1, sign=True) + ("" if error is None else f" ± {percent(error)}")


def _legend(table: Mapping[str, Any]) -> str:
    final = table["recipe"]["final"]
    problems = table["baselines"][0]["final"]["t1"]["problems"]
    return (
        f"Accuracy in % on {problems} held-out problems: mean of {final['t1']['samples']} samples each at T=1, "
        f"{final['t07']['samples']} at T=0.7, one greedy answer. Trained rows: mean over {_count(table['seeds'])} "
        "± its standard error over seeds; Δ is paired by seed. Evaluated checkpoints (first "
        f"{len(table['baselines'])} rows): ± standard error over problems. tokens: mean response length at T=1. "
        "KL to expert: KL(row ‖ expert) at T=1, nats per token. 1/K: whether the reward is divided by the number of "
        "active teachers (`normalizer: active`) or not (`none`); with λ anti-expert = 0 there is one active teacher, "
        "so both are the same run."
    )


def provenance(table: Mapping[str, Any], results: str) -> str:
    """Device, threads, versions, commits, steps, seeds, date, command and a link to every number, as one paragraph."""
    environments = [record["environment"] for record in table["runs"]]
    versions = environments[0]["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in SHOWN_PACKAGES if name in versions)
    commits = [f"`{sha[:9]}{'+' if sha.endswith('+') else ''}`" for sha in table["commits"]]
    threads = _distinct(environments, "threads")
    return (
        f"{_distinct(environments, 'device')}; {threads} thread{'' if threads == '1' else 's'} per run; {packages}; "
        f"commit {', '.join(commits) or 'unknown'}; {table['recipe']['steps']} steps, seeds "
        f"{', '.join(map(str, table['seeds']))}; {table['date'][:10]}; `{table['command']}`; "
        f"every number: [{Path(results).name}]({results})."
    )


def _count(seeds: Sequence[int]) -> str:
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _distinct(environments: Sequence[Mapping[str, Any]], key: str) -> str:
    return " and ".join(dict.fromkeys(str(environment[key]) for environment in environments))


def check_markers(readme: Path, begin: str = BEGIN, end: str = END) -> str:
    """The README's text. Raises UserError unless both markers are there once and in order."""
    if not readme.is_file():
        raise UserError(f"--readme {readme}: no such file; name the README, or give --readme '' to write none")
    text = readme.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(
            f"--readme {readme}: needs the line {begin} once and the line {end} once after it; add them where the "
            "table belongs, or give --readme '' to write none"
        )
    return text


def replace_block(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with everything between the markers replaced by `block`."""
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text, count=1)


def link_from(readme: Path, target: Path) -> str:
    """Relative link from the README to a file."""
    return Path(os.path.relpath(target.resolve(), readme.resolve().parent)).as_posix()
