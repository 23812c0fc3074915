"""Log-probabilities of the same tokens under several frozen models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from ._backend import load_backend, resolve_backend, without_autocast
from ._checks import (
    accumulation_dtype,
    check_head,
    check_head_options,
    check_number,
    check_sequence,
    follow_autocast,
    select_targets,
)
from ._launch_plan import LAUNCHES
from ._rows import scatter_rows, take_rows
from ._step_models import Model


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
    launch: str = "auto",
) -> torch.Tensor:
    """log π_m(y_n) of M frozen models, [M, N]; no gradient.

    Args:
        hiddens: M tensors [N, D_m]; each model has its own width and may have its own dtype. Under autocast all are
            cast to the region's dtype.
        weights: M tensors [V_m, D_m]. V_m may differ by padding; every target must be below the smallest.
        targets: [N] int32 or int64, shared by all models.
        biases, softcaps: one entry per model (entries may be None), or None for none at all.
        temperature, ignore_index, backend: as in linear_logprob, for all models.
        vocab_size: only the first vocab_size rows of each weight count. Give it when the vocabularies are
            padded to different sizes, or padding rows take part in the normaliser.
        launch: of the Triton kernels: "joint" (one launch for the models of a dtype), "separate" (one each), or
            "auto", which takes one launch where that is predicted to be faster: for small N.

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
    if launch not in LAUNCHES:
        raise ValueError(f"launch must be one of {', '.join(LAUNCHES)}, got {launch!r}")
    models = []
    for m, (hidden, weight, bias, softcap) in enumerate(zip(hiddens, weights, biases, softcaps, strict=True)):
        check_number(f"softcaps[{m}]", softcap, low=0.0, optional=True)
        head = check_head(hidden, weight, bias, vocab_size, (f"hiddens[{m}]", f"weights[{m}]", f"biases[{m}]"))
        models.append(Model(*follow_autocast(hidden, head[0]), head[1], softcap))
        if hidden.shape[0] != hiddens[0].shape[0] or hidden.device != hiddens[0].device:
            raise ValueError(
                f"hiddens[{m}] has {hidden.shape[0]} rows on {hidden.device}, but hiddens[0] has "
                f"{hiddens[0].shape[0]} on {hiddens[0].device}"
            )
    n_rows, device = hiddens[0].shape[0], hiddens[0].device
    smallest_vocab = min(model.weight.shape[0] for model in models)
    rows = select_targets(targets, n_rows, smallest_vocab, ignore_index, device)
    names = [resolve_backend(backend, model.hidden) for model in models]
    if backend == "reference":
        hidden_list, weight_list, bias_list, *_ = zip(*models, strict=True)
        return reference.multi_linear_logprob(
            hidden_list, weight_list, targets, biases=bias_list,
            temperature=temperature, softcaps=softcaps, ignore_index=ignore_index,
        )  # fmt: skip
    out = torch.zeros(
        n_models, n_rows, dtype=accumulation_dtype(*(model.hidden.dtype for model in models)), device=device
    )
    kept = [model.take(rows) for model in models]
    kept_targets = take_rows(targets.long(), rows)
    on_triton = [m for m, name in enumerate(names) if name == "triton" and len(kept_targets)]
    with without_autocast(hiddens[0]):
        if on_triton:
            found = _triton_logprobs([kept[m] for m in on_triton], kept_targets, temperature, launch)
            out[on_triton] = scatter_rows(found.T, rows, n_rows).T.to(out.dtype)
        for m in sorted(set(range(n_models)) - set(on_triton)):
            hidden, weight, bias, softcap, _ = kept[m]
            logprob, _, _ = load_backend(names[m]).forward(
                hidden, weight, kept_targets, bias=bias, temperature=temperature, softcap=softcap, entropy=False
            )
            out[m] = scatter_rows(logprob, rows, n_rows)
    return out


def _triton_logprobs(models: Sequence[Model], targets: torch.Tensor, temperature: float, launch: str) -> torch.Tensor:
    """[M, N] for N > 0 tokens that all count."""
    from ._triton_finalize import merge_logprobs
    from ._triton_multi import model_partials

    return merge_logprobs(model_partials(models, targets, temperature, launch))
