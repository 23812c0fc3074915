"""Result types of the public functions."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLogprobs(NamedTuple):
    """Per-token statistics of the tempered next-token distribution, N tokens.

    logprob: [N] log π(y_n) in nats.
    lse: [N] log Σ_v exp(z_v), the log normaliser of the tempered (and soft-capped) logits z.
    entropy: [N] −Σ_v π(v) log π(v) in nats, or None when it was not asked for.

    All are fp32, or float64 when the inputs are float64. Ignored tokens hold 0 everywhere.
    """

    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None


class Partials(NamedTuple):
    """Softmax statistics of the columns seen so far, from which any number of parts can be merged; N tokens.

    max: [N] m = max_v z_v.   sum: [N] Σ_v exp(z_v − m).   dot: [N] Σ_v exp(z_v − m)(z_v − m), or None without entropy.
    target_logit: [N] z_y, and 0 where the target is not among these columns.

    fp32, or float64 for float64 inputs.
    """

    max: torch.Tensor
    sum: torch.Tensor
    dot: torch.Tensor | None
    target_logit: torch.Tensor
