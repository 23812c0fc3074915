"""Time, memory and error of the head kernels beside plain torch and peers, on the same inputs.

    python bench/kernel_bench.py [--json OUT] [--shapes tiny|small|full] [--rounds R] [--providers A,B] [--budget-s S]

Cases: token logprobs (forward; forward and backward with a fixed random gradient per token), the policy loss
(forward; forward and backward), and logprobs of K = 1, 2, 4 frozen teachers. On a CPU also the policy loss, forward
and backward, on peaked distributions of mean entropy 0.5 and 3 nats (see peaked_inputs); ours_torch_tol is
ours_torch with grad_tol 2⁻⁸. Every round calls each provider once, in rotating order, together with one bare GEMM
hidden @ weightᵀ; `ratio` is the median over the rounds of a call's time in units of that round's GEMM ("G"). First
calls (compilation, tuning) are reported apart. Errors are against float64 on all tokens. Memory is what a call takes
above its inputs, results included, in a fresh process: per provider on a GPU (allocator peak after one warm call,
largest N), per call on a CPU (peak resident size). Clock: CUDA events on a GPU; on one CPU thread its CPU time, which
other work on the machine hardly touches; else wall time. The JSON names it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from tcopd_kernels import linear_logprob, linear_tcopd_loss, multi_linear_logprob, reference, tcopd_policy_loss
from torch.utils.checkpoint import checkpoint

from tcopd_fast.rundir import environment

SHAPES_NVD = {
    "tiny": [(64, 1000, 32)],
    "small": [(512, 32000, 256), (255, 151936, 128)],
    "full": [(N, V, D) for N in (8192, 2048) for V, D in ((151936, 1024), (151936, 2560), (128256, 4096))],
}
LOGIT_STD = 2.0
EXACT_CHUNK = 1024
GEMM = "gemm"
OURS = ("ours_torch", "ours_torch_tol", "ours_triton")
GRAD_TOL = 2.0**-8
# Mean entropy in nats of the cases on peaked inputs.
ENTROPY_OF = {"loss_low_entropy": 0.5, "loss_high_entropy": 3.0}
PACKAGE_OF = {"liger": "liger-kernel", "cce_exact": "cut-cross-entropy", "cce_torch_compile": "cut-cross-entropy"}
# Peaks of at most this many providers fit one GPU together.
MEMORY_PROCESSES = 3

Shape = tuple[int, int, int]
Logprob = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """One problem: N tokens, V vocabulary, D hidden; per-token vectors are fp32 [N]."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [N]
    upstream: torch.Tensor  # [N] gradient of the logprobs
    advantage: torch.Tensor
    old_logprob: torch.Tensor
    weights: torch.Tensor
    teacher_hiddens: tuple[torch.Tensor, ...]
    teacher_weights: tuple[torch.Tensor, ...]


class Provider(NamedTuple):
    """Three ways to run one implementation: logprobs [N], the policy loss, logprobs [K, N] of frozen models."""

    logprob: Logprob
    loss: Callable[[Inputs, torch.Tensor, torch.Tensor], torch.Tensor]
    teachers: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def make_inputs(shape: Shape, device: torch.device, teachers: int) -> Inputs:
    """Random inputs, the same in every process; logits have standard deviation LOGIT_STD."""
    N, V, D = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # In place: a temporary would raise the peak that the memory measurement starts from.
        return torch.empty(*size, device=device, dtype=dtype).normal_(generator=gen).mul_(scale)

    hidden, weight = normal(N, D, dtype=dtype), normal(V, D, scale=LOGIT_STD / D**0.5, dtype=dtype)
    targets = torch.randint(0, V, (N,), generator=gen, device=device)
    target_logit = (hidden.float() * weight[targets].float()).sum(1)
    lse = math.log(V) + LOGIT_STD**2 / 2 * hidden.float().square().mean(1)  # expected, for Gaussian logits
    # Ratios near 1 and outside the clip range, none at its edges, where rounding would decide the gradient.
    offset = 0.6 * torch.randint(-1, 2, (N,), generator=gen, device=device)
    vectors = normal(N), normal(N), target_logit - lse + offset, torch.full((N,), 1 / N, device=device)
    hiddens = tuple(normal(N, D, dtype=dtype) for _ in range(teachers))
    heads = tuple(normal(V, D, scale=LOGIT_STD / D**0.5, dtype=dtype) for _ in range(teachers))
    return Inputs(hidden, weight, targets, *vectors, hiddens, heads)


@torch.no_grad()
def peaked_inputs(x: Inputs, entropy: float) -> Inputs:
    """On-policy problem whose distributions have the given mean entropy in nats and tails like a language model's.

    Logits are a Zipf prior −1.5·log(rank), Gaussian noise of 1.5, and for one random token per row so much more that
    its odds against all others are normal around a common level, which bisection finds, with deviation 2. At 0.5
    nats about one row in ten has over 1.2, at 3 nats over 4. Targets are sampled; old_logprob is the policy's own.
    """
    N, V = len(x.hidden), len(x.weight)
    gen = torch.Generator(x.hidden.device).manual_seed(1)
    weight, content = x.weight / LOGIT_STD, x.hidden * 1.5
    weight[:, 0] = -1.5 / 16 * torch.arange(1, V + 1, device=weight.device).log()
    content[:, 0] = 16.0
    favoured = torch.randint(0, V, (N,), generator=gen, device=weight.device)
    direction = weight[favoured].index_fill(1, torch.zeros(1, dtype=torch.long, device=weight.device), 0.0)
    direction /= direction.square().sum(1, keepdim=True)
    lift = 2.0 * torch.randn(N, generator=gen, device=weight.device)
    lift -= linear_logprob(content, weight, favoured, backend="torch").logprob
    low, high = -15.0, 20.0
    for _ in range(12):
        level = (low + high) / 2
        hidden = content + (lift + level).unsqueeze(1) * direction
        found = linear_logprob(hidden, weight, favoured, entropy=True, backend="torch").entropy
        low, high = (level, high) if found is not None and found.mean() > entropy else (low, level)
    chunks = hidden.split(64)
    targets = [torch.multinomial(torch.softmax(h @ weight.T, 1), 1, generator=gen).squeeze(1) for h in chunks]
    old = linear_logprob(hidden, weight, torch.cat(targets), backend="torch").logprob
    return replace(x, hidden=hidden, weight=weight, targets=torch.cat(targets), old_logprob=old)


def inputs_of(case: str, x: Inputs) -> Inputs:
    return peaked_inputs(x, ENTROPY_OF[case]) if case in ENTROPY_OF else x


def materialised_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What trainers without a fused head do: logits in the input's dtype, log_softmax in fp32."""
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float(), dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def exact_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 by the plain definition, in row chunks whose logits are recomputed in the backward."""

    def chunk(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return reference.linear_logprob(h, w, t).logprob

    w = weight.double()
    parts = zip(hidden.double().split(EXACT_CHUNK), targets.split(EXACT_CHUNK))
    return torch.cat([checkpoint(chunk, h, w, t, use_reentrant=False) for h, t in parts])


def provider_of(logprob: Logprob, transform: Callable[[Callable], Callable] = lambda function: function) -> Provider:
    """A provider of which only the logprob function exists; the loss and the teachers are built on it."""

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return head_loss(hidden, weight, x.targets, x.advantage, x.old_logprob, x.weights)

    @transform
    def head_loss(hidden, weight, targets, advantage, old_logprob, weights):
        token_logprob = logprob(hidden, weight, targets)
        return tcopd_policy_loss(token_logprob, advantage, old_logprob=old_logprob, weights=weights)[0]

    def teachers(hiddens, heads, targets):
        return torch.stack([alone(h, w, targets) for h, w in zip(hiddens, heads)])

    alone = transform(logprob)
    return Provider(alone, loss, teachers)


def our_provider(backend: str, grad_tol: float = 0.0) -> Provider:
    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_tcopd_loss(
            hidden, weight, x.targets,
            advantage=x.advantage, old_logprob=x.old_logprob, weights=x.weights,
            grad_tol=grad_tol, backend=backend,
        )[0]  # fmt: skip

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_logprob(hidden, weight, targets, grad_tol=grad_tol, backend=backend).logprob

    return Provider(
        logprob,
        loss,
        partial(multi_linear_logprob, backend=backend),
    )


def liger_provider() -> Provider:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return provider_of(lambda h, w, t: -liger_fused_linear_cross_entropy(h, w, t, reduction="none"))


def cce_provider(impl: str) -> Provider:
    """Without gradient filtering: random weights give probabilities so small that all blocks would be skipped."""
    from cut_cross_entropy import linear_cross_entropy

    return provider_of(lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", impl=impl, filter_eps=None))


EXACT = provider_of(exact_logprob)
PROVIDERS: dict[str, Callable[[], Provider]] = {
    "eager": lambda: provider_of(materialised_logprob),
    "compile": lambda: provider_of(materialised_logprob, partial(torch.compile, dynamic=False)),
    "ours_torch": lambda: our_provider("torch"),
    "ours_torch_tol": lambda: our_provider("torch", GRAD_TOL),
    "ours_triton": lambda: our_provider("triton"),
    "liger": liger_provider,
    "cce_exact": lambda: cce_provider("cce"),
    "cce_torch_compile": lambda: cce_provider("torch_compile"),
}


def available_providers(device: torch.device) -> list[str]:
    """All whose package is installed on a GPU; on a CPU compiling would outlast the measurement."""
    if device.type != "cuda":
        return ["eager", "ours_torch", "ours_torch_tol"]
    return [name for name in PROVIDERS if installed(name) and name != "ours_torch_tol"]


def available_cases(device: torch.device) -> list[str]:
    """The Triton kernels do not use grad_tol, so peaked inputs would tell nothing new on a GPU."""
    return [case for case in CASES if device.type != "cuda" or case not in ENTROPY_OF]


def installed(provider: str) -> bool:
    return provider not in PACKAGE_OF or any(importlib.metadata.distributions(name=PACKAGE_OF[provider]))


@torch.no_grad()
def logprob_forward(p: Provider, x: Inputs) -> Results:
    return {"logprob": p.logprob(x.hidden, x.weight, x.targets)}


def logprob_forward_backward(p: Provider, x: Inputs) -> Results:
    leaves = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    logprob = p.logprob(*leaves, x.targets)
    grads = torch.autograd.grad(logprob, leaves, x.upstream.to(logprob.dtype))
    return {"logprob": logprob.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]}


@torch.no_grad()
def loss_forward(p: Provider, x: Inputs) -> Results:
    return {"loss": p.loss(x, x.hidden, x.weight)}


def loss_forward_backward(p: Provider, x: Inputs) -> Results:
    leaves = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    loss = p.loss(x, *leaves)
    grads = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]}


@torch.no_grad()
def teachers_forward(p: Provider, x: Inputs, K: int) -> Results:
    return {"logprob": p.teachers(x.teacher_hiddens[:K], x.teacher_weights[:K], x.targets)}


CASES: dict[str, Callable[[Provider, Inputs], Results]] = {
    "logprob_forward": logprob_forward,
    "logprob_forward_backward": logprob_forward_backward,
    "loss_forward": loss_forward,
    "loss_forward_backward": loss_forward_backward,
    "loss_low_entropy": loss_forward_backward,
    "loss_high_entropy": loss_forward_backward,
    **{f"teachers_{K}": partial(teachers_forward, K=K) for K in (1, 2, 4)},
}
# Their memory costs a process each on a CPU, and compiling on a GPU.
MEMORY_CASES = ("logprob_forward", "logprob_forward_backward", "loss_forward_backward")


def teachers_of(case: str) -> int:
    return int(case.removeprefix("teachers_")) if case.startswith("teachers_") else 0


def bare_gemm(x: Inputs) -> torch.Tensor:
    return x.hidden @ x.weight.T


def clock_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA events"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall"


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        call()
        return clock() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def errors_of(found: Results, exact: Results) -> dict[str, float]:
    """Largest absolute error; that of a gradient relative to its largest element."""
    out = {}
    for name, value in exact.items():
        error = (found[name].double() - value).abs().amax()
        out[f"{name}_max_error"] = (error / value.abs().amax() if name.startswith("grad_") else error).item()
    return out


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measure_case(
    case: str, providers: dict[str, Provider], x: Inputs, rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Fields of the report per provider; a provider that raises is reported with its error and left out."""
    run = CASES[case]
    doubled = {name: getattr(x, name).double() for name in ("hidden", "weight", "advantage", "old_logprob", "weights")}
    exact = run(EXACT, replace(x, **doubled))
    del doubled
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {GEMM: partial(bare_gemm, x)}
    for name, provider in providers.items():
        call = partial(run, provider, x)
        try:
            first = seconds_of(call, device)
            rows[name] = {"first_call_s": first, **errors_of(call(), exact)}
            calls[name] = call
        # Peers fail in their own ways (an unsupported shape or version, memory), and one must not stop the others.
        except Exception as error:
            rows[name] = {"error": summary(error)}
    del exact
    calls[GEMM]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        first_at = turn % len(names)
        for name in names[first_at:] + names[:first_at]:
            times[name].append(seconds_of(calls[name], device))
    for name, seconds in times.items():
        ratio = statistics.median(s / unit for s, unit in zip(seconds, times[GEMM]))
        timing = {"median_s": statistics.median(seconds), "ratio": ratio, "rounds_s": seconds}
        rows[name] = rows.get(name, {}) | timing
    return rows


def peak_of(provider: Provider, shape: Shape, case: str, device: torch.device) -> dict[str, Any]:
    """Bytes above the inputs at the peak of one call in this process, and those of the results alone."""
    torch.compiler.reset()
    x = make_inputs(shape, device, teachers_of(case))
    run = CASES[case]
    if device.type == "cuda":
        run(provider, x)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(provider, x)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = psutil.Process().memory_info().rss
        results = run(provider, x)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak_bytes": peak, "result_bytes": sum(value.numel() * value.itemsize for value in results.values())}


def measure_memory(name: str, jobs: Sequence[tuple[Shape, str]], device: torch.device) -> list[dict[str, Any]]:
    """peak_of for each (shape, case), or its error."""
    provider = PROVIDERS[name]()
    rows = []
    for shape, case in jobs:
        try:
            found = peak_of(provider, shape, case, device)
        except Exception as error:
            found = {"error": summary(error)}
        rows.append({"shape": list(shape), "case": case, "provider": name, **found})
    return rows


def memory_in_fresh_processes(names: Sequence[str], shapes: str, device: torch.device) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    most = max(N for N, _, _ in SHAPES_NVD[shapes])
    jobs = [(s, case) for s in SHAPES_NVD[shapes] if s[0] == most or not cuda for case in MEMORY_CASES]
    groups = [jobs] if cuda else [[job] for job in jobs]
    work = [(name, group) for name in names for group in groups]

    def child(item: tuple[str, list]) -> list[dict[str, Any]]:
        command = [sys.executable, __file__, "--memory-of", item[0], "--jobs", json.dumps(item[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return [{"shape": list(s), "case": c, "provider": item[0], "error": message[:300]} for s, c in item[1]]
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(MEMORY_PROCESSES if cuda else 1) as pool:
        return [row for rows in pool.map(child, work) for row in rows]


def measure(
    names: Sequence[str], shapes: str, rounds: int, deadline: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row per (shape, case, provider). Cases that would begin after the deadline give a row saying so."""
    providers = {name: PROVIDERS[name]() for name in names}
    for shape in SHAPES_NVD[shapes]:
        # Compiled code is kept per function, and only so much of it, before torch falls back to eager.
        torch.compiler.reset()
        x = None
        N, V, D = shape
        for case in available_cases(device):
            head = {"case": case, "N": N, "V": V, "D": D, "fp32_logits_bytes": N * V * 4}
            if time.monotonic() > deadline:
                yield head | {"skipped": "time budget spent"}
                continue
            x = x or make_inputs(shape, device, max(map(teachers_of, CASES)))
            for name, row in measure_case(case, providers, inputs_of(case, x), rounds, device).items():
                yield head | {"provider": name, "dtype": str(x.hidden.dtype).removeprefix("torch.")} | row


def print_row(row: dict[str, Any]) -> None:
    where = f"{row['case']:25} {row['N']:5}x{row['V']}x{row['D']:<5}"
    if "skipped" in row:
        print(f"{where} skipped: {row['skipped']}", flush=True)
        return
    where += f" {row['provider']:18}"
    if "error" in row:
        print(f"{where} failed: {row['error']}", flush=True)
        return
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-"
    memory = f"{peak:>9} {row['fp32_logits_bytes'] / 2**20:7.0f}"
    errors = " ".join(f"{key.removesuffix('_max_error')} {row[key]:.1e}" for key in row if key.endswith("_max_error"))
    print(f"{where} {row['median_s'] * 1e3:9.2f} {row['ratio']:6.2f} {memory}  {errors}", flush=True)


def run_benchmark(args: argparse.Namespace, device: torch.device) -> int:
    began = time.monotonic()
    names = args.providers.split(",") if args.providers else available_providers(device)
    memory = memory_in_fresh_processes(names, args.shapes, device)
    by_key = {(*row["shape"], row["case"], row["provider"]): row for row in memory}
    print(f"{'case':25} {'NxVxD':>17} {'provider':18} {'ms':>9} {'xG':>6} {'peak MiB':>9} {'logits':>7}  max error")
    rows = []
    for row in measure(names, args.shapes, args.rounds, began + args.budget_s, device):
        peak = by_key.get((row["N"], row["V"], row["D"], row["case"], row.get("provider")), {})
        row |= {key: value for key, value in peak.items() if key in ("peak_bytes", "result_bytes")}
        if "error" in peak:
            row["memory_error"] = peak["error"]
        print_row(row)
        rows.append(row)
    if args.json:
        about = environment(0)
        about["git_sha"] = about["git_sha"] or os.environ.get("GIT_SHA")
        about["command"] = " ".join(["python bench/kernel_bench.py", *sys.argv[1:]])
        about["versions"] |= {p: importlib.metadata.version(p) for n, p in PACKAGE_OF.items() if installed(n)}
        run = {"clock": clock_of(device), "rounds": args.rounds, "load_average": os.getloadavg()[0]}
        run["seconds"] = time.monotonic() - began
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, **run, "rows": rows}, indent=1) + "\n")
    broken = [row for row in rows if row.get("provider") in OURS and ("error" in row or "memory_error" in row)]
    return int(bool(broken) or not any("ratio" in row for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON")
    parser.add_argument("--shapes", choices=SHAPES_NVD, default="full" if cuda else "small")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5)
    parser.add_argument("--providers", metavar="A,B", help=f"of {', '.join(PROVIDERS)} (default: all that run here)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no case later than this")
    parser.add_argument("--memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, [(tuple(s), c) for s, c in args.jobs], device)))
        return 0
    for name in args.providers.split(",") if args.providers else ():
        if name not in PROVIDERS:
            parser.error(f"--providers: unknown {name!r}; known are {', '.join(PROVIDERS)}")
        if not installed(name):
            parser.error(f"--providers: {name} needs the package {PACKAGE_OF[name]}; install it or leave {name} out")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    return run_benchmark(args, device)


if __name__ == "__main__":
    sys.exit(main())
