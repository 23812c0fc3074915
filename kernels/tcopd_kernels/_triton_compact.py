"""Certified vocabulary compaction on Triton; _torch_compact says what is promised and what the certificate holds.

Rows are taken in chunks. A chunk keeps columns in bands of falling bound, the bound of a column being the largest
over the chunk's blocks of rows. For a band the kept rows of W are gathered, [K, D], and one kernel recomputes their
logits, writes dL/dx [m, K] in the input dtype and sums p over each row. So the mass r_i that a row still lacks is
known, and the rows with r_i > grad_tol go on to the next band, in the end to the exact backward. The gradients are
plain products of the compact matrices: nothing is added by two programs, and no sum depends on a race.

The host waits once per chunk and band, for the rows that go on, and a few times per call.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch

from ._torch_compact import GIVE_UP_SHARE, Certificate
from ._torch_grads import Grads, Needs
from ._triton_backward import RowTerms, fill_dlogits, fp16_scale, matmul_fp32
from ._triton_backward import backward as exact_backward
from ._triton_common import Head, check_operands, rows_contiguous

# Bands hold the columns whose bound is at least grad_tol times these, and which no earlier band holds. Fewer than on
# other devices, because each is a wait of the host.
BAND_THRESHOLDS = (2.0**-2, 2.0**-6, 2.0**-10)
# Rows per chunk. A product with dL/dx reads and writes the accumulator of the kept rows of dW, which costs as much as
# the arithmetic of about a thousand rows; more rows have more columns in their union.
MOST_ROWS, LEAST_ROWS = 4096, 1024
WORKSPACE_BYTES = 256 << 20  # of a chunk's dL/dx, from LEAST_ROWS upward, and of the gathered rows of W
LEAST_COLUMNS = 4096


class Chunk(NamedTuple):
    """Consecutive rows; bound [V], +inf at their targets; counts: columns in each band and those before it.

    Only the bands that stay within the share of the vocabulary that compaction pays for have a count.
    """

    rows: slice
    bound: torch.Tensor
    counts: list[int]


class Piece(NamedTuple):
    """Scaled dL/dx [m, K] of the columns [K] for the rows of a chunk at `places` [m] (None: all of them)."""

    columns: torch.Tensor
    places: torch.Tensor | None
    dlogits: torch.Tensor


class ColumnGradients:
    """fp32 sums of the gradients of weight and bias for those columns that any chunk may keep."""

    def __init__(self, columns: torch.Tensor, weight: torch.Tensor, needs: Needs) -> None:
        """columns: [K] ascending."""
        self.columns = columns
        self.place = columns.new_zeros(weight.shape[0])
        self.place[columns] = torch.arange(len(columns), device=columns.device)
        new_zeros = columns.new_zeros
        self.weight = new_zeros(len(columns), weight.shape[1], dtype=torch.float32) if needs.weight else None
        self.bias = new_zeros(len(columns), 1, dtype=torch.float32) if needs.bias else None

    def add(self, piece: Piece, h: torch.Tensor, within: torch.Tensor) -> None:
        """h: [m, D], the rows of the piece. within: [m], whether a row takes part."""
        where = self.place[piece.columns]
        for total, right in (
            (self.weight, None if self.weight is None else h.masked_fill(~within.unsqueeze(1), 0.0)),
            (self.bias, within.unsqueeze(1).to(h.dtype)),
        ):
            if total is not None and right is not None:
                total.index_copy_(0, where, total[where] + matmul_fp32(piece.dlogits.t(), right))

    def write(self, total: torch.Tensor | None, out: torch.Tensor | None, scale: float, *, dense: bool) -> None:
        """out[columns] = total / scale, added in fp32 to what the dense rows left there."""
        if total is None or out is None or len(self.columns) == 0:
            return
        value = (total / scale).view(len(total), *out.shape[1:])
        value = value + out[self.columns] if dense else value
        out.index_copy_(0, self.columns, value.to(out.dtype))


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: Needs,
    grad_tol: float,
    bounds: torch.Tensor,
    blocks: torch.Tensor,
    mass: torch.Tensor | None = None,
) -> tuple[Grads, dict[str, torch.Tensor]]:
    """Gradients of hidden [N,D], weight [V,D], bias [V] in their own dtypes, and the certificate.

    bounds: [B, V] as the forward filled them.   blocks: [N] ascending, the block that each row belongs to.
    mass: [N], the probability that these V columns hold of each row (None: 1).

    Rows of dW whose columns were kept are rounded once more where rows had to take the exact backward.
    Memory beside the outputs: fp32 [K, D] for the K columns that any chunk may keep, the workspaces of a chunk, and
    those of the exact backward.
    """
    check_operands(hidden, weight)
    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    bias = None if bias is None else bias.contiguous()
    (N, D), V = hidden.shape, weight.shape[0]
    needs = needs._replace(bias=needs.bias and bias is not None)
    terms = RowTerms.of(targets, lse, None, grad_logprob, grad_lse, None)
    scale = fp16_scale(terms, temperature) if hidden.dtype == torch.float16 and N else 1.0
    head = Head(hidden, weight, bias, temperature, softcap)
    chunks = _chunks(head, terms.target, grad_tol, bounds, blocks)
    columns = ColumnGradients(_columns_of_any(chunks, grad_tol, weight.device), weight, needs)
    grad_hidden = torch.zeros(N, D, dtype=hidden.dtype, device=hidden.device) if needs.hidden else None
    dropped = torch.ones_like(lse) if mass is None else mass.clone()
    n_kept = torch.zeros(N, dtype=torch.int64, device=hidden.device)
    for chunk in chunks:
        work = _ChunkWork(head, terms, chunk, scale, grad_tol, n_kept[chunk.rows])
        dropped[chunk.rows] = work.run(dropped[chunk.rows], columns, grad_hidden, every_row=mass is None)

    within = dropped <= grad_tol
    dense, kept = (~within).nonzero().squeeze(1), within.nonzero().squeeze(1)
    certificate = Certificate(V, lse)
    certificate.add(dropped[kept], int(n_kept[kept].sum()))
    certificate.add_dense(len(dense))
    upstream = (_rows(lse, dense), None, _rows(grad_logprob, dense), _rows(grad_lse, dense), None)
    grads = _dense(head, targets, dense, upstream, grad_hidden, needs)
    columns.write(columns.weight, grads[1], scale, dense=len(dense) > 0)
    columns.write(columns.bias, grads[2], scale, dense=len(dense) > 0)
    return grads, certificate.metrics()


class _ChunkWork:
    """The compact gradients of one chunk of n rows."""

    def __init__(
        self, head: Head, terms: RowTerms, chunk: Chunk, scale: float, grad_tol: float, n_kept: torch.Tensor
    ) -> None:
        """n_kept: [n], where the number of columns that each row keeps is counted."""
        self.head, self.scale, self.grad_tol, self.chunk, self.n_kept = head, scale, grad_tol, chunk, n_kept
        self.h = head.hidden[chunk.rows]
        self.terms = terms.rows(chunk.rows)

    def run(
        self, mass: torch.Tensor, columns: ColumnGradients, grad_hidden: torch.Tensor | None, *, every_row: bool
    ) -> torch.Tensor:
        """r [n]. Adds the gradients of the rows that it leaves within grad_tol; the others are yet to be done.

        every_row: all rows take part, else those whose target is here or whose mass is over grad_tol.
        """
        dropped = mass.clone()
        target = self.terms.target
        places = None
        if not every_row:
            here = (target >= 0) & (target < len(self.chunk.bound))
            places = (here | ~(mass <= self.grad_tol)).nonzero().squeeze(1)
        local = None if grad_hidden is None else torch.zeros(self.h.shape, device=self.h.device)
        pieces = self._bands(dropped, places, local)
        if not self.chunk.counts:
            # Nothing was computed for these rows, among them those that only lack their target.
            dropped[slice(None) if places is None else places] = torch.inf
        dropped.clamp_(min=0)
        within = dropped <= self.grad_tol
        for piece in pieces:
            columns.add(piece, _rows(self.h, piece.places), _rows(within, piece.places))
        if grad_hidden is not None and local is not None:
            grad_hidden[self.chunk.rows] = (local if self.scale == 1.0 else local / self.scale).to(self.h.dtype)
        return dropped

    def _bands(self, dropped: torch.Tensor, places: torch.Tensor | None, local: torch.Tensor | None) -> list[Piece]:
        """Pieces of all bands; takes their mass off `dropped` [n], adds their scaled gradient to local [n, D]."""
        pieces: list[Piece] = []
        V, D = self.head.weight.shape
        most_columns = max(LEAST_COLUMNS, WORKSPACE_BYTES // max(1, D * self.h.itemsize))
        for band, count in enumerate(self.chunk.counts):
            threshold = self.grad_tol * BAND_THRESHOLDS[band]
            if places is not None and len(places) == 0:
                break
            n_columns = count - (self.chunk.counts[band - 1] if band else 0)
            mask = self.chunk.bound >= threshold
            if band:
                mask &= ~(self.chunk.bound >= self.grad_tol * BAND_THRESHOLDS[band - 1])
            chosen = torch.nonzero_static(mask, size=n_columns).squeeze(1)
            for part in chosen.split(most_columns) if n_columns else ():
                pieces.append(self._piece(part, places, dropped, local))
            if band + 1 < len(self.chunk.counts):
                missing = _rows(dropped, places) - self.grad_tol
                # NaN is not within the tolerance.
                goes_on = ~(missing <= 0) & ~(missing > GIVE_UP_SHARE * V * threshold)
                chosen_rows = goes_on.nonzero().squeeze(1)
                places = chosen_rows if places is None else places[chosen_rows]
        return pieces

    def _piece(
        self, columns: torch.Tensor, places: torch.Tensor | None, dropped: torch.Tensor, local: torch.Tensor | None
    ) -> Piece:
        head, K = self.head, len(columns)
        h = _rows(self.h, places)
        terms = self.terms if places is None else self.terms.rows(places)
        found = torch.searchsorted(columns, terms.target).clamp_(max=K - 1)
        terms = terms._replace(target=torch.where(columns[found] == terms.target, found, -1))
        gathered = head.weight.index_select(0, columns)
        bias = None if head.bias is None else head.bias.index_select(0, columns)
        # The rows start at multiples of 16 bytes, which the matrix products need to be fast.
        dlogits = torch.empty(len(h), -(-K // 8) * 8, dtype=h.dtype, device=h.device)[:, :K]
        _, mass_parts = fill_dlogits(
            dlogits, Head(h, gathered, bias, head.temperature, head.softcap), terms, 0, K, self.scale,
            row_mass=True, vocab=head.weight.shape[0],
        )  # fmt: skip
        assert mass_parts is not None
        where = slice(None) if places is None else places
        dropped[where] -= mass_parts.sum(0)
        self.n_kept[where] += K
        if local is not None:
            local[where] += matmul_fp32(dlogits, gathered)
        return Piece(columns, places, dlogits)


@overload
def _rows(tensor: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor: ...
@overload
def _rows(tensor: None, places: torch.Tensor | None) -> None: ...
def _rows(tensor: torch.Tensor | None, places: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or places is None else tensor.index_select(0, places)


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk whose dL/dx, over as many columns as compaction pays for, takes at most WORKSPACE_BYTES."""
    within = WORKSPACE_BYTES // max(1, int(GIVE_UP_SHARE * V) * itemsize)
    return max(LEAST_ROWS, min(MOST_ROWS, within))


def _chunks(
    head: Head, targets: torch.Tensor, grad_tol: float, bounds: torch.Tensor, blocks: torch.Tensor
) -> list[Chunk]:
    """Even chunks of the rows. The host waits twice: for the blocks, and for the sizes of the bands."""
    N, V = len(targets), head.weight.shape[0]
    if N == 0:
        return []
    n_chunks = -(-N // chunk_rows(V, head.hidden.itemsize))
    starts = [N * c // n_chunks for c in range(n_chunks + 1)]
    borders = torch.arange(n_chunks + 1, device=blocks.device) * N // n_chunks
    ends = torch.stack([blocks[borders[:-1]], blocks[borders[1:] - 1]], 1).tolist()
    # A target outside [0, V) marks the column V, which is cut off.
    slots = torch.where((targets >= 0) & (targets < V), targets, V)
    marked, counts = [], []
    for c, (first_block, last_block) in enumerate(ends):
        bound = bounds.new_zeros(V + 1)
        torch.amax(bounds[first_block : last_block + 1], 0, out=bound[:V])
        bound = bound.index_fill_(0, slots[starts[c] : starts[c + 1]], torch.inf)[:V]
        marked.append(bound)
        counts.append(torch.stack([(bound >= grad_tol * t).sum() for t in BAND_THRESHOLDS]))
    limit = GIVE_UP_SHARE * V
    return [
        Chunk(slice(starts[c], starts[c + 1]), marked[c], [n for n in row if n <= limit])
        for c, row in enumerate(torch.stack(counts).tolist())
    ]


def _columns_of_any(chunks: list[Chunk], grad_tol: float, device: torch.device) -> torch.Tensor:
    """Columns [K], ascending, in the bands of any chunk."""
    masks = [c.bound >= grad_tol * BAND_THRESHOLDS[len(c.counts) - 1] for c in chunks if c.counts]
    if not masks:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.stack(masks).any(0).nonzero().squeeze(1)


def _dense(
    head: Head,
    targets: torch.Tensor,
    rows: torch.Tensor,
    upstream: tuple[torch.Tensor, None, torch.Tensor | None, torch.Tensor | None, None],
    grad_hidden: torch.Tensor | None,
    needs: Needs,
) -> Grads:
    """grad_hidden with the exact gradients of `rows`, and what they give weight and bias: zeros where there is none.

    upstream: lse, entropy and the gradients that exact_backward takes, of these rows.
    """
    hidden, weight, bias, temperature, softcap = head
    if len(rows) == 0:
        grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if needs.weight else None
        return grad_hidden, grad_weight, torch.zeros_like(bias) if needs.bias and bias is not None else None
    dense_hidden, grad_weight, grad_bias = exact_backward(
        hidden.index_select(0, rows), weight, targets.index_select(0, rows), *upstream,
        bias=bias, temperature=temperature, softcap=softcap,
        need_hidden=needs.hidden, need_weight=needs.weight, need_bias=needs.bias,
    )  # fmt: skip
    if grad_hidden is not None and dense_hidden is not None:
        grad_hidden.index_copy_(0, rows, dense_hidden)
    return grad_hidden, grad_weight, grad_bias
