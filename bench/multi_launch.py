"""Log-probabilities of K frozen models: one Triton launch for all against one for each, over N and K.

    python bench/multi_launch.py [--json OUT] [--vocab V] [--dims D1,D2,…] [--rounds R] [--tiny]

Model k has the width dims[k mod len(dims)]. Every round calls both forms once, in changing order; a time is the
median over the rounds, from CUDA events, and so holds what the GPU waits for the host. `predicted` is what
launch="auto" goes by, `regret` what its choice costs over the faster form. The constants of that prediction
(tcopd_kernels/_launch_plan.py) come from data sheets: this is the measurement that they lack.

--tiny runs the same code on small sizes, on a CPU with the torch backend, or with Triton's interpreter where
TRITON_INTERPRET=1: its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_suite.measure import seconds_of
from tcopd_kernels import multi_linear_logprob
from tcopd_kernels._step_models import Model
from tcopd_kernels._triton_multi import predicted_launch_us

from tcopd_fast.rundir import environment

FORMS = ("joint", "separate")
TOKENS = (64, 256, 1024, 4096, 16384)
MODELS = (1, 2, 4, 8)
TINY = {"tokens": (16, 33), "models": (1, 3), "vocab": 100, "dims": (16, 24)}


def make_heads(
    n_models: int, tokens: int, vocab: int, dims: Sequence[int], device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """hiddens [tokens, D_k], weights [vocab, D_k] and targets [tokens]; logits have standard deviation 2."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(0)

    def normal(rows: int, dim: int, scale: float) -> torch.Tensor:
        return torch.empty(rows, dim, device=device, dtype=dtype).normal_(generator=gen).mul_(scale)

    widths = [dims[k % len(dims)] for k in range(n_models)]
    targets = torch.randint(0, vocab, (tokens,), generator=gen, device=device)
    return [normal(tokens, dim, 1.0) for dim in widths], [normal(vocab, dim, 2 / dim**0.5) for dim in widths], targets


def measure(
    hiddens: list[torch.Tensor], weights: list[torch.Tensor], targets: torch.Tensor, rounds: int, backend: str
) -> dict[str, Any]:
    """Median time of both forms, their largest difference in the results, and the prediction."""

    def call(form: str) -> torch.Tensor:
        return multi_linear_logprob(hiddens, weights, targets, launch=form, backend=backend)

    difference = (call("joint") - call("separate")).abs().max().item()  # also compiles, and chooses the tiles
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(rounds):
        for form in FORMS if turn % 2 else FORMS[::-1]:
            times[form].append(1e3 * seconds_of(lambda form=form: call(form), targets.device))
    median = {form: statistics.median(values) for form, values in times.items()}
    models = [Model(h, w) for h, w in zip(hiddens, weights, strict=True)]
    predicted_ms, chosen = predicted(models)
    return {
        "N": len(targets), "K": len(hiddens), "dims": [h.shape[1] for h in hiddens], "vocab": weights[0].shape[0],
        "joint_ms": median["joint"], "separate_ms": median["separate"],
        "joint_over_separate": median["joint"] / median["separate"],
        "predicted_joint_ms": predicted_ms[0], "predicted_separate_ms": predicted_ms[1], "auto": chosen,
        "regret": median[chosen] / min(median.values()) - 1, "largest_difference": difference,
    }  # fmt: skip


def predicted(models: list[Model]) -> tuple[tuple[float, float], str]:
    """Milliseconds (joint, separate), and the form that launch="auto" takes."""
    joint_us, separate_us, chosen = predicted_launch_us(models)
    return (1e-3 * joint_us, 1e-3 * separate_us), chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the table as JSON")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dims", type=lambda text: tuple(map(int, text.split(","))), default=(1024, 2560))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no CUDA device to measure on; --tiny runs the logic alone")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    sizes = TINY if args.tiny else {"tokens": TOKENS, "models": MODELS, "vocab": args.vocab, "dims": args.dims}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backend = "triton" if device.type == "cuda" or interpreted else "torch"
    heads = make_heads(max(sizes["models"]), max(sizes["tokens"]), sizes["vocab"], sizes["dims"], device)
    rows = []
    print(f"{'N':>6} {'K':>2} {'joint ms':>10} {'separate ms':>12} {'ratio':>6}  {'predicted':>9}  auto")
    for tokens in sizes["tokens"]:
        for n_models in sizes["models"]:
            hiddens = [hidden[:tokens] for hidden in heads[0][:n_models]]
            row = measure(hiddens, heads[1][:n_models], heads[2][:tokens], args.rounds, backend)
            rows.append(row)
            ratio = row["predicted_joint_ms"] / row["predicted_separate_ms"]
            print(
                f"{row['N']:6} {row['K']:2} {row['joint_ms']:10.3f} {row['separate_ms']:12.3f} "
                f"{row['joint_over_separate']:6.3f}  {ratio:9.3f}  {row['auto']}",
                flush=True,
            )
    if args.json:
        report = {"environment": environment(seed=0), "backend": backend, "tiny": args.tiny, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
