"""The tables of docs/plan.md and README.md, from what plan_check.py and plan_qwen3_4b.py wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CHECK_JSON, QWEN_JSON = RESULTS / "plan_check.json", RESULTS / "plan_qwen3_4b.json"
DOCS, README = ROOT / "docs" / "plan.md", ROOT / "README.md"
STAGES = ("rollout", "scoring", "loss", "learner", "weight_sync")
PACKAGES = ("python", "torch", "transformers", "deepspeed")


def write_blocks() -> None:
    """Write every block whose JSON is there between its markers."""
    for file, blocks in all_blocks().items():
        text = file.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = replace_block(text, name, block)
        file.write_text(text, encoding="utf-8")


def all_blocks() -> dict[Path, dict[str, str]]:
    """File -> marker name -> text, for the JSON files that exist."""
    found: dict[Path, dict[str, str]] = {DOCS: {}, README: {}}
    if CHECK_JSON.is_file():
        check = json.loads(CHECK_JSON.read_text(encoding="utf-8"))
        found[DOCS]["plan-check"] = check_block(check)
        found[README]["plan-check"] = check_summary(check)
    if QWEN_JSON.is_file():
        qwen = json.loads(QWEN_JSON.read_text(encoding="utf-8"))
        found[DOCS]["plan-qwen3"] = qwen_block(qwen, "../bench/results/plan_qwen3_4b.json")
        found[README]["plan-qwen3"] = qwen_summary(qwen)
    return found


def replace_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError unless both are there once, in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs the lines {begin} and {end} once, in this order")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text)


def check_block(check: Mapping[str, Any]) -> str:
    """Predicted against measured; `error` is that of the peak over the stages."""
    head = ["case", "weights", "student + frozen", "ranks", "dtype", "predicted, MiB", "measured, MiB", "error"]
    rows = [[*head, *STAGES], ["---", *["---:"] * (len(head) + len(STAGES) - 1)]]
    for row in check["rows"]:
        rows.append(
            [
                row["case"],
                f"{row['weights'] / 1e6:.0f}M",
                f"1 + {row['frozen_models']}, {row['placement']}",
                str(row["ranks"]),
                row["dtype"],
                f"{row['peak_predicted_bytes'] / 2**20:.0f}",
                f"{row['peak_measured_bytes'] / 2**20:.0f}",
                percent(row["peak_error"]),
                *(percent(row["error"][stage]) for stage in STAGES),
            ]
        )
    where = check["environment"]
    packages = ", ".join(f"{name} {where['versions'][name]}" for name in PACKAGES if name in where["versions"])
    source = (
        "MiB above the baseline; error: of the peak, then of each stage. "
        f"{where['device']}; 1 thread per rank; {packages}; {provenance(where, [r['commit'] for r in check['rows']])}; "
        "every number: "
        f"[{CHECK_JSON.name}](../bench/results/{CHECK_JSON.name})."
    )
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", source])


def check_summary(check: Mapping[str, Any]) -> str:
    """The README's sentence."""
    errors = sorted(abs(row["peak_error"]) for row in check["rows"])
    held_out = [abs(row["peak_error"]) for row in check["rows"] if row["held_out"]]
    stages = [(abs(row["error"][stage]), f"{stage}, {row['dtype']}") for row in check["rows"] for stage in STAGES]
    worst, where = max(stages)
    return (
        f"Against {len(errors)} measured runs on a CPU the predicted peak is off by {100 * median(errors):.1f} % in "
        f"the median and {100 * errors[-1]:.1f} % at most (in the {len(held_out)} first run after the model was "
        f"finished: {100 * max(held_out):.1f} %), single stages by {100 * worst:.0f} % at most ({where}) "
        f"([docs/plan.md](docs/plan.md), [plan_check.json](bench/results/plan_check.json)); no GPU was measured."
    )


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def provenance(where: Mapping[str, Any], commits: Sequence[str | None] = ()) -> str:
    """Commit, day and command of an `environment`.

    commits: of the measurements, where they can differ from the environment's.
    """
    used = sorted({sha or "unknown" for sha in commits or [where["git_sha"]]})
    short = ", ".join(f"`{sha[:9]}{'+' if sha.endswith('+') else ''}`" for sha in used)
    label = "commits" if len(used) > 1 else "commit"
    return f"{label} {short}; {where['started'][:10]}; `{where['command']}`"


def qwen_rows(qwen: Mapping[str, Any]) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Number of teachers -> what was asked for -> the plan."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in qwen["rows"]:
        found.setdefault(row["teachers"], {})[row["asked"]] = row
    return found


def qwen_block(qwen: Mapping[str, Any], link: str) -> str:
    """Peak and step time by number of teachers and placement."""
    first, where = qwen["rows"][0], qwen["environment"]
    work, speed = first["work"], first["speed"]
    more = _per_teacher(qwen_rows(qwen), "resident")
    kinds = ("resident", "sharded", "offload")
    head = ["teachers", *(f"all {kind}" for kind in kinds), "resident, float32 logits", "recommended"]
    lines = [head, ["---:", *["---:"] * len(kinds), "---:", "---"]]
    for teachers, plans in qwen_rows(qwen).items():
        lines.append(
            [
                str(teachers),
                *(_cell(plans[kind]) for kind in kinds),
                f"{_gb(plans['resident']['memory']['resident_and_logits_peak_bytes'])} GB",
                f"{_kinds(plans['auto'])}: {_cell(plans['auto'])}",
            ]
        )
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"**Predictions**, not measurements: peak of one rank and time of one step (bold: does not fit) of "
            f"`{first['config']}` on {first['ranks']} × {first['gpu']} with {_gb(first['gpu_memory_bytes'])} GB; mean "
            f"prompt {work['prompt_tokens']:g} and response {work['response_tokens']:g} tokens, "
            f"{work['sequences']} sequences per rank and step; a reference beside the teachers; "
            f"{speed['compute_share']:.0%} of the compute, {speed['hbm_share']:.0%} of the memory's and "
            f"{speed['link_share']:.0%} of the links' peak; {provenance(where)}; every number: "
            f"[{Path(link).name}]({link}).",
            "",
            'The column "resident, float32 logits" is the conventional way: every model resident, and the logits of '
            f"the same micro-batches materialised. One more resident teacher is predicted to take {_gb(more.size)} GB "
            f"and {100 * more.share:.1f} % of a step; the TC-OPD paper reports 8.2 GB and 3.5 %.",
        ]
    )


def _cell(plan: Mapping[str, Any]) -> str:
    text = f"{_gb(plan['memory']['peak_bytes'])} GB, {plan['step_seconds']:.0f} s"
    return text if plan["fits"] else f"**{text}**"


def _kinds(plan: Mapping[str, Any]) -> str:
    kinds = [model["placement"] for model in plan["placements"]]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def qwen_summary(qwen: Mapping[str, Any]) -> str:
    """The README's sentences."""
    plans = qwen_rows(qwen)
    counts = [count for count in plans if count > 1]
    first = qwen["rows"][0]
    extra = {kind: _per_teacher(plans, kind) for kind in ("resident", "sharded", "offload")}
    pinned = extra["offload"].host
    text = "; ".join(
        f"{count} teachers: {_gb(plans[count]['auto']['memory']['peak_bytes'])} GB per GPU with "
        f"{_kinds(plans[count]['auto'])} (all resident {_gb(plans[count]['resident']['memory']['peak_bytes'])}, "
        f"with float32 logits {_gb(plans[count]['resident']['memory']['resident_and_logits_peak_bytes'])})"
        for count in counts
    )
    costs = ", ".join(f"{kind} {_gb(more.size)} GB and {100 * more.share:.1f} %" for kind, more in extra.items())
    return (
        f"**Predicted, not measured:** Qwen3-4B (`{first['config']}`) on {first['ranks']} × "
        f"{_gb(first['gpu_memory_bytes'])} GB. {text}. Each further teacher of that size costs, in memory of a GPU and "
        f"share of a step with one teacher: {costs} (and {_gb(pinned)} GB of pinned host memory per machine). "
        "([plan_qwen3_4b.json](bench/results/plan_qwen3_4b.json))"
    )


class More(NamedTuple):
    """What one more teacher adds: bytes of a rank, share of the step with the fewest teachers, host bytes."""

    size: float
    share: float
    host: float


def _per_teacher(plans: Mapping[int, Mapping[str, Mapping[str, Any]]], kind: str) -> More:
    """The mean between the fewest teachers and the most."""
    few, many = min(plans), max(plans)
    before, after = plans[few][kind], plans[many][kind]
    size, host = (
        (after["memory"][name] - before["memory"][name]) / (many - few) for name in ("peak_bytes", "host_bytes")
    )
    return More(size, (after["step_seconds"] - before["step_seconds"]) / (many - few) / before["step_seconds"], host)
