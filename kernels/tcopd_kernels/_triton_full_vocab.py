"""Full-vocabulary reverse KL on Triton: forward over all rows, then gradients from recomputed tiles.

The kernels of _triton_mixture write dL/dx, x the raw output of the student's head, to a workspace [N, Vc] in the
input dtype; plain matrix products do the rest. Cost in head GEMMs for J frozen models: 1 + J forward, and 3 + J for
exact gradients. With grad_tol > 0 a block of rows recomputes only the columns that can matter. A row that drops the
mass r loses

    Σ_dropped p |d − d̄| ≤ (r · Σ_dropped p (d − d̄)²)^½,

where both sums are those of the whole vocabulary, known from the forward, less those of the columns taken.

float16 would flush small gradients to zero, so the workspace holds them times a power of two. None of them is above
|w_n| (p_v Σ p (d − d̄)²)^½ / temperature, which the factor brings under 2^14.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from ._full_vocab_compact import CompactionReport, keep_columns, pieces_within
from ._torch import add_matmul_, target_logits
from ._torch_compact import piece_columns
from ._torch_full_vocab import Head, LossSums, Problem
from ._torch_grads import Grads, HeadGradients, Needs, scaled_grads
from ._triton_common import (
    INTERPRETED,
    Tile,
    check_operands,
    compile_options,
    device_limits,
    input_precision,
    launch_options,
    on_device,
    operands,
    power_of_two_above,
    rows_contiguous,
    tma_usable,
)
from ._triton_forward import vocab_splits
from ._triton_mixture import (
    MAX_FROZEN,
    mixture_combine_kernel,
    mixture_dlogits_kernel,
    mixture_forward_kernel,
)

WORKSPACE_BYTES = 256 << 20
MIN_CHUNK = 1024  # columns: below this the products would spend their time on the fp32 accumulator
COMPACT_ROWS = 256  # rows that share their kept columns: a multiple of every tile's rows
_INTERPRETER_TILE = Tile(16, 16, 16, 4, 1)


class Models(NamedTuple):
    """The student, then the J frozen models, all on the same n rows; coefficients [J, n] fp32."""

    heads: list[Head]
    coefficients: torch.Tensor
    temperature: float

    def rows(self, rows: torch.Tensor) -> Models:
        heads = [head._replace(hidden=head.hidden.index_select(0, rows)) for head in self.heads]
        return self._replace(heads=heads, coefficients=self.coefficients.index_select(1, rows))

    def columns(self, columns: torch.Tensor) -> Models:
        heads = [
            head._replace(
                weight=head.weight.index_select(0, columns),
                bias=None if head.bias is None else head.bias.index_select(0, columns),
            )
            for head in self.heads
        ]
        return self._replace(heads=heads)


class RowTerms(NamedTuple):
    """Per row [n] fp32 of the student: loss L, entropy, log s, mean Σ p (d − c) and variance Σ p (d − d̄)².

    tops: [1 + J, n], the largest logit of every model.
    """

    loss: torch.Tensor
    entropy: torch.Tensor
    log_sum: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    tops: torch.Tensor

    def rows(self, rows: torch.Tensor) -> RowTerms:
        return RowTerms(*(term.index_select(-1, rows) for term in self))


def two_passes(
    problem: Problem, needs: Needs, grad_tol: float, likely_tokens: torch.Tensor | None
) -> tuple[LossSums, Grads, dict[str, torch.Tensor]]:
    """Sums, gradients of hidden, weight, bias, and with grad_tol > 0 the certificate of what these leave out."""
    student = problem.student
    counted = problem.weights.nonzero().squeeze(1)
    models = Models([_packed(head) for head in (student, *problem.frozen)], problem.coefficients, problem.temperature)
    if len(counted) < len(student.hidden):
        models = models.rows(counted)
    report = CompactionReport(len(student.weight), problem.coefficients)
    if len(counted) == 0:
        zero = problem.coefficients.new_zeros(())
        grads: Grads = HeadGradients(student.hidden, student.weight, needs).finish(None)
        return LossSums(zero, zero, zero, 0), grads, report.metrics() if grad_tol else {}
    compact = any(needs) and grad_tol > 0
    floor = None
    if compact:
        tokens = counted.new_full((len(counted),), -1) if likely_tokens is None else likely_tokens[counted]
        head = models.heads[0]
        floor = target_logits(head.hidden, head.weight, tokens, head.bias, problem.temperature, head.softcap)
    terms, bounds = forward(models, floor)
    w = problem.weights[counted].float()
    sums = LossSums((w * terms.loss).sum(), terms.loss.sum(), terms.entropy.sum(), len(counted))
    scale = _fp16_scale(w, terms, problem.temperature) if student.hidden.dtype == torch.float16 else None
    upstream = w if scale is None else w / scale
    grads = (None, None, None)
    if compact:
        grads = _compact_gradients(models, terms, upstream, needs, grad_tol, bounds, report)
    elif any(needs):
        grads = _exact_gradients(models, terms, upstream, needs)
    if scale is not None:
        grads = scaled_grads(grads, scale, torch.float32)
    if grads[0] is not None and len(counted) < len(student.hidden):
        grad_hidden = grads[0].new_zeros(student.hidden.shape).index_copy_(0, counted, grads[0])
        grads = (grad_hidden, *grads[1:])
    return sums, grads, report.metrics() if grad_tol else {}


def _packed(head: Head) -> Head:
    check_operands(head.hidden, head.weight)
    bias = None if head.bias is None else head.bias.contiguous()
    return Head(rows_contiguous(head.hidden), rows_contiguous(head.weight), bias, head.softcap)


def _fp16_scale(w: torch.Tensor, terms: RowTerms, temperature: float) -> torch.Tensor:
    """Power of two by which the gradients in the workspace are divided; reads one number from the device."""
    exponent = power_of_two_above((w.abs() * terms.variance.sqrt()).amax().item() / temperature)
    return w.new_tensor(2.0 ** max(-100, min(100, exponent - 14)))


def mixture_tile(kernel: str, models: Models) -> Tile:
    """The tile of "forward" or "dlogits" for these models and rows."""
    if INTERPRETED:
        return _INTERPRETER_TILE
    hidden = models.heads[0].hidden
    return tile_for(kernel, device_limits(hidden.device)[0], hidden.itemsize, len(hidden), len(models.heads) - 1)


def tile_for(kernel: str, arch: int | str, itemsize: int, n_rows: int, n_frozen: int) -> Tile:
    """The tile on `arch` (80, 90, … or "gfx942"): as large as two fp32 tiles and what comes with them fit in registers.

    The forward, with the statistics of all models, has room for less. bench/offline_compile.py checks all of them.
    """
    if itemsize == 4:
        return Tile(64, 64, 32, 8, 2)
    if isinstance(arch, str):
        return Tile(16, 128, 64, 4, 2) if n_rows <= 16 else Tile(64 if kernel == "forward" else 128, 128, 64, 8, 2)
    if n_rows <= 16:
        return Tile(16, 128, 64, 4, 3)
    if arch < 90:
        most = 32 if n_frozen == MAX_FROZEN else 64  # four models spill at 64 columns, with Triton before 3.9
        return Tile(64, most if kernel == "forward" else 128, 32, 8, 4)
    if kernel == "forward":
        return Tile(64, 128, 64, 8, 3) if arch == 90 else Tile(64, 64, 64, 4, 3)
    if n_rows > 64:
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 128, 64, 8 if arch == 90 else 4, 3)  # on sm_100 eight warps spill, with Triton 3.6


def _arguments(models: Models, tile: Tile, use_tma: bool) -> list[Any]:
    """What the kernels take per model: operands, bias, D, row strides and softcap, None or 0 beyond the last."""
    given: list[Any] = []
    for head in models.heads:
        hidden, weight = head.hidden, head.weight
        given += [
            *operands(hidden, weight, tile, use_tma), head.bias,
            hidden.shape[1], hidden.stride(0), weight.stride(0), head.softcap,
        ]  # fmt: skip
    return given + [None, None, None, 0, 0, 0, None] * (1 + MAX_FROZEN - len(models.heads))


def _options(models: Models, tile: Tile, use_tma: bool) -> dict[str, Any]:
    pin = "" if INTERPRETED else "gcn" if torch.version.hip else "ptx"
    constants = {"J": len(models.heads) - 1, "USE_TMA": use_tma, "PIN": pin, "PRECISION": input_precision()}
    return constants | launch_options(tile)


def _uses_tma(models: Models) -> bool:
    return tma_usable(*(matrix for head in models.heads for matrix in head[:2]))


def forward(models: Models, lse_floor: torch.Tensor | None) -> tuple[RowTerms, torch.Tensor | None]:
    """Row terms; with lse_floor [n], a lower bound of lse, also bounds [row blocks, V] of the probabilities.

    Memory beside the results: 20 + 8J bytes per row and vocabulary split.
    """
    student, J = models.heads[0], len(models.heads) - 1
    N, V = len(student.hidden), len(student.weight)
    tile, use_tma = mixture_tile("forward", models), _uses_tma(models)
    row_blocks = triton.cdiv(N, tile.block_m)
    splits, tiles_per_split = vocab_splits(
        row_blocks, triton.cdiv(V, tile.block_n), device_limits(student.hidden.device)[1]
    )
    empty = partial(torch.empty, dtype=torch.float32, device=student.hidden.device)
    parts, out, tops = empty(5 + 2 * J, splits, N), empty(5, N), empty(1 + J, N)
    bounds = None if lse_floor is None else empty(row_blocks, V)
    with on_device(student.hidden):
        mixture_forward_kernel[(row_blocks * splits,)](
            *_arguments(models, tile, use_tma), models.coefficients.contiguous(), lse_floor, parts, bounds,
            N, V, splits, tiles_per_split, 1.0 / models.temperature,
            HAS_BOUNDS=bounds is not None, **_options(models, tile, use_tma),
        )  # fmt: skip
        mixture_combine_kernel[(triton.cdiv(N, 128),)](
            parts, models.coefficients.contiguous(), out, tops, N, splits, J=J, BLOCK=128, **compile_options(4, 1)
        )
    return RowTerms(out[0], out[1], out[2], out[3], out[4], tops), bounds


def fill_dlogits(
    models: Models,
    terms: RowTerms,
    upstream: torch.Tensor,
    columns: slice,
    out: torch.Tensor,
    *,
    row_sums: bool = False,
) -> torch.Tensor | None:
    """Writes upstream [n] · dL/dx of a slice of the columns to out [n, columns].

    With row_sums also returns [2, n]: Σ p (d − d̄)² and Σ p over these columns.
    """
    hidden = models.heads[0].hidden
    N, V = len(hidden), len(models.heads[0].weight)
    tile, use_tma = mixture_tile("dlogits", models), _uses_tma(models)
    col_blocks = triton.cdiv(columns.stop - columns.start, tile.block_n)
    sum_parts = torch.empty(2, col_blocks, N, dtype=torch.float32, device=hidden.device) if row_sums else None
    with on_device(hidden):
        mixture_dlogits_kernel[(triton.cdiv(N, tile.block_m) * col_blocks,)](
            *_arguments(models, tile, use_tma), models.coefficients.contiguous(), terms.tops, terms.log_sum, terms.mean,
            upstream, out, sum_parts, N, V, columns.start, columns.stop, out.stride(0), 1.0 / models.temperature,
            ROW_SUMS=row_sums, **_options(models, tile, use_tma),
        )  # fmt: skip
    return None if sum_parts is None else sum_parts.sum(1)


def _vocab_chunks(models: Models, terms: RowTerms, upstream: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns, dL/dx [n, columns]) over the vocabulary; each overwrites the one before."""
    head = models.heads[0]
    N, V = len(head.hidden), len(head.weight)
    width = min(V, max(MIN_CHUNK, WORKSPACE_BYTES // (N * head.hidden.itemsize) // 128 * 128))
    workspace = head.hidden.new_empty(N, width)
    for start in range(0, V, width):
        columns = slice(start, min(start + width, V))
        dz = workspace[:, : columns.stop - start]
        fill_dlogits(models, terms, upstream, columns, dz)
        yield columns, dz


def _exact_gradients(models: Models, terms: RowTerms, upstream: torch.Tensor, needs: Needs) -> Grads:
    """Gradients of hidden [n, D], weight, bias, every row of weight's written once; fp32 where the input is fp16."""
    head = models.heads[0]
    grads = HeadGradients(head.hidden, head.weight, Needs(needs.hidden, False, needs.bias))
    out_dtype = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else torch.float32
    grad_weight = torch.empty_like(head.weight, dtype=out_dtype) if needs.weight else None
    h = head.hidden.to(grads.operand)
    for columns, dz in _vocab_chunks(models, terms, upstream):
        if grads.bias is not None:
            grads.bias[columns] = dz.sum(0, dtype=torch.float32)
        dz = dz.to(grads.operand)
        if grads.hidden is not None:
            add_matmul_(grads.hidden, dz, head.weight[columns].to(grads.operand))
        if grad_weight is None:
            continue
        if grad_weight.dtype == dz.dtype:
            torch.mm(dz.T, h, out=grad_weight[columns])
        else:
            add_matmul_(grad_weight[columns], dz.T, h, fresh=True)
    grad_hidden, _, grad_bias = grads.finish(None)
    return grad_hidden, grad_weight, grad_bias


def _compact_gradients(
    models: Models,
    terms: RowTerms,
    upstream: torch.Tensor,
    needs: Needs,
    grad_tol: float,
    bounds: torch.Tensor | None,
    report: CompactionReport,
) -> Grads:
    """Gradients of hidden [n, D], weight, bias from the columns that each block of rows keeps."""
    head, temperature = models.heads[0], models.temperature
    assert bounds is not None
    grads = HeadGradients(head.hidden, head.weight, needs._replace(bias=False))
    grad_bias = upstream.new_zeros(len(head.weight)) if needs.bias else None

    def add(rows: torch.Tensor, columns: slice | torch.Tensor, dz: torch.Tensor) -> None:
        grads.add(rows, head.hidden[rows].to(grads.operand), [(columns, dz)])
        if grad_bias is not None:
            grad_bias[columns] += dz.sum(0, dtype=torch.float32)

    def lost(sums: torch.Tensor) -> torch.Tensor:
        # The mass is known to the rounding of the probabilities.
        return (sums[0].clamp(min=0) * sums[1].clamp(min=1e-6)).sqrt() / temperature

    tile_rows = mixture_tile("forward", models).block_m
    dense = []
    everywhere = torch.arange(len(upstream), device=upstream.device)
    for rows, bound in zip(everywhere.split(COMPACT_ROWS), bounds.split(COMPACT_ROWS // tile_rows), strict=True):
        take = partial(_take, models, terms, upstream, rows)
        sums = torch.stack([terms.variance[rows], torch.ones_like(upstream[rows])])
        per_piece = piece_columns(head.hidden[rows], head.weight)
        kept = keep_columns(bound.amax(0), sums, take, lost, grad_tol, per_piece)
        for columns, places, dz in pieces_within(kept, grad_tol, report):
            add(rows[places], columns, dz)
        dense.append(rows[~(kept.dropped <= grad_tol)])
    others = torch.cat(dense)
    if len(others):
        for columns_slice, dz in _vocab_chunks(models.rows(others), terms.rows(others), upstream[others]):
            add(others, columns_slice, dz)
    grad_hidden, grad_weight, _ = grads.finish(None)
    return grad_hidden, grad_weight, grad_bias


def _take(
    models: Models,
    terms: RowTerms,
    upstream: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    columns: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """upstream · dL/dx [m, k] and the row sums [2, m] for rows[places] [m] and `columns` [k]."""
    chosen = rows[places]
    dz = models.heads[0].hidden.new_empty(len(chosen), len(columns))
    part = models.rows(chosen).columns(columns)
    sums = fill_dlogits(part, terms.rows(chosen), upstream[chosen], slice(0, len(columns)), dz, row_sums=True)
    assert sums is not None
    return dz, sums
