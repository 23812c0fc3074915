"""From the gradient of a loss with respect to the log-probabilities to those of the head, by recomputing logits."""

from __future__ import annotations

from typing import Any

import torch

from ._rows import scatter_rows, take_rows
from ._torch_grads import Grads, Needs, scaled_grads


def head_gradients(
    kernels: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dlogprob: torch.Tensor,
    *,
    head: dict[str, Any],
    needs: Needs,
    scale: torch.Tensor | None,
    grad_tol: float,
    bounds: torch.Tensor | None,
    mass: torch.Tensor | None = None,
) -> tuple[Grads, dict[str, torch.Tensor]]:
    """Gradients of hidden [N, D], weight and bias for upstream dlogprob [N], and the certificate of compaction.

    kernels: of load_backend.   head: bias, temperature, softcap.   scale: divides the upstream gradient before the
    products and multiplies them after (None: 1).   bounds: of the forward, for compaction within grad_tol; None for
    the exact backward, which has no certificate.   mass: [N] as in the compact backward.

    Tokens without a gradient take no part.
    """
    active = dlogprob.nonzero().squeeze(1)
    rows = None if len(active) == len(dlogprob) else active
    operands = (take_rows(hidden, rows), weight, take_rows(targets, rows), take_rows(lse, rows))
    upstream = take_rows(dlogprob if scale is None else dlogprob / scale, rows)
    report: dict[str, torch.Tensor] = {}
    if bounds is not None:
        grads, report = kernels.compact_backward(
            *operands, upstream, None, needs=needs, grad_tol=grad_tol, bounds=bounds,
            blocks=active // kernels.BOUND_ROWS, mass=None if mass is None else take_rows(mass, rows), **head,
        )  # fmt: skip
    else:
        grads = kernels.backward(
            *operands, None, upstream, None, None,
            need_hidden=needs.hidden, need_weight=needs.weight, need_bias=needs.bias, **head,
        )  # fmt: skip
    if scale is not None:
        grads = scaled_grads(grads, scale, torch.float32)
    if grads[0] is not None:
        grads = (scatter_rows(grads[0], rows, len(hidden)), *grads[1:])
    return grads, report
