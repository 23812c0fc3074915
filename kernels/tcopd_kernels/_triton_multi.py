"""Softmax statistics of the same tokens under several models in one Triton launch.

The grid runs over (model, row block, vocabulary split). Models differ in width D, vocabulary V, bias, soft-cap and
addresses, so a program reads its model's from a table in device memory (see _Row); the kernel is compiled once for
any number of models. A program leaves its (max, Σ exp) in one workspace of all models, which the kernels of
_triton_finalize merge in a fixed order: no atomics, and equal bits from run to run.
"""

from __future__ import annotations

import contextvars
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from ._launch_plan import Plan, Work, choose_launch, plan, predicted_us, work
from ._rows import scatter_rows, take_rows
from ._step_models import Model
from ._triton_common import (
    Tile,
    candidate_tiles,
    check_operands,
    device_limits,
    grouped_block,
    input_precision,
    launch_options,
    logits_tile,
    on_device,
    pick_tile,
    rows_contiguous,
    tanh,
    tma_usable,
)
from ._triton_forward import partials as one_model_partials
from ._triton_forward import rescale
from .types import Partials

Result = TypeVar("Result")
# The kernel has no entropy terms, but what it reads from the table takes as many registers.
WIDE_STATE = True
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class SplitPartials(NamedTuple):
    """Softmax statistics of M models over S vocabulary splits in all.

    max, sum: [S, N] fp32, as in Partials.   target_logit: [M, N] fp32.   splits: (first, end) of each model.
    """

    max: torch.Tensor
    sum: torch.Tensor
    target_logit: torch.Tensor
    splits: tuple[tuple[int, int], ...]


class _Row(NamedTuple):
    """What the kernel reads about one model, in this order. Addresses are 0 for what is absent."""

    first_program: int
    splits: int
    tiles_per_split: int
    first_split: int
    position: int  # row of target_logit
    V: int
    D: int
    hidden_stride: int
    weight_stride: int
    hidden: int
    weight: int
    bias: int
    lambdas: int
    softcap_bits: int  # of the fp32 number; 0 for none


FIELDS = tl.constexpr(len(_Row._fields))


@triton.jit(do_not_specialize=["N", "num_models"])
def multi_kernel(
    models, targets, split_max, split_sum, target_logit, N, num_models, inv_temperature,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, ANY_BIAS: tl.constexpr, ANY_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial (m, s) [S, N] and target logits [M, N]. Grid: Σ over models of row blocks × splits.

    ALIGN: elements of 16 bytes if all addresses, strides and D are multiples of them, else 1.
    """
    ALIGN_BYTES: tl.constexpr = 16 if ALIGN > 1 else 1
    pid = tl.program_id(0)
    index = 0
    for i in range(1, num_models):
        index += (pid >= tl.load(models + i * FIELDS)).to(tl.int32)
    model = models + index * FIELDS
    program = pid - tl.load(model).to(tl.int32)
    splits = tl.load(model + 1).to(tl.int32)
    tiles_per_split = tl.load(model + 2).to(tl.int32)
    first_split = tl.load(model + 3)
    V = tl.load(model + 5).to(tl.int32)
    D = tl.multiple_of(tl.load(model + 6).to(tl.int32), ALIGN)
    hidden_stride = tl.multiple_of(tl.load(model + 7), ALIGN)
    weight_stride = tl.multiple_of(tl.load(model + 8), ALIGN)
    hidden = tl.multiple_of(tl.cast(tl.load(model + 9), tl.pointer_type(DTYPE)), ALIGN_BYTES)
    weight = tl.multiple_of(tl.cast(tl.load(model + 10), tl.pointer_type(DTYPE)), ALIGN_BYTES)
    bias = tl.cast(tl.load(model + 11), tl.pointer_type(tl.float32))
    bias_end = tl.where(tl.load(model + 11) != 0, V, 0)
    lambdas = tl.cast(tl.load(model + 12), tl.pointer_type(tl.float32))
    lambdas_end = tl.where(tl.load(model + 12) != 0, N, 0)
    softcap = tl.load(model + 13).to(tl.int32).to(tl.float32, bitcast=True)
    if USE_TMA:
        hidden_operand = tl.make_tensor_descriptor(hidden, [N, D], [hidden_stride, 1], [BLOCK_M, BLOCK_K])
        weight_operand = tl.make_tensor_descriptor(weight, [V, D], [weight_stride, 1], [BLOCK_N, BLOCK_K])
    else:
        hidden_operand = hidden
        weight_operand = weight

    row_block, split = grouped_block(program, tl.cdiv(N, BLOCK_M), splits, GROUP_ROWS)
    row0 = row_block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)
    row_lambda = tl.load(lambdas + rows, mask=rows < lambdas_end, other=1.0)
    any_used = tl.max((row_ok & (row_lambda != 0)).to(tl.int32), axis=0)
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.where(any_used > 0, tl.minimum(first_col + tiles_per_split * BLOCK_N, V), first_col)

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    s = tl.zeros([BLOCK_M], dtype=tl.float32)
    t = tl.zeros([BLOCK_M], dtype=tl.float32)
    z_target = tl.zeros([BLOCK_M], dtype=tl.float32)
    for col0 in range(first_col, end_col, BLOCK_N):
        x = logits_tile(
            hidden_operand, weight_operand, None, row0, col0, N, V, D, hidden_stride, weight_stride, 1.0,
            False, False, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        cols = col0 + tl.arange(0, BLOCK_N)
        if ANY_BIAS:
            x += tl.load(bias + cols, mask=cols < bias_end, other=0.0)[None, :]
        if ANY_SOFTCAP:
            x = tl.where(softcap > 0, softcap * tanh(x / tl.where(softcap > 0, softcap, 1.0)), x)
        z = tl.where((cols < V)[None, :], inv_temperature * x, float("-inf"))
        z_target += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        reference, s, t = rescale(m, m_new, s, t)
        s += tl.sum(tl.exp(z - reference[:, None]), axis=1)
        m = m_new

    out = (first_split + split) * N + rows
    tl.store(split_max + out, m, mask=row_ok)
    tl.store(split_sum + out, s, mask=row_ok)
    own = row_ok & (target >= first_col) & (target < end_col)
    position = tl.load(model + 4)  # read late: a register more in the loop makes some tiles spill
    tl.store(target_logit + position * N + rows, z_target, mask=own)


def model_partials(models: Sequence[Model], targets: torch.Tensor, temperature: float, launch: str) -> SplitPartials:
    """Statistics of all models for targets [N] int64, each in every vocabulary, N > 0; `launch` one of LAUNCHES.

    Where a model's lambdas are 0 its statistics are finite or those of an empty vocabulary, and mean nothing.
    """
    for model in models:
        check_operands(model.hidden, model.weight)
    if launch == "auto":
        launch = predicted_launch_us(models)[2]
    if launch == "separate":
        return as_split([_separate_partials(model, targets, temperature) for model in models])
    groups = _by_dtype(models)
    parts = [_joint_partials([models[m] for m in members], targets, temperature) for members in groups]
    return join_partials(parts, [m for members in groups for m in members])


def _by_dtype(models: Sequence[Model]) -> list[list[int]]:
    """Positions of the models of each dtype, which share a launch."""
    groups: dict[torch.dtype, list[int]] = {}
    for m, model in enumerate(models):
        groups.setdefault(model.hidden.dtype, []).append(m)
    return list(groups.values())


def predicted_launch_us(models: Sequence[Model]) -> tuple[float, float, str]:
    """Microseconds of one launch per dtype and of one per model, and the one that launch="auto" takes.

    For the default tiles; which tile is the fastest is only known when it has been timed.
    """
    N, device = models[0].hidden.shape[0], models[0].hidden.device
    arch, multiprocessors, _ = device_limits(device)
    works, row_blocks = [], []
    for members in _by_dtype(models):
        tile = candidate_tiles(arch, models[members[0]].hidden.itemsize, N, WIDE_STATE)[0]
        row_blocks.append(triton.cdiv(N, tile.block_m))
        works.append(model_works([models[m] for m in members], tile, row_blocks[-1]))
    joint_us, separate_us = predicted_us(works, row_blocks, multiprocessors)
    return joint_us, separate_us, choose_launch(joint_us, separate_us)


def _separate_partials(model: Model, targets: torch.Tensor, temperature: float) -> Partials:
    """One model by the kernel for one; tokens with λ = 0 are taken out before."""
    rows = None if model.lambdas is None else model.lambdas.nonzero().squeeze(1)
    found = one_model_partials(
        take_rows(model.hidden, rows), model.weight, take_rows(targets, rows),
        bias=model.bias, temperature=temperature, softcap=model.softcap, entropy=False,
    )  # fmt: skip
    maximum, total, target_logit = (
        scatter_rows(t, rows, len(targets)) for t in (found.max, found.sum, found.target_logit)
    )
    return Partials(maximum, total, None, target_logit)


def as_split(parts: Sequence[Partials]) -> SplitPartials:
    """Statistics of whole vocabularies, one split each."""
    return SplitPartials(
        torch.stack([part.max for part in parts]),
        torch.stack([part.sum for part in parts]),
        torch.stack([part.target_logit for part in parts]),
        tuple((m, m + 1) for m in range(len(parts))),
    )


def join_partials(parts: Sequence[SplitPartials], order: Sequence[int]) -> SplitPartials:
    """The union of the parts; order: the position that each of their models, taken in turn, has in the result."""
    if len(parts) == 1 and list(order) == sorted(order):
        return parts[0]
    offsets = itertools.accumulate((len(part.max) for part in parts), initial=0)
    splits = [(first + offset, end + offset) for part, offset in zip(parts, offsets) for first, end in part.splits]
    at_position = sorted(range(len(order)), key=lambda i: order[i])
    return SplitPartials(
        torch.cat([part.max for part in parts]),
        torch.cat([part.sum for part in parts]),
        torch.cat([part.target_logit for part in parts])[at_position],
        tuple(splits[i] for i in at_position),
    )


def _joint_partials(models: Sequence[Model], targets: torch.Tensor, temperature: float) -> SplitPartials:
    """One launch for models of one dtype.

    Memory: 8 bytes per row and split, a copy of each bias in fp32 and of matrices whose last dimension is not
    contiguous. Deterministic as long as the tile stays the same (see `pick_tile`).
    """
    models = [
        model._replace(
            hidden=rows_contiguous(model.hidden),
            weight=rows_contiguous(model.weight),
            bias=None if model.bias is None else model.bias.float().contiguous(),
            lambdas=None if model.lambdas is None else model.lambdas.float().contiguous(),
        )
        for model in models
    ]
    targets = targets.contiguous()
    first = models[0]
    use_tma = tma_usable(*(matrix for model in models for matrix in (model.hidden, model.weight)))

    def launch(tile: Tile) -> SplitPartials:
        row_blocks = triton.cdiv(len(targets), tile.block_m)
        works = model_works(models, tile, row_blocks)
        cut = plan(works, row_blocks, device_limits(first.hidden.device)[1])
        rows, programs = _table_rows(models, works, cut, row_blocks)
        num_splits = sum(row.splits for row in rows)
        split_max, split_sum = torch.empty(2, num_splits, len(targets), device=targets.device)
        target_logit = torch.empty(len(models), len(targets), device=targets.device)
        multi_kernel[(programs,)](
            upload([number for row in rows for number in row], targets.device), targets,
            split_max, split_sum, target_logit, len(targets), len(models), 1.0 / temperature,
            DTYPE=TRITON_DTYPES[first.hidden.dtype], ALIGN=_alignment(models),
            ANY_BIAS=any(model.bias is not None for model in models),
            ANY_SOFTCAP=any(model.softcap is not None for model in models),
            USE_TMA=use_tma, PRECISION=input_precision(), **launch_options(tile),
        )  # fmt: skip
        splits = {row.position: (row.first_split, row.first_split + row.splits) for row in rows}
        return SplitPartials(split_max, split_sum, target_logit, tuple(splits[m] for m in range(len(models))))

    def run() -> SplitPartials:
        return launch(pick_tile(f"multi{len(models)}", first.hidden, first.weight, WIDE_STATE, launch))

    with on_device(first.hidden):
        return _with_descriptor_memory(run, first.hidden.device) if use_tma else run()


def model_works(models: Sequence[Model], tile: Tile, row_blocks: int) -> tuple[Work, ...]:
    sizes = [(*model.weight.shape, model.hidden.itemsize) for model in models]
    return tuple(work(V, D, itemsize, tile.block_m, tile.block_n, row_blocks) for V, D, itemsize in sizes)


def _table_rows(models: Sequence[Model], works: Sequence[Work], cut: Plan, row_blocks: int) -> tuple[list[_Row], int]:
    """The kernel's table and the number of programs. The longest programs come first, so that short ones end."""
    rows: list[_Row] = []
    first_program = first_split = 0
    length_us = [tiles * w.tile_us for tiles, w in zip(cut.tiles_per_split, works, strict=True)]
    for m in sorted(range(len(models)), key=lambda m: -length_us[m]):
        model, tiles = models[m], cut.tiles_per_split[m]
        splits = triton.cdiv(works[m].tiles, tiles)
        V, D = model.weight.shape
        rows.append(
            _Row(
                first_program, splits, tiles, first_split, m, V, D,
                model.hidden.stride(0), model.weight.stride(0), model.hidden.data_ptr(), model.weight.data_ptr(),
                0 if model.bias is None else model.bias.data_ptr(),
                0 if model.lambdas is None else model.lambdas.data_ptr(),
                0 if model.softcap is None else struct.unpack("<i", struct.pack("<f", model.softcap))[0],
            )
        )  # fmt: skip
        first_program += row_blocks * splits
        first_split += splits
    return rows, first_program


def _alignment(models: Sequence[Model]) -> int:
    """ALIGN of the kernel."""
    elements = 16 // models[0].hidden.itemsize
    aligned = all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) % elements == 0 and matrix.shape[1] % elements == 0
        for model in models
        for matrix in (model.hidden, model.weight)
    )
    return elements if aligned else 1


def upload(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """The numbers as int64 on the device, without waiting for it."""
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _with_descriptor_memory(function: Callable[[], Result], device: torch.device) -> Result:
    """Calls the function with an allocator for the TMA descriptors that the kernel makes on the device.

    It is set in a copy of the context: an allocator that the caller has given to Triton stays in force outside.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def call() -> Result:
        triton.set_allocator(allocate)
        return function()

    return contextvars.copy_context().run(call)
