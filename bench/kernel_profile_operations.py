"""The calls that bench/kernel_profile.py measures, and which rows of bench/roofline_model.py predict their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import roofline_model as model
import torch
from tcopd_kernels import full_vocab_tcopd_loss, linear_logprob, linear_tcopd_loss, multi_linear_logprob

LOGIT_STD = 2.0
GRAD_TOL = 2.0**-8
PRODUCTS = "products"  # stands for the matrix products of cuBLAS


@dataclass(frozen=True)
class Inputs:
    """Gaussian models on the same tokens: hiddens [N, D] and weights [V, D], the student first; vectors [N]."""

    hiddens: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    advantage: torch.Tensor
    token_weights: torch.Tensor
    backend: str

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hiddens[0].detach().requires_grad_(), self.weights[0].detach().requires_grad_()


def make_inputs(shape: model.Shape, dtype: torch.dtype, device: torch.device, backend: str) -> Inputs:
    gen = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, device=device, dtype=dtype).normal_(generator=gen).mul_(scale)

    N, V, D, models = shape.N, shape.V, shape.D, range(1 + shape.frozen)
    hiddens = tuple(normal(N, D, dtype=dtype) for _ in models)
    weights = tuple(normal(V, D, scale=LOGIT_STD / D**0.5, dtype=dtype) for _ in models)
    targets = torch.randint(0, V, (N,), generator=gen, device=device)
    advantage = normal(N).sign() + 0.1  # nowhere 0, so that every token has a gradient
    return Inputs(hiddens, weights, targets, advantage, torch.full((N,), 1 / N, device=device), backend)


@dataclass(frozen=True)
class Operation:
    """One call. predicted: function name of a kernel, or PRODUCTS -> its row in roofline_model."""

    name: str
    call: Callable[[Inputs], object]
    predicted: Mapping[str, str]


def logprob(x: Inputs) -> object:
    with torch.no_grad():
        return linear_logprob(x.hiddens[0], x.weights[0], x.targets, backend=x.backend)


def recomputing(x: Inputs) -> object:
    """Forward with entropy and backward; all the upstream gradients are there."""
    leaves = x.leaves()
    out = linear_logprob(*leaves, x.targets, entropy=True, backend=x.backend)
    return torch.autograd.grad([out.logprob, out.entropy], leaves, [x.advantage, x.token_weights])


def single_pass(x: Inputs) -> object:
    leaves = x.leaves()
    loss, _, _ = linear_tcopd_loss(
        *leaves, x.targets, advantage=x.advantage, weights=x.token_weights, backend=x.backend
    )
    return torch.autograd.grad(loss, leaves)


def bounds(x: Inputs) -> object:
    """The forward alone of a call with grad_tol; its kernel runs once more, over 1024 columns, before the pass."""
    return linear_logprob(*x.leaves(), x.targets, grad_tol=GRAD_TOL, backend=x.backend)


def several(x: Inputs) -> object:
    return multi_linear_logprob(x.hiddens, x.weights, x.targets, launch="joint", backend=x.backend)


def full_vocab(x: Inputs) -> object:
    """Two frozen models whose coefficients sum to 1, so that no reference is run."""
    leaves = x.leaves()
    loss, _ = full_vocab_tcopd_loss(
        *leaves, None, None, x.hiddens[1:], x.weights[1:], (1.5, -0.5), weights=x.token_weights, normalizer="none",
        backend=x.backend,
    )  # fmt: skip
    return torch.autograd.grad(loss, leaves)


# The most telling first. The names that bench/roofline_model.py has as well are its operations.
OPERATIONS = (
    Operation("logprob, forward", logprob, {"forward_kernel": "forward, plain", "combine_kernel": "combine"}),
    Operation(
        "logprob and entropy, forward and backward (recomputing)", recomputing,
        {
            "forward_kernel": "forward, entropy", "combine_kernel": "combine", "dlogits_kernel": "dlogits",
            PRODUCTS: "products dH and dW (cuBLAS)",
        },
    ),
    Operation(
        "loss, forward and backward (single pass)", single_pass,
        {
            "keep_kernel": "keep", "dlogits_kernel": "dlogits in place",
            PRODUCTS: "products dH and dW of the kept form (cuBLAS)",
        },
    ),
    Operation("logprob with column bounds, forward", bounds, {"forward_kernel": "forward, compact"}),
    Operation("3 models in one launch", several, {"multi_kernel": "3 models in one launch"}),
    Operation(
        "full vocabulary, 2 frozen, forward and backward", full_vocab,
        {
            "mixture_forward_kernel": "full vocabulary forward, 2 frozen",
            "mixture_dlogits_kernel": "full vocabulary dlogits, 2 frozen",
            PRODUCTS: "products dH and dW (cuBLAS)",
        },
    ),
)  # fmt: skip
