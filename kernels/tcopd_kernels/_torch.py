"""Chunked linear log-probabilities in plain torch, for any device.

Logits exist only as tiles of at most WORKSPACE_BYTES, on a CPU of CPU_TILE_BYTES, so that the passes over a tile
find it in cache. Softmax statistics are accumulated online over vocabulary tiles (Milakov & Gimelshein, 2018), so a
second pass over the vocabulary is needed only for gradients.
Half-precision inputs are multiplied with fp32 accumulation and fp32 results.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

import torch

from ._checks import accumulation_dtype
from ._torch_upstream import Upstream
from .types import Partials

# Upper bound of one logits tile. Up to three such tiles (logits, probabilities, a factor of the same shape) are
# alive at once, besides one fp32 tile of weight rows (of the same bound) and the gradients themselves.
WORKSPACE_BYTES = 64 * 2**20
CPU_TILE_BYTES = 2**20
# Rows that share one column bound. Fewer rows keep fewer columns but store more bounds: [N / rows, V] fp32.
BOUND_ROWS = 256


def partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    bounds: torch.Tensor | None = None,
) -> Partials:
    """Softmax statistics of hidden [N,D], weight [V,D]; targets [N] int64, those outside [0, V) are not here.

    bounds: [⌈N / BOUND_ROWS⌉, V], filled with upper bounds of the probability that each column has in any row of
    each block of BOUND_ROWS rows: exp(z_v − c) with c ≤ lse the larger of the target's logit and the normaliser
    so far. (The target's logit comes from a dot product of its own, so this holds up to rounding.)
    """
    n_rows, dim = hidden.shape
    acc = accumulation_dtype(hidden.dtype)
    operand = gemm_dtype(hidden)
    most_rows = None if bounds is None else BOUND_ROWS
    rows_per_tile, cols_per_tile = tile_shape(n_rows, weight.shape[0], dim, acc, hidden.device, most_rows)
    row_tiles = list(slices(n_rows, rows_per_tile))
    stats = [OnlineSoftmax(targets[rows], acc, entropy) for rows in row_tiles]
    head = (bias, temperature, softcap)
    known = None if bounds is None else target_logits(hidden, weight, targets, *head)
    workspace = [hidden.new_empty(rows_per_tile * cols_per_tile, dtype=acc) for _ in range(2)]
    for cols in slices(weight.shape[0], cols_per_tile):
        w = weight[cols].to(operand)
        for rows, row_stats in zip(row_tiles, stats, strict=True):
            h = hidden[rows].to(operand)
            z_out, p_out = (tile_view(buffer, len(h), len(w)) for buffer in workspace)
            tile = row_stats.update(logits(h, w, bias, cols, temperature, softcap, z_out), cols, p_out)
            if bounds is not None and known is not None:
                bound = tile.probabilities_(torch.maximum(known[rows], row_stats.lse())).amax(0)
                block = bounds[rows.start // BOUND_ROWS, cols]
                torch.maximum(block, bound, out=block)
    if not stats:
        empty = hidden.new_empty(0, dtype=acc)
        return Partials(empty, empty, empty if entropy else None, empty)
    top, total, dot, target_logit = zip(*(row_stats.partials() for row_stats in stats), strict=True)
    return Partials(torch.cat(top), torch.cat(total), torch.cat(dot) if entropy else None, torch.cat(target_logit))


def finish(partials: Partials) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(logprob, lse, entropy or None), each [N], of the whole vocabulary."""
    log_sum = partials.sum.log()
    entropy = None if partials.dot is None else log_sum - partials.dot / partials.sum
    # The lowest finite number stands for −inf.
    removed = partials.target_logit <= torch.finfo(log_sum.dtype).min
    target_logit = partials.target_logit.masked_fill(removed, -torch.inf)
    return (target_logit - partials.max) - log_sum, partials.max + log_sum, entropy


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    bounds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """logprob [N], lse [N], entropy [N] or None; arguments as in `partials`."""
    return finish(
        partials(
            hidden, weight, targets,
            bias=bias, temperature=temperature, softcap=softcap, entropy=entropy, bounds=bounds,
        )
    )  # fmt: skip


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Exact gradients of hidden [N,D], weight [V,D], bias [V] in their own dtypes, accumulated in fp32.

    Logits are recomputed tile by tile. Of a part of the vocabulary: its share of the gradient of hidden, where lse
    and entropy are those of the whole vocabulary, and a target outside [0, V) belongs to another part.
    """
    n_rows, dim = hidden.shape
    acc = accumulation_dtype(hidden.dtype)
    operand = gemm_dtype(hidden)
    upstream = Upstream.scaled(targets, lse, entropy, grad_logprob, grad_lse, grad_entropy, operand)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=acc) if need_hidden else None
    grad_weight = (torch.empty_like if n_rows else torch.zeros_like)(weight) if need_weight else None
    grad_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else None
    rows_per_tile, cols_per_tile = tile_shape(n_rows, weight.shape[0], dim, acc, hidden.device)
    workspace = hidden.new_empty(rows_per_tile * cols_per_tile, dtype=acc)
    for cols in slices(weight.shape[0], cols_per_tile):
        w = weight[cols].to(operand)
        tile_weight = None if grad_weight is None else grad_weight[cols]
        if tile_weight is not None and tile_weight.dtype != acc:
            tile_weight = w.new_zeros(w.shape, dtype=acc)
        tile_bias = w.new_zeros(len(w), dtype=acc) if grad_bias is not None else None
        for rows in slices(n_rows, rows_per_tile):
            h = hidden[rows].to(operand)
            z = logits(h, w, bias, cols, temperature, softcap, tile_view(workspace, len(h), len(w)))
            dz = upstream[rows].dlogits_(z, cols, temperature, softcap)
            if tile_bias is not None:
                tile_bias += dz.sum(0)
            dz = dz.to(operand)
            if grad_hidden is not None:
                add_matmul_(grad_hidden[rows], dz, w)
            if tile_weight is not None:
                add_matmul_(tile_weight, dz.T, h, fresh=rows.start == 0)
        if grad_weight is not None and tile_weight is not None:
            if operand == torch.float16:
                tile_weight.mul_(upstream.scale)
            if tile_weight.dtype != grad_weight.dtype:
                grad_weight[cols] = tile_weight
        if grad_bias is not None and tile_bias is not None:
            grad_bias[cols] = tile_bias.mul_(upstream.scale)
    if grad_hidden is not None:
        grad_hidden = grad_hidden.mul_(upstream.scale).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


class SoftmaxTile(NamedTuple):
    """softmax of one tile by itself (p [n, c]), with the tile's max and Σ exp(z − max) [n]."""

    p: torch.Tensor
    max: torch.Tensor
    sum: torch.Tensor

    def share(self, lse: torch.Tensor) -> torch.Tensor:
        """Probability [n] of the whole tile where log Σ exp over all tiles is lse [n]."""
        return (self.max - lse).exp_().mul_(self.sum)

    def probabilities_(self, lse: torch.Tensor) -> torch.Tensor:
        """exp(z − lse), written over p."""
        return self.p.mul_(self.share(lse).unsqueeze(1))


class OnlineSoftmax:
    """Running max m, Σ exp(z−m), Σ exp(z−m)(z−m) and target logit of a block of rows over vocabulary tiles."""

    def __init__(self, targets: torch.Tensor, dtype: torch.dtype, entropy: bool) -> None:
        self.targets = targets
        self.entropy = entropy
        # The lowest finite number stands for −inf: exp(m − m') is then 0, never NaN, even for a tile of −inf.
        self.lowest = torch.finfo(dtype).min
        self.max = torch.full(targets.shape, self.lowest, dtype=dtype, device=targets.device)
        self.sum = torch.zeros_like(self.max)
        self.weighted_sum = torch.zeros_like(self.max)
        self.target_logit = torch.zeros_like(self.max)

    def update(self, z: torch.Tensor, cols: slice, p_out: torch.Tensor | None = None) -> SoftmaxTile:
        """z [n, cols] finite: the next tile; overwritten when the entropy is asked for. p_out: for the result's p."""
        local = self.targets - cols.start
        inside = (local >= 0) & (local < z.shape[1])
        found = z.gather(1, local.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target_logit = torch.where(inside, found, self.target_logit)
        # torch's softmax makes its max, exp and sum row by row in cache, faster than an exp_ alone. Its largest
        # value is 1 / Σ exp(z − max).
        p = torch.softmax(z, 1, out=p_out)
        tile = SoftmaxTile(p, z.amax(1), p.amax(1).reciprocal_())
        new_max = torch.maximum(self.max, tile.max)
        decay = (self.max - new_max).exp()
        grown = (tile.max - new_max).exp_().mul_(tile.sum)
        if self.entropy:
            mean = z.sub_(tile.max.unsqueeze(1)).mul_(p).sum(1)
            # decay · sum first: the step from the lowest finite number times a sum above 1 would be −inf, not 0.
            carried = decay * self.weighted_sum + (self.max - new_max) * (decay * self.sum)
            self.weighted_sum = carried + grown * (mean + (tile.max - new_max))
        self.sum = decay * self.sum + grown
        self.max = new_max
        return tile

    def lse(self) -> torch.Tensor:
        """log Σ exp z over the tiles so far, [n]."""
        return self.max + self.sum.log()

    def partials(self) -> Partials:
        return Partials(self.max, self.sum, self.weighted_sum if self.entropy else None, self.target_logit)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(logprob, lse, entropy or None), each [n]."""
        return finish(self.partials())


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cols: slice | torch.Tensor,
    temperature: float,
    softcap: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softcap·tanh((h Wᵀ + b)/softcap)/temperature for the weight rows `cols`, [n, cols], fp32 or float64.

    Written to `out` where the GEMM can. A bias of −inf, which removes a token, gives the lowest finite number, so
    that products with its probability 0 are 0.
    """
    z = matmul(hidden, weight.T) if out is None or out.dtype != hidden.dtype else torch.mm(hidden, weight.T, out=out)
    if bias is not None:
        z += bias[cols]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)
    return z if bias is None else z.clamp_(min=torch.finfo(z.dtype).min)


def new_bounds(n_rows: int, weight: torch.Tensor) -> torch.Tensor:
    """Storage for the bounds that `forward` fills."""
    blocks = -(-n_rows // BOUND_ROWS)
    return weight.new_zeros(blocks, weight.shape[0], dtype=accumulation_dtype(weight.dtype))


def target_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """Logit of each row's target [N], fp32 or float64; the lowest finite number for a target outside [0, V)."""
    acc = accumulation_dtype(hidden.dtype)
    step = max(1, tile_elements(acc) // max(hidden.shape[1], 1))
    parts = [hidden.new_zeros(0, dtype=acc)]
    for rows in slices(len(targets), step):
        inside = (targets[rows] >= 0) & (targets[rows] < len(weight))
        y = torch.where(inside, targets[rows], 0)
        z = torch.linalg.vecdot(hidden[rows].to(acc), weight[y].to(acc))
        z = z if bias is None else z + bias[y]
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        parts.append(torch.where(inside, z / temperature, torch.finfo(acc).min))
    return torch.cat(parts)


def gemm_dtype(tensor: torch.Tensor) -> torch.dtype:
    """dtype of the GEMM operands: the input's own where it can give an fp32 result, else that of fp32 copies."""
    if tensor.dtype in (torch.float32, torch.float64) or _half_gemm_has_fp32_result(tensor):
        return tensor.dtype
    return torch.float32


def _half_gemm_has_fp32_result(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 (or float64) result; operands as chosen by gemm_dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def add_matmul_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool = False) -> None:
    """out += a @ b, out in fp32 or float64; with `fresh` out = a @ b, whatever out holds."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=0 if fresh else 1)
    elif fresh:
        out.copy_(matmul(a, b))
    else:
        out += matmul(a, b)


def tile_elements(dtype: torch.dtype) -> int:
    return max(1, WORKSPACE_BYTES // dtype.itemsize)


def tile_shape(
    n_rows: int, vocab: int, dim: int, dtype: torch.dtype, device: torch.device, most_rows: int | None = None
) -> tuple[int, int]:
    """(rows, columns) of a logits tile, near square unless few rows or a wide weight say otherwise.

    With most_rows no tile crosses the border of a block of that many rows.
    """
    elements = tile_elements(dtype)
    widest = max(1, elements // max(dim, 1))
    if device.type == "cpu":
        elements = min(elements, CPU_TILE_BYTES // dtype.itemsize)
    wide = max(isqrt(elements), elements // max(min(n_rows, most_rows or n_rows), 1))
    cols = max(1, min(vocab, wide, widest))
    rows = max(1, min(n_rows, elements // cols))
    if most_rows is not None and not rows == n_rows <= most_rows:
        rows = next(size for size in range(min(rows, most_rows), 0, -1) if most_rows % size == 0)
    return rows, cols


def tile_view(buffer: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The first rows · cols elements of a flat buffer, [rows, cols]."""
    return buffer[: rows * cols].view(rows, cols)


def slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
