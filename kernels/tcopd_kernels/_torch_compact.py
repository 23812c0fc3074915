"""Certified vocabulary compaction: a backward over the columns that hold all but `grad_tol` of every row's mass.

For a chunk of rows with bounds b_v ≥ max_i p_iv, columns are kept in bands of falling b_v, each row taking bands
until its exact dropped mass r_i = 1 − Σ_kept p_iv is at most grad_tol; rows that stay above it take the dense path.
For a part of the vocabulary 1 is replaced by the row's mass in that part, and the r_i of the parts add up.
With the coefficient c_i of p_iv in the gradient of the logits (c = grad_lse − grad_logprob) the error that is left is

    ‖ΔdH_i‖ ≤ |c_i| r_i max_v‖W_v‖ / temperature
    ‖ΔdW‖_F ≤ Σ_i |c_i| r_i ‖h_i‖ / temperature
    ‖Δdb‖_1 ≤ Σ_i |c_i| r_i / temperature

whatever the bounds b_v are: they decide what the result costs, not how good it is. r_i is known to the rounding of
the probabilities, about 1e-6 in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ._checks import accumulation_dtype
from ._torch import BOUND_ROWS, gemm_dtype, logits, slices, target_logits, tile_shape
from ._torch_grads import Grads, HeadGradients, Needs
from ._torch_upstream import Upstream

# Bands hold the columns with b_v ≥ grad_tol times these, and which no earlier band holds. The first serves the rows
# that are nearly one-hot, the last is small enough for the tail of most tokens of a language model.
BAND_THRESHOLDS = (2.0, 2.0**-2, 2.0**-5, 2.0**-8, 2.0**-11)


# Keeping this share of the columns and then going dense would cost this share of a GEMM in vain.
GIVE_UP_SHARE = 0.25


class Piece(NamedTuple):
    """Probabilities p [m, k] of some columns [k], ascending, in the rows of a chunk at `places` [m]."""

    columns: torch.Tensor
    places: torch.Tensor
    p: torch.Tensor


# (places [m], columns [k]) -> probabilities [m, k]
Probabilities = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Certificate:
    """What compaction left out, as metrics that merge_metrics can combine (see `linear_tcopd_loss`)."""

    def __init__(self, vocab: int, like: torch.Tensor) -> None:
        self.vocab = vocab
        self.sums = like.new_zeros(4, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
        self.dropped_max = self.sums.new_zeros(())

    def add(self, dropped: torch.Tensor, n_kept: int) -> None:
        """Rows [n] that lost the mass `dropped` each and kept n_kept columns in all."""
        if len(dropped):
            self.dropped_max = torch.maximum(self.dropped_max, dropped.amax())
            self.sums += torch.stack([dropped.sum(), *self.sums.new_tensor([0, len(dropped), n_kept])])

    def add_dense(self, n: int) -> None:
        self.sums += self.sums.new_tensor([0, n, n, n * self.vocab])

    def metrics(self) -> dict[str, torch.Tensor]:
        names = ("dropped_mass_sum", "dense_row_count", "grad_row_count", "kept_column_sum")
        return dict(zip(names, self.sums.float(), strict=True)) | {"dropped_mass_max": self.dropped_max.float()}


def exact_certificate(n_rows: int, vocab: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Certificate of a backward that leaves nothing out."""
    certificate = Certificate(vocab, like)
    certificate.add_dense(n_rows)
    return certificate.metrics()


def keep_columns(
    bound: torch.Tensor,
    targets: torch.Tensor,
    mass: torch.Tensor,
    probabilities: Probabilities,
    grad_tol: float,
    columns_per_piece: int,
) -> tuple[list[Piece], torch.Tensor]:
    """Pieces of the bands that each of the n rows needs, and r [n]; all targets in [0, V) are in the first band.

    bound: [V].   mass: [n], the probability of all V columns.

    A row gives up when even columns as probable as the next band allows could not make up its missing mass within
    the limit of GIVE_UP_SHARE of the vocabulary, and all give up when the bands reach it: they are cheaper dense.
    """
    vocab = len(bound)
    here = (targets >= 0) & (targets < vocab)
    bound = torch.cat([bound, bound.new_zeros(1)]).index_fill_(0, torch.where(here, targets, vocab), torch.inf)[:vocab]
    pieces: list[Piece] = []
    dropped = mass.clone()
    # NaN is not within the tolerance.
    places = (here | ~(mass <= grad_tol)).nonzero().squeeze(1)
    kept = torch.zeros_like(bound, dtype=torch.bool)
    n_kept, limit = 0, GIVE_UP_SHARE * vocab
    for threshold in BAND_THRESHOLDS:
        columns = (bound >= grad_tol * threshold).logical_and_(~kept).nonzero().squeeze(1)
        n_kept += len(columns)
        if len(places) == 0 or n_kept > limit:
            break
        for part in columns.split(columns_per_piece) if len(columns) else []:
            piece = Piece(part, places, probabilities(places, part))
            dropped[places] -= piece.p.sum(1)
            pieces.append(piece)
        missing = dropped[places] - grad_tol
        places = places[~(missing <= 0) & ~(missing > limit * grad_tol * threshold)]
        kept.index_fill_(0, columns, True)
    if not pieces:
        # Nothing was computed for these rows, among them those that only lack their target.
        dropped[places] = torch.inf
    return pieces, dropped.clamp_(min=0)


def add_kept(
    grads: HeadGradients,
    certificate: Certificate,
    rows: torch.Tensor,
    h: torch.Tensor,
    upstream: Upstream,
    kept: tuple[list[Piece], torch.Tensor],
    grad_tol: float,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """Adds the gradients of those `rows` [n] that are within grad_tol; returns the places in [0, n) of the others."""
    pieces, dropped = kept
    within = dropped <= grad_tol
    n_kept = 0
    for columns, places, p in pieces:
        chosen = within[places].nonzero().squeeze(1)
        if len(chosen) < len(places):
            places, p = places[chosen], p[chosen]
        if len(places):
            dz = upstream[places].from_probabilities_(p, columns, temperature, softcap)
            grads.add(rows[places], h[places], [(columns, dz)])
            n_kept += p.numel()
    certificate.add(dropped[within], n_kept)
    return (~within).nonzero().squeeze(1)


def add_dense(
    grads: HeadGradients,
    certificate: Certificate,
    rows: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    upstream: Upstream,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    """Adds the exact gradients of `rows` [n] of hidden [N, D] from recomputed logits; upstream: of these rows."""
    certificate.add_dense(len(rows))
    vocab, dim = weight.shape
    rows_per_tile, cols_per_tile = tile_shape(len(rows), vocab, dim, upstream.lse.dtype, hidden.device)
    for places in slices(len(rows), rows_per_tile):
        h, part = hidden[rows[places]].to(grads.operand), upstream[places]
        tiles = (
            (cols, part.dlogits_(logits(h, weight[cols].to(grads.operand), bias, cols, temperature, softcap),
                                 cols, temperature, softcap))
            for cols in slices(vocab, cols_per_tile)
        )  # fmt: skip
        grads.add(rows[places], h, tiles)


def piece_columns(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Columns per piece, whose probabilities and gathered weight rows are each bounded like a tile."""
    rows, acc = min(len(hidden), BOUND_ROWS), accumulation_dtype(hidden.dtype)
    return tile_shape(rows, weight.shape[0], weight.shape[1], acc, hidden.device)[1]


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
    """
    operand = gemm_dtype(hidden)
    upstream = Upstream.scaled(targets, lse, None, grad_logprob, grad_lse, None, operand)
    if softcap is not None:
        upstream.target_logit = target_logits(hidden, weight, targets, bias, temperature, softcap)
    grads = HeadGradients(hidden, weight, needs)
    certificate = Certificate(weight.shape[0], lse)
    mass = torch.ones_like(lse) if mass is None else mass
    options = (temperature, softcap)

    cols_per_piece = piece_columns(hidden, weight)
    dense = [torch.zeros_like(blocks[:0])]
    for rows in _rows_of_each_block(blocks):
        h, part = hidden[rows].to(operand), upstream[rows]

        def probabilities(
            places: torch.Tensor, columns: torch.Tensor, h: torch.Tensor = h, part: Upstream = part
        ) -> torch.Tensor:
            z = logits(h[places], weight[columns].to(operand), bias, columns, *options)
            return z.sub_(part.lse[places].unsqueeze(1)).exp_()

        kept = keep_columns(bounds[blocks[rows[0]]], part.targets, mass[rows], probabilities, grad_tol, cols_per_piece)
        dense.append(rows[add_kept(grads, certificate, rows, h, part, kept, grad_tol, *options)])
    others = torch.cat(dense)
    add_dense(grads, certificate, others, hidden, weight, upstream[others], bias, *options)
    found = grads.finish(upstream.scale if isinstance(upstream.scale, torch.Tensor) else None)
    own = [None if g is None else g.to(t.dtype) for g, t in zip(found[:2], (hidden, weight), strict=True)]
    grad_bias = None if found[2] is None or bias is None else found[2].to(bias.dtype)
    return (own[0], own[1], grad_bias), certificate.metrics()


def _rows_of_each_block(blocks: torch.Tensor) -> list[torch.Tensor]:
    """Row indices [n] of each block that is present in `blocks` [N], which ascends."""
    _, counts = blocks.unique_consecutive(return_counts=True)
    return list(torch.arange(len(blocks), device=blocks.device).split(counts.tolist())) if len(blocks) else []
