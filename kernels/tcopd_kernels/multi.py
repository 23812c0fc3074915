"""Log-probabilities of the same tokens under several frozen models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcopd_kernels import reference
from tcopd_kernels._backend import load_backend, resolve_backend, without_autocast
from tcopd_kernels._checks import (
    accumulation_dtype,
    check_head,
    check_head_options,
    check_number,
    check_sequence,
    select_targets,
)
from tcopd_kernels.linear_logprob import scatter_rows, take_rows


@torch.no_grad()
def multi_linear_logprob(
    hiddens: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    temperature: float = 1.0,
    softcaps: Sequence[float | None] | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    vocab_size: int | None = None,
) -> torch.Tensor:
    """log π_m(y_n) of M frozen models, [M, N]; no gradient.

    Args:
        hiddens: M tensors [N, D_m]; each model has its own width and may have its own dtype.
        weights: M tensors [V_m, D_m]. V_m may differ by padding; every target must be below the smallest.
        targets: [N] int32 or int64, shared by all models.
        biases, softcaps: one entry per model (entries may be None), or None for none at all.
        temperature, ignore_index, backend: as in linear_logprob, for all models.
        vocab_size: only the first vocab_size rows of each weight count. Give it when the vocabularies are
            padded to different sizes, or padding rows take part in the normaliser.

    Returns:
        [M, N] fp32, float64 if any model is float64; 0 for ignored tokens.

    Raises:
        TypeError, ValueError: naming the argument, as "weights[1]", and the value.
    """
    n_models = len(check_sequence("hiddens", hiddens))
    if n_models == 0:
        raise ValueError("hiddens is empty; give at least one model")
    check_sequence("weights", weights, n_models)
    biases = check_sequence("biases", biases, n_models) if biases is not None else [None] * n_models
    softcaps = check_sequence("softcaps", softcaps, n_models) if softcaps is not None else [None] * n_models
    check_head_options(temperature, None, ignore_index, 0.0)
    heads = []
    for m, (hidden, weight, bias, softcap) in enumerate(zip(hiddens, weights, biases, softcaps, strict=True)):
        check_number(f"softcaps[{m}]", softcap, low=0.0, optional=True)
        heads.append(check_head(hidden, weight, bias, vocab_size, (f"hiddens[{m}]", f"weights[{m}]", f"biases[{m}]")))
        if hidden.shape[0] != hiddens[0].shape[0] or hidden.device != hiddens[0].device:
            raise ValueError(
                f"hiddens[{m}] has {hidden.shape[0]} rows on {hidden.device}, but hiddens[0] has "
                f"{hiddens[0].shape[0]} on {hiddens[0].device}"
            )
    n_rows = hiddens[0].shape[0]
    smallest_vocab = min(weight.shape[0] for weight, _ in heads)
    rows = select_targets(targets, n_rows, smallest_vocab, ignore_index, hiddens[0].device)
    names = [resolve_backend(backend, hidden) for hidden in hiddens]
    if backend == "reference":
        return reference.multi_linear_logprob(
            hiddens, [w for w, _ in heads], targets, biases=[b for _, b in heads],
            temperature=temperature, softcaps=softcaps, ignore_index=ignore_index,
        )  # fmt: skip
    out = torch.zeros(n_models, n_rows, dtype=accumulation_dtype(*(h.dtype for h in hiddens)), device=hiddens[0].device)
    kept_targets = take_rows(targets.long(), rows)
    for m, (weight, bias) in enumerate(heads):
        with without_autocast(weight):
            logprob, _, _ = load_backend(names[m]).forward(
                take_rows(hiddens[m], rows), weight, kept_targets,
                bias=bias, temperature=temperature, softcap=softcaps[m], entropy=False,
            )  # fmt: skip
        out[m] = scatter_rows(logprob, rows, n_rows)
    return out
