"""Removal of rows that take no part, and its inverse."""

from __future__ import annotations

import torch


def take_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """tensor[rows], or the tensor itself for None."""
    return tensor if rows is None else tensor.index_select(0, rows)


def scatter_rows(tensor: torch.Tensor, rows: torch.Tensor | None, n_rows: int) -> torch.Tensor:
    """Inverse of take_rows: zeros in the rows that were left out."""
    if rows is None:
        return tensor
    out = tensor.new_zeros(n_rows, *tensor.shape[1:])
    return out.index_copy_(0, rows, tensor)


def rows_with_gradient(valid: torch.Tensor, grads: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Indices of the `valid` rows where any gradient is non-zero (NaN counts), or None when that is every row."""
    present = [g != 0 for g in grads if g is not None]
    if not present:
        return valid.new_empty(0, dtype=torch.int64)
    active = torch.stack(present).any(0).logical_and_(valid).nonzero().squeeze(1)
    return None if len(active) == len(valid) else active
