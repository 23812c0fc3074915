"""Vocabulary compaction of the full-vocabulary loss: which columns a block of rows keeps, and what that loses.

Columns are taken in bands of falling bounds, each row taking bands until what it still leaves out is within grad_tol.
What a row leaves out is a function of two sums over its dropped columns, known from their sums over the whole
vocabulary and over the columns taken, so it is certain whatever the bounds are. Rows above grad_tol are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ._torch_compact import BAND_THRESHOLDS, GIVE_UP_SHARE


class Piece(NamedTuple):
    """Gradient dz [m, k] of the rows of a block at `places` [m] in the columns [k], ascending."""

    columns: torch.Tensor
    places: torch.Tensor
    dz: torch.Tensor


class Kept(NamedTuple):
    """Pieces of a block of n rows, and what these rows leave out: of their gradient [n] and of their mass [n]."""

    pieces: list[Piece]
    dropped: torch.Tensor
    mass: torch.Tensor


# (places [m], columns [k]) -> dz [m, k], and the two sums over these columns, [2, m]; the second is the mass.
Take = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def keep_columns(
    bound: torch.Tensor,
    sums: torch.Tensor,
    take: Take,
    lost: Callable[[torch.Tensor], torch.Tensor],
    grad_tol: float,
    columns_per_piece: int,
) -> Kept:
    """Takes the bands that the n rows of a block need.

    bound: [V], how much each column matters at most in any row.   sums: [2, n], over the whole vocabulary.
    lost: the gradient [m] that rows leave out, from the sums [2, m] over the columns that they have not taken.

    Nothing is taken from the band on that would exceed the share GIVE_UP_SHARE of the vocabulary: the rows that are
    not done by then are cheaper dense.
    """
    left = sums.clone()
    pieces: list[Piece] = []
    places = (~(lost(left) <= grad_tol)).nonzero().squeeze(1)  # NaN is not within the tolerance
    kept = torch.zeros_like(bound, dtype=torch.bool)
    n_kept = 0
    for threshold in BAND_THRESHOLDS:
        columns = (bound >= grad_tol * threshold).logical_and_(~kept).nonzero().squeeze(1)
        n_kept += len(columns)
        if len(places) == 0 or n_kept > GIVE_UP_SHARE * len(bound):
            break
        for part in columns.split(columns_per_piece) if len(columns) else []:
            dz, part_sums = take(places, part)
            left[:, places] -= part_sums
            pieces.append(Piece(part, places, dz))
        places = places[~(lost(left[:, places]) <= grad_tol)]
        kept.index_fill_(0, columns, True)
    return Kept(pieces, lost(left), left[1].clamp(min=0))


def pieces_within(kept: Kept, grad_tol: float, report: CompactionReport) -> Iterator[Piece]:
    """The pieces without the rows above grad_tol, which are counted as dense."""
    within = kept.dropped <= grad_tol
    n_kept = 0
    for columns, places, dz in kept.pieces:
        chosen = within[places].nonzero().squeeze(1)
        if len(chosen):
            n_kept += len(chosen) * len(columns)
            yield Piece(columns, places[chosen], dz[chosen] if len(chosen) < len(places) else dz)
    report.add(kept.mass[within], kept.dropped[within], n_kept, int((~within).sum()))


class CompactionReport:
    """What compaction left out, as metrics that merge_metrics can combine (see `full_vocab_tcopd_loss`)."""

    def __init__(self, vocab: int, like: torch.Tensor) -> None:
        self.vocab = vocab
        self.sums, self.largest = like.new_zeros(5), like.new_zeros(2)

    def add(self, mass: torch.Tensor, gradient: torch.Tensor, n_kept: int, n_dense: int) -> None:
        """Rows that lost `mass` and `gradient` [n] and kept n_kept elements in all, and n_dense rows without loss."""
        if len(mass):
            self.largest = torch.maximum(self.largest, torch.stack([mass.amax(), gradient.amax()]))
        counts = (n_dense, len(mass) + n_dense, n_kept + n_dense * self.vocab)
        self.sums += torch.stack([mass.sum(), gradient.sum(), *self.sums.new_tensor(counts)])

    def metrics(self) -> dict[str, torch.Tensor]:
        names = ("dropped_mass_sum", "dropped_grad_sum", "dense_row_count", "grad_row_count", "kept_column_sum")
        sums = dict(zip(names, self.sums.float(), strict=True))
        return sums | dict(zip(("dropped_mass_max", "dropped_grad_max"), self.largest.float(), strict=True))
