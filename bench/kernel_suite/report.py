"""Markdown from the JSON that kernel_bench.py writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kernel_suite.cases import BACKWARD_CASES, CASES, MEMORY_CASES
from kernel_suite.providers import OURS, PROVIDERS

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
MISSING = "–"
MIB = 2**20
TITLES = {
    "gemm": "bare GEMM",
    "eager": "torch",
    "compile": "torch.compile",
    "torch_lce": "linear_cross_entropy",
    "liger": "Liger",
    "cce": "CCE",
    "cce_exact": "CCE exact",
    "cce_torch_compile": "CCE torch_compile",
    "trl": "TRL",
    "verl_torch": "verl torch",
    "verl_triton": "verl Triton",
    "quack": "QuACK",
    "ours_torch": "**ours**",
    "ours_torch_tol": "**ours, 2⁻⁸**",
    "ours_triton": "**ours**",
    "ours_triton_tol": "**ours, 2⁻⁸**",
}
CASE_TITLES = {
    "logprob_forward": "logprob, forward",
    "logprob_forward_backward": "logprob, forward + backward",
    "mean_forward_backward": "mean logprob, forward + backward",
    "loss_forward": "policy loss, forward",
    "loss_forward_backward": "policy loss, forward + backward",
    **{f"teachers_{K}": f"{K} frozen model{'s' * (K > 1)}, forward" for K in (1, 2, 4, 8)},
    "full_vocab_1": "whole vocabulary, 1 teacher",
    "full_vocab_2": "whole vocabulary, 2 teachers and reference",
}
SOURCE_TITLES = {
    "random": "random",
    "peaked_low": "synthetic, 0.5 nats",
    "peaked_high": "synthetic, 3 nats",
    "real_low": "real, low entropy",
    "real_high": "real, high entropy",
}

Row = Mapping[str, Any]


class Limits(NamedTuple):
    """What was asked for: times in G, factor over the fastest peer, share of the fp32 logits in memory."""

    forward: float
    tol: float
    exact: float
    speedup: float
    memory: float


CPU_LIMITS = Limits(1.25, 1.7, 3.4, 2.0, 0.05)
GPU_LIMITS = Limits(1.15, 1.6, 3.3, 1.3, 0.01)


class Run:
    """The rows of one JSON."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.rows: list[Row] = [row for row in data["rows"] if "provider" in row]
        sources = {row["source"] for row in self.rows}
        self.low = "real_low" if "real_low" in sources else "peaked_low"
        self.providers = [name for name in PROVIDERS if any(row["provider"] == name for row in self.rows)]
        self.exact = "ours_triton" if "ours_triton" in self.providers else "ours_torch"
        self.tol = f"{self.exact}_tol"
        self.limits = CPU_LIMITS if data["device"].startswith("CPU") else GPU_LIMITS

    def problems(self) -> list[tuple[str, int, int, int]]:
        return list(dict.fromkeys((row["source"], row["N"], row["V"], row["D"]) for row in self.rows))

    def find(self, key: str, **where: Any) -> dict[str, Any]:
        """{provider: row[key]} of the rows that have it and match."""
        return {
            row["provider"]: row[key]
            for row in self.rows
            if row.get(key) is not None and all(row[name] == value for name, value in where.items())
        }

    def fastest_peer(self, source: str, case: str) -> tuple[str, float] | None:
        """Name and time in G; None if no peer was measured."""
        ratios = self.find("ratio", source=source, case=case)
        peers = {name: ratio for name, ratio in ratios.items() if name not in OURS and name != "gemm"}
        return min(peers.items(), key=lambda peer: peer[1], default=None)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table whose first `left` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def shape_text(N: int, V: int, D: int) -> str:
    return f"{N} × {V} × {D}"


def source_title(run: Run, source: str) -> str:
    about = run.data.get("real_inputs")
    if not about or source not in about["problems"]:
        return SOURCE_TITLES[source]
    return f"real, {about['problems'][source]['mean_entropy']:.2f} nats"


def targets_table(run: Run) -> str:
    """What was asked for and what was measured; the worst of several measurements counts."""
    limits = run.limits
    forward = [r["ratio"] for r in run.rows if r["provider"] == run.exact and r["case"] == "logprob_forward"]
    ratios = [run.find("ratio", source=run.low, case=case) for case in BACKWARD_CASES]
    low = {name: [found[name] for found in ratios if name in found] for name in (run.exact, run.tol)}
    peers = [run.fastest_peer(run.low, case) for case in BACKWARD_CASES]
    factors = [peer[1] / ours for peer, ours in zip(peers, low[run.tol]) if peer]
    fastest = f" ({', '.join(TITLES[peer[0]] for peer in peers if peer)})"
    shares = [
        row["extra_bytes"] / row["fp32_logits_bytes"]
        for row in run.rows
        if "extra_bytes" in row and row["provider"] in (run.exact, run.tol)
    ]
    both = f"at {source_title(run, run.low)}, logprob and loss class"
    memory = f"{100 * min(shares):.1f} – {100 * max(shares):.1f} %" if shares else ""
    entries = [
        ("forward", f"≤ {limits.forward} G", forward, _two(forward, " G"), limits.forward),
        (f"forward + backward {both}, `grad_tol` 2⁻⁸", f"≤ {limits.tol} G", low[run.tol], _two(low[run.tol], " G"),
         limits.tol),
        (f"forward + backward {both}, exact", f"≤ {limits.exact} G", low[run.exact], _two(low[run.exact], " G"),
         limits.exact),
        (f"fastest peer ÷ ours (`grad_tol` 2⁻⁸) {both}", f"≥ {limits.speedup:g}", [-f for f in factors],
         _two(factors) + fastest, -limits.speedup),
        ("peak memory beside inputs and results, share of the fp32 logits", f"≤ {limits.memory:.0%}", shares, memory,
         limits.memory),
    ]  # fmt: skip
    rows = [
        (name, limit, text if values else "not measured", _verdict(values, most))
        for name, limit, values, text, most in entries
    ]
    return table(["target", "limit", "measured", "met"], rows)


def _verdict(values: Sequence[float], most: float) -> str:
    if not values:
        return MISSING
    return "yes" if max(values) <= most else "**no**"


def _two(values: Sequence[float], unit: str = "") -> str:
    return ", ".join(f"{value:.2f}" for value in values) + unit


def time_table(run: Run) -> str:
    """One row per case and inputs, one column per provider, in G."""
    head = ["inputs", "N × V × D", "case", *(TITLES[name] for name in run.providers)]
    rows = []
    for source, *shape in run.problems():
        for case in CASES:
            found = run.find("ratio", source=source, case=case, N=shape[0], V=shape[1], D=shape[2])
            if not found:
                continue
            peers = [ratio for name, ratio in found.items() if name != "gemm"]
            cells = [_bold(found.get(name), min(peers)) for name in run.providers]
            rows.append([source_title(run, source), shape_text(*shape), CASE_TITLES[case], *cells])
    return table(head, rows, left=3)


def _bold(value: float | None, best: float) -> str:
    if value is None:
        return MISSING
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def detail_table(run: Run, case: str) -> str:
    """Everything that was measured of one case at low entropy."""
    head = ["", "ms", "G", "G executed", "GFLOP/s needed", "GFLOP/s executed", "extra MiB", "in theory",
            "% of logits", "logprob or loss error", "dH error", "dW error"]  # fmt: skip
    rows = []
    for row in run.rows:
        if row["source"] != run.low or row["case"] != case or "ratio" not in row:
            continue
        one = 2 * row["N"] * row["V"] * row["D"]
        executed = row.get("executed_flop")
        speed = row.get("executed_tflop_per_s")
        extra, theory = row.get("extra_bytes"), row.get("theory_extra_bytes")
        value = row.get("logprob_max_error", row.get("loss_max_error"))
        rows.append(
            [
                TITLES[row["provider"]],
                f"{1e3 * row['median_s']:.0f}" if row["median_s"] > 0.1 else f"{1e3 * row['median_s']:.2f}",
                f"{row['ratio']:.2f}",
                MISSING if executed is None else f"{executed / one:.2f}",
                f"{1e3 * row['effective_tflop_per_s']:.0f}",
                MISSING if speed is None else f"{1e3 * speed:.0f}",
                *(MISSING if size is None else _mib(size) for size in (extra, theory)),
                MISSING if extra is None else f"{100 * extra / row['fp32_logits_bytes']:.1f}",
                *(MISSING if error is None else f"{error:.0e}" for error in (
                    value, row.get("grad_hidden_relative_error"), row.get("grad_weight_relative_error"))),
            ]
        )  # fmt: skip
    return table(head, rows)


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}" if size < 10 * MIB else f"{size / MIB:.0f}"


def memory_table(run: Run) -> str:
    """Peak beside inputs and results in MiB, with the theoretical figure in parentheses."""
    rows = []
    names = [n for n in run.providers if any(r["provider"] == n and "extra_bytes" in r for r in run.rows)]
    for source, *shape in run.problems():
        for case in MEMORY_CASES:
            where = {"source": source, "case": case, "N": shape[0], "V": shape[1], "D": shape[2]}
            found, theory = run.find("extra_bytes", **where), run.find("theory_extra_bytes", **where)
            if found:
                cells = [_with_theory(found.get(name), theory.get(name)) for name in names]
                logits = f"{4 * shape[0] * shape[1] / MIB:.0f}"
                rows.append([source_title(run, source), shape_text(*shape), CASE_TITLES[case], logits, *cells])
    head = ["inputs", "N × V × D", "case", "fp32 logits", *(TITLES[name] for name in names)]
    return table(head, rows, left=3)


def _with_theory(found: float | None, theory: float | None) -> str:
    if found is None:
        return MISSING
    return _mib(found) + ("" if theory is None else f" ({_mib(theory)})")


def certificate_table(run: Run) -> str:
    """What grad_tol left out."""
    rows = []
    for row in run.rows:
        if row["provider"] == run.tol and row.get("grad_row_count") and "grad_weight_relative_error" in row:
            kept = row["kept_column_sum"] / (row["grad_row_count"] * row["V"])
            dense = row["dense_row_count"] / row["grad_row_count"]
            shape = shape_text(row["N"], row["V"], row["D"])
            cells = [f"{100 * kept:.1f} %", f"{100 * dense:.1f} %", f"{row['dropped_mass_max']:.1e}"]
            errors = [f"{row[f'grad_{name}_relative_error']:.0e}" for name in ("hidden", "weight")]
            source = source_title(run, row["source"])
            rows.append([source, shape, CASE_TITLES[row["case"]], *cells, *errors])
    head = ["inputs", "N × V × D", "case", "logits kept", "tokens computed exactly", "largest mass dropped"]
    return table([*head, "dH error", "dW error"], rows, left=3)


def availability(run: Run) -> str:
    """Which implementation ran what, and why not."""
    rows = []
    for name, about in run.data["providers"].items():
        kinds: dict[str, dict[str, None]] = {}
        for case, offer in about["offers"].items():
            kinds.setdefault(offer, {})[case if case.startswith("full_vocab") else CASES[case].kind] = None
        without = [
            reason if len(set(about["offers"].values())) == 1 else f"{', '.join(found)}: {reason}"
            for reason, found in kinds.items()
            if reason != "runs"
        ]
        package = MISSING if about["package"] is None else f"{about['package']} {about['version'] or ''}".strip()
        rows.append([f"`{name}`", package, "; ".join(without) or "runs everything"])
    return table(["provider", "package", "not measured, and why"], rows, left=3)


def provenance(run: Run, source: str) -> str:
    data = run.data
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("python", "torch", "triton")
                         if name in data["versions"])  # fmt: skip
    sha = f"; commit `{data['git_sha'][:9]}{'+' if data['git_sha'].endswith('+') else ''}`" if data["git_sha"] else ""
    cpu = data["device"].startswith("CPU")
    device = f"{data['device']}, threads: {data['threads']}" if cpu else f"{data['device']}, driver {data['driver']}"
    dtype = run.rows[0]["dtype"]
    return (
        f"{device}, {dtype}; {versions}{sha}; {data['started'][:10]}; clock: {data['clock']}, median of "
        f"{data['rounds']} interleaved rounds; `{data['command']}`; every number: [{Path(source).name}]({source})."
    )


def real_text(run: Run) -> str:
    about = run.data.get("real_inputs")
    if not about:
        return ""
    parts = [
        f"sampled at temperature {p['sampling_temperature']:g} (mean entropy {p['mean_entropy']:.2f} nats, median "
        f"{p['median_entropy']:.2f}, mean logprob of the targets {p['mean_logprob']:.2f})"
        for p in about["problems"].values()
    ]
    model = f"`{about['model']['file']}` (package `{about['model']['package']}`)"
    return (
        f"Real inputs: last hidden states and head of {model} on its own text, {' and '.join(parts)}, all scored at "
        "temperature 1."
    )


def kernels_block(run: Run, results: str, figures: Sequence[str]) -> str:
    """The block of kernels/README.md. results: link to the JSON; figures: links to the plots."""
    unit = "One G is 2·N·V·D FLOP: one bare GEMM of the same round, hidden @ weightᵀ into a ready buffer."
    parts = [
        targets_table(run),
        f"**Time** in G. {unit} Bold: the fastest. {real_text(run)}".strip(),
        time_table(run),
        f"**At low entropy** ({source_title(run, run.low)}), logprob class. Errors against float64: largest absolute "
        "one of the logprobs, ‖Δ‖/‖·‖ of the gradients. Executed: counted at the matrix products where they can be "
        "seen, else from the algorithm.",
        detail_table(run, BACKWARD_CASES[0]),
        "Loss class:",
        detail_table(run, BACKWARD_CASES[1]),
        "**Peak memory** in MiB beside inputs and results, one call in a fresh process (in parentheses the figure that "
        "the algorithm implies):",
        memory_table(run),
        "**What `grad_tol` 2⁻⁸ left out:**",
        certificate_table(run),
        "**Who was measured:**",
        availability(run),
        provenance(run, results),
        *(f"![{alt}]({figure})" for alt, figure in zip(("Time in G", "Peak memory"), figures)),
    ]
    return "\n\n".join(parts)


def readme_block(run: Run, results: str, figures: Sequence[str]) -> str:
    """The short block of README.md."""
    note = "One G is the time of one bare GEMM of the head, 2·N·V·D FLOP, in the same run. More: "
    more = f"[kernels/README.md](kernels/README.md#numbers). {provenance(run, results)}"
    return "\n\n".join([targets_table(run), note + more, f"![Time in G]({figures[0]})"])


def insert(readme: Path, block: str) -> None:
    """Replaces what stands between the markers. Raises ValueError when they are not there exactly once."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: needs exactly one {BEGIN} and one {END}")
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{block}\n{END}", text, flags=re.DOTALL)
    partial = readme.with_name(readme.name + ".partial")
    partial.write_text(new, encoding="utf-8")
    os.replace(partial, readme)
