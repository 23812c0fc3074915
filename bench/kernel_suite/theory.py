"""What each implementation should cost, from its source: GEMMs executed and bytes beyond inputs and results.

N tokens, V vocabulary, D hidden, b bytes per input element, 4 bytes per fp32. A tile of logits [n, v] in fp32 is
4·n·v bytes. Vectors of N elements are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tcopd_kernels import _torch, _torch_compact, _torch_loss

from kernel_suite.cases import Case
from kernel_suite.inputs import Problem
from kernel_suite.peers import CPU_CHUNK_ROWS


def extra_bytes(provider: str, case: Case, problem: Problem, itemsize: int) -> float | None:
    """Peak bytes of workspace that the provider's algorithm needs beside inputs and results; None: not derived."""
    formula = _EXTRA.get(provider)
    return None if formula is None else formula(case, problem.N, problem.V, problem.D, itemsize)


def executed_gemms(provider: str, case: Case) -> float | None:
    """Head GEMMs where they cannot be counted (Triton); None where the work depends on the data."""
    if provider == "cce" and case.backward:
        return None
    recomputes = provider in ("cce_exact", "verl_triton")
    recomputes |= provider == "ours_triton" and case.kind in ("logprob", "full_vocab")
    return case.gemms + (recomputes and case.backward)


def plain_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Logits, their fp32 copy (half precision) and log_softmax; backward: the saved result and two gradients of it,
    or, when the results exist, the gradient of the logits."""
    logits = 4 * N * V
    if case.kind == "full_vocab":
        # The target, log_p, p and their difference, and three gradients.
        return max(7 * logits - result_bytes(N, V, D, b), b * N * V)
    if case.backward:
        return max(3 * logits - result_bytes(N, V, D, b), b * N * V)
    return b * N * V + (logits if b != 4 else 0) + logits


def compiled_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Reductions are fused into passes over the logits; backward: the logits kept, and their gradient."""
    frozen = case.frozen if case.kind == "full_vocab" else 0
    if case.backward:
        return max(b * N * V * (2 + frozen) - result_bytes(N, V, D, b), b * N * V)
    return b * N * V


def result_bytes(N: int, V: int, D: int, b: int) -> int:
    """The two gradients."""
    return b * (N + V) * D


def torch_lce_extra(case: Case, N: int, V: int, D: int, b: int) -> float | None:
    """One chunk of logits; half precision on a GPU has further buffers, which are not derived here."""
    return 4 * min(N, CPU_CHUNK_ROWS) * V if b == 4 else None


def verl_torch_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Three tensors of 512 rows of logits; backward: five, or four and a second gradient of the head."""
    chunk = 4 * min(N, 512) * V
    return max(5 * chunk, 4 * chunk + b * V * D) if case.backward else 3 * chunk


def liger_extra(case: Case, N: int, V: int, D: int, b: int) -> float | None:
    if case.kind in ("logprob", "teachers"):
        # Its path without CUDA is verl's algorithm, with one more tensor in the backward.
        return verl_torch_extra(case, N, V, D, b) + 4 * min(N, 512) * V * case.backward
    if case.kind == "loss":
        # Tiles of 2048 x 4096 (logits, exponentials, gradient), and a second fp32 gradient of the head.
        return 3 * 4 * min(N, 2048) * 4096 + (4 * V * D if case.backward else 0)
    return None


def trl_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Tiles of 4096 x 32768: the logits and two temporaries (two models in the divergence); a tile's share of dW."""
    rows, columns = min(N, 4096), min(V, 32768)
    return 4 * columns * (rows * (3 + 2 * (case.kind == "full_vocab")) + D * case.backward)


def cce_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Only vectors."""
    return 0.0


def ours_torch_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """Forward: a tile of logits and one of probabilities. Backward of logprobs: one tile, recomputed.

    Losses: the probabilities of a row chunk and one tile (of the mixture's difference as well, for full_vocab).
    """
    if case.kind == "logprob" or not case.backward:
        return (1 if case.backward else 2) * min(_torch.CPU_TILE_BYTES, 4 * N * V)
    buffers = 2 if case.kind == "full_vocab" else 1
    rows, columns = _torch_loss.chunk_shape(torch.empty(N, D), V, buffers=buffers)
    return 4.0 * rows * (buffers * V + columns)


def ours_torch_tol_extra(case: Case, N: int, V: int, D: int, b: int) -> float:
    """At most: one fp32 bound per column and block of rows, and the most columns that one block may keep."""
    if not case.backward:
        return ours_torch_extra(case, N, V, D, b)
    rows = min(N, _torch.BOUND_ROWS)
    return 4 * V * -(-N // rows) + 4 * rows * _torch_compact.GIVE_UP_SHARE * V


_EXTRA: dict[str, Callable[[Case, int, int, int, int], float | None]] = {
    "eager": plain_extra,
    "compile": compiled_extra,
    "torch_lce": torch_lce_extra,
    "liger": liger_extra,
    "cce": cce_extra,
    "cce_exact": cce_extra,
    "cce_torch_compile": compiled_extra,
    "trl": trl_extra,
    "verl_torch": verl_torch_extra,
    "ours_torch": ours_torch_extra,
    "ours_torch_tol": ours_torch_tol_extra,
}
