"""Every kernel of tcopd_kernels through Triton's real compiler and launcher, on a stand-in driver, without a GPU.

    PYTHONPATH=kernels python bench/launches.py [--arch 80|90|100] [--quick] [--json OUT]

bench/offline_compile.py compiles variants that it describes itself. Here the public functions are called, so that
each kernel is compiled for the arguments that a call really has, with every tile that would be timed: sizes of 1,
ragged and aligned sizes, three dtypes, masks, both load paths, a row stride of 2^24 elements, a process group, the
compacted backward. Nothing runs, so results are not looked at; tests/gpu does that. Status 1 if a call fails or a
kernel of the package is never launched.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import stand_in_gpu
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# N, V, D. Aligned rows take TMA on sm_90; an odd width takes pointers.
SIZES = ((1, 1, 1), (1, 1000, 64), (13, 4099, 72), (64, 1024, 128), (300, 4099, 101), (515, 5000, 256))
QUICK = ((1, 1000, 64), (300, 4099, 128))
EVERYTHING: dict[str, Any] = {"temperature": 0.7, "softcap": 10.0, "entropy": True, "bias": True}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"entropy": True}, {"grad_tol": 2.0**-8}, EVERYTHING)
Case = tuple[str, Callable[[], Any]]


def head(n: int, vocab: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [n, dim] and weight [vocab, dim], which want gradients, and targets [n] with a masked row."""
    hidden = torch.ones(n, dim, dtype=dtype, requires_grad=True)
    weight = torch.ones(vocab, dim, dtype=dtype, requires_grad=True)
    targets = torch.arange(n) % vocab
    targets[n // 2 : n // 2 + n // 3] = -100
    return hidden, weight, targets


def train(size: Sequence[int], dtype: torch.dtype, bias: bool = False, **options: Any) -> None:
    """Token logprobs, forward and backward."""
    from tcopd_kernels import linear_logprob

    hidden, weight, targets = head(*size, dtype)
    out = linear_logprob(
        hidden, weight, targets, bias=torch.ones(size[1], dtype=dtype, requires_grad=True) if bias else None,
        backend="triton", **options,
    )  # fmt: skip
    total = out.logprob.sum() + (out.entropy.sum() if out.entropy is not None else 0.0)
    total.backward()


def loss(size: Sequence[int], dtype: torch.dtype, bias: bool = False, **options: Any) -> None:
    from tcopd_kernels import linear_tcopd_loss

    hidden, weight, targets = head(*size, dtype)
    ones = torch.ones(size[0])
    value, *_ = linear_tcopd_loss(
        hidden, weight, targets, advantage=ones, old_logprob=ones, weights=ones, backend="triton",
        bias=torch.ones(size[1], dtype=dtype, requires_grad=True) if bias else None, **options,
    )  # fmt: skip
    value.backward()


def frozen_heads(size: Sequence[int], dtype: torch.dtype, models: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """hiddens and weights of models of unequal widths."""
    n, vocab, dim = size
    heads = [head(n, vocab, dim * (1 + m % 2), dtype) for m in range(models)]
    return [h.detach() for h, _, _ in heads], [w.detach() for _, w, _ in heads]


def several(size: Sequence[int], dtype: torch.dtype, models: int, launch: str, full: bool = False) -> None:
    from tcopd_kernels import multi_linear_logprob

    hiddens, weights = frozen_heads(size, dtype, models)
    options: dict[str, Any] = {}
    if full:
        options = {"biases": [torch.ones(size[1], dtype=dtype)] * models, "softcaps": [10.0] * models}
    multi_linear_logprob(hiddens, weights, head(*size, dtype)[2], backend="triton", launch=launch, **options)


def step(size: Sequence[int], dtype: torch.dtype, teachers: int, launch: str, **options: Any) -> None:
    from tcopd_kernels import linear_tcopd_step

    hidden, weight, targets = head(*size, dtype)
    hiddens, weights = frozen_heads(size, dtype, teachers + 1)
    ones = torch.ones(size[0])
    value, *_ = linear_tcopd_step(
        hidden, weight, targets, hiddens[0], weights[0], hiddens[1:], weights[1:], [1.5, -0.5, 1.0][:teachers],
        weights=ones, old_logprob=ones, rollout_logprob=ones, backend="triton", launch=launch, **options,
    )  # fmt: skip
    value.backward()


def whole_vocabulary(size: Sequence[int], dtype: torch.dtype, teachers: int, **options: Any) -> None:
    from tcopd_kernels import full_vocab_tcopd_loss

    hidden, weight, _ = head(*size, dtype)
    hiddens, weights = frozen_heads(size, dtype, teachers + 1)
    value, *_ = full_vocab_tcopd_loss(
        hidden, weight, hiddens[0], weights[0], hiddens[1:], weights[1:], [1.5, -0.5][:teachers],
        weights=torch.ones(size[0]), normalizer="none", backend="triton", **options,
    )  # fmt: skip
    value.backward()


def far_rows(dtype: torch.dtype) -> None:
    """A row stride of 2^24 elements: the last rows of the weight lie past 2^31. Memory is reserved, not used."""
    from tcopd_kernels import linear_logprob

    weight = torch.empty_strided((200, 64), (2**24, 1), dtype=dtype)
    linear_logprob(torch.ones(17, 64, dtype=dtype), weight, torch.zeros(17, dtype=torch.long), backend="triton")


def cases(sizes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> Iterator[Case]:
    """(name, call) of every function with its options, for each dtype and size."""
    for name in dtypes:
        dtype = DTYPES[name]
        for size in sizes:
            at = f"{name} {'x'.join(map(str, size))}"
            for options in OPTIONS:
                yield f"logprob {at} {sorted(options)}", partial(train, size, dtype, **options)
                yield f"loss {at} {sorted(options)}", partial(loss, size, dtype, **options)
            for launch in ("joint", "separate"):
                yield f"several {at} {launch}", partial(several, size, dtype, 3, launch)
                yield f"step {at} {launch}", partial(step, size, dtype, 2, launch)
            yield f"several {at} with biases and soft-caps", partial(several, size, dtype, 2, "joint", full=True)
            for teachers in (1, 2):
                yield f"whole vocabulary {at} {teachers}", partial(whole_vocabulary, size, dtype, teachers)
            compacted = partial(whole_vocabulary, size, dtype, 2, grad_tol=2.0**-6, temperature=0.7, softcap=8.0)
            yield f"whole vocabulary {at} compacted", compacted
            shard = partial(train, size, dtype, process_group=torch.distributed.group.WORLD, entropy=True)
            yield f"shard {at}", shard
        yield f"far rows {name}", partial(far_rows, dtype)


def package_kernels() -> set[str]:
    """Module and name of every Triton function of the package that is launched (and not only called by another)."""
    from triton.runtime.jit import JITFunction

    return {
        f"{value.fn.__module__}.{value.fn.__name__}"
        for name, module in sys.modules.items()
        if name.startswith("tcopd_kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
    }


def run(arch: int, quick: bool) -> dict[str, Any]:
    stand_in = stand_in_gpu.install(arch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    began, failures, calls = time.monotonic(), {}, 0
    for fill in (0.0, 1.0):
        for name, call in cases(QUICK if quick else SIZES, ["bf16"] if quick else list(DTYPES)):
            calls += 1
            try:
                with stand_in.listening(name), stand_in_gpu.filled(fill):
                    call()
            # Whatever goes wrong is the finding; the other calls are to be seen too.
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
                print(f"FAILED {name}", file=sys.stderr)
                traceback.print_exc(limit=-6)
    torch.distributed.destroy_process_group()
    launches, compiled = stand_in.launches(), stand_in.compiled
    return {
        "arch": arch, "calls": calls, "failures": failures, "launches": len(launches),
        "launched": dict(Counter(launch["kernel"] for launch in launches)),
        "never_launched": sorted(package_kernels() - stand_in.functions), "compiled": len(compiled),
        "spilling": [found for found in compiled if found["spill_bytes"]],
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=stand_in_gpu.LIMITS, default=90)
    parser.add_argument("--quick", action="store_true", help="bfloat16 and two sizes: the paths that are hot")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    args = parser.parse_args()
    found = run(args.arch, args.quick)
    import triton

    print(
        f"sm_{args.arch}, triton {triton.__version__}, torch {torch.__version__}: {found['calls']} calls, "
        f"{found['compiled']} compilations, {found['launches']} launches of {len(found['launched'])} kernels, "
        f"{len(found['failures'])} failures, {len(found['spilling'])} compilations that spill, {found['seconds']} s"
    )
    for name, reason in found["failures"].items():
        print(f"  {name}: {reason}")
    for name in found["never_launched"]:
        print(f"  never launched: {name}")
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
        about = {
            "device": "stand-in driver, no GPU", "triton": triton.__version__, "torch": torch.__version__,
            "python": sys.version.split()[0], "commit": commit or os.environ.get("GIT_SHA"),
            "command": " ".join(["python", "bench/launches.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip
        args.json.write_text(json.dumps(about | found, indent=1) + "\n")
    return int(bool(found["failures"] or found["never_launched"]))


if __name__ == "__main__":
    sys.exit(main())
