"""One small problem for every group of Triton kernels, each computed by them and, in float64, by the reference.

Every group has two cases: "plain" with widths that TMA can load, and "options" with odd widths, which take the pointer
path, and with every option on: bias, soft-cap, temperature, entropy, masked tokens. All sizes are ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import torch
from tcopd_kernels import (
    _triton_forward,
    _triton_full_vocab,
    _triton_loss,
    full_vocab_tcopd_loss,
    linear_logprob,
    linear_tcopd_loss,
    linear_tcopd_step,
    multi_linear_logprob,
)
from tcopd_kernels._triton_forward import vocab_splits

GRAD_TOL, GRAD_TOL_NATS = 2.0**-5, 2.0**-9
OUTPUT_LIMIT = 1e-3
GRADIENT_LIMIT = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float32: 1e-4}
COMPACT_LIMIT = 0.2  # the gradients leave out up to GRAD_TOL of each token's probability
ALIGNED_WIDTHS, ODD_WIDTHS = (72, 64, 40, 72), (101, 33, 65, 101)
SIZES = {"cuda": (190, 2001), "cpu": (36, 165)}  # N over 64, for the large tiles
# As on a GPU of this many multiprocessors: so few programs that each walks several tiles, as it does at full size.
PROCESSORS = 2

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """M models: hiddens [N, D_m], weights [V, D_m], biases [V]; the first is the student, the last the reference.

    targets [N], -100 at some tokens; per-token vectors [N]. options: whether all options are on.
    """

    hiddens: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    token_weights: torch.Tensor
    advantage: torch.Tensor
    old_logprob: torch.Tensor
    upstream: torch.Tensor
    options: bool
    backend: str = "triton"

    def exact(self) -> Inputs:
        """The same for the reference, in float64."""
        lists = {name: tuple(t.double() for t in getattr(self, name)) for name in ("hiddens", "weights", "biases")}
        vectors = {
            name: getattr(self, name).double() for name in ("token_weights", "advantage", "old_logprob", "upstream")
        }
        return replace(self, **lists, **vectors, backend="reference")

    def head(self) -> dict[str, float | None]:
        return {"temperature": 0.7, "softcap": 12.0} if self.options else {}

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """hidden, weight and, with options, bias of the student, as leaves that need gradients."""
        first = (self.hiddens[0], self.weights[0], self.biases[0])
        return tuple(t.detach().clone().requires_grad_() for t in first[: 2 + self.options])


def make_inputs(options: bool, peaked: bool, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Ids have a Zipf prior, and targets are likely. peaked: so much that compaction leaves out most columns."""
    N, V = SIZES[device.type]
    gen = torch.Generator().manual_seed(N + options)
    prior = torch.arange(1, V + 1).log()
    targets = torch.multinomial((-1.5 * prior).exp(), N, replacement=True, generator=gen)
    hiddens, weights = [], []
    for D in ODD_WIDTHS if options else ALIGNED_WIDTHS:
        weight = torch.randn(V, D, generator=gen) / D**0.5
        weight[:, 0] = -prior / 4
        hidden = 0.05 * torch.randn(N, D, generator=gen) + (16.0 if peaked else 4.0) * weight[targets]
        hidden[:, 0] = 8.0
        hiddens.append(hidden.to(device, dtype))
        weights.append(weight.to(device, dtype))
    biases = tuple((0.1 * torch.randn(V, generator=gen)).to(device, dtype) for _ in weights)
    token_weights = (0.5 + torch.rand(N, generator=gen)) / N
    advantage = torch.randn(N, generator=gen).sign() * (0.5 + torch.rand(N, generator=gen))
    old_logprob = -3.0 * torch.rand(N, generator=gen)
    if options:
        targets[::7], token_weights[1::7], advantage[2::7] = -100, 0.0, 0.0
    upstream = torch.randn(3, N, generator=gen)
    vectors = (t.to(device) for t in (targets, token_weights, advantage, old_logprob, upstream))
    return Inputs(tuple(hiddens), tuple(weights), biases, *vectors, options)


def gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> Results:
    names = ("grad_hidden", "grad_weight", "grad_bias")
    return dict(zip(names, torch.autograd.grad(loss, leaves)))


def bias_of(leaves: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    return leaves[2] if len(leaves) == 3 else None


def logprob(x: Inputs, grad_tol: float = 0.0) -> Results:
    """linear_logprob and its gradients: forward, combine, finish and dlogits kernel."""
    leaves = x.leaves()
    entropy = x.options and not grad_tol  # a gradient of the entropy would make the backward exact
    out = linear_logprob(
        leaves[0], leaves[1], x.targets, bias=bias_of(leaves), entropy=entropy, grad_tol=grad_tol,
        backend=x.backend, **x.head(),
    )  # fmt: skip
    values = {name: value for name, value in out._asdict().items() if value is not None}
    loss = sum((g * value).sum() for g, value in zip(x.upstream, values.values()))
    return {name: value.detach() for name, value in values.items()} | gradients(loss, leaves)


def compact(x: Inputs) -> Results:
    """linear_logprob with grad_tol: column bounds, target logits, dlogits with the mass of rows."""
    return logprob(x, GRAD_TOL)


def loss(x: Inputs) -> Results:
    """The single pass of the policy loss: keep kernel and dlogits in place."""
    leaves = x.leaves()
    value, _, stats = linear_tcopd_loss(
        leaves[0], leaves[1], x.targets, advantage=x.advantage, old_logprob=x.old_logprob if x.options else None,
        weights=x.token_weights, bias=bias_of(leaves), entropy=x.options, backend=x.backend, **x.head(),
    )  # fmt: skip
    return {"loss": value.detach(), "logprob": stats.logprob} | gradients(value, leaves)


def several(x: Inputs) -> Results:
    """Log-probabilities of several models in one launch: multi and merge kernel."""
    options = {"biases": (None, *x.biases[1:]), "softcaps": (None, 10.0, *[None] * 2)} if x.options else {}
    found = multi_linear_logprob(x.hiddens, x.weights, x.targets, launch="joint", backend=x.backend, **options)
    return {"logprob": found}


def step(x: Inputs) -> Results:
    """A whole TC-OPD step: multi and finalize kernel, then the gradients."""
    leaves = x.leaves()
    N = len(x.targets)
    lambdas = torch.tensor([1.5, -0.5], device=x.targets.device).repeat(N, 1).T.contiguous()
    given: dict = {}
    ref: tuple = (None, None)
    if x.options:
        lambdas[1, ::3] = 0.0
        ref = (x.hiddens[3], x.weights[3])
        given = {
            "old_logprob": x.old_logprob, "rollout_logprob": x.old_logprob - 0.1, "ref_kl_coef": 0.05,
            "ref_bias": x.biases[3], "teacher_softcaps": [None, 9.0],
            "teacher_ref_hiddens": [None, x.hiddens[0]], "teacher_ref_weights": [None, x.weights[0]],
        }  # fmt: skip
    value, _, tokens = linear_tcopd_step(
        leaves[0], leaves[1], x.targets, *ref, x.hiddens[1:3], x.weights[1:3], lambdas, weights=x.token_weights,
        normalizer="none", bias=bias_of(leaves), launch="joint", backend=x.backend, **given, **x.head(),
    )  # fmt: skip
    results = {name: getattr(tokens, name) for name in ("logprob", "teacher_logprobs", "reward", "advantage")}
    return results | {"loss": value.detach()} | gradients(value, leaves)


def full_vocab(x: Inputs, grad_tol: float = 0.0) -> Results:
    """The loss over the whole vocabulary: the three mixture kernels."""
    leaves = x.leaves()
    lambdas = (1.4, -0.6) if x.options else (1.0,)  # without options the reference cancels
    ref = (x.hiddens[3], x.weights[3]) if x.options else (None, None)
    K = len(lambdas)
    given = {"ref_bias": x.biases[3], "teacher_biases": x.biases[1:3], "ref_softcap": 8.0} if x.options else {}
    value, metrics = full_vocab_tcopd_loss(
        leaves[0], leaves[1], *ref, x.hiddens[1 : 1 + K], x.weights[1 : 1 + K], lambdas, weights=x.token_weights,
        normalizer="none", bias=bias_of(leaves), grad_tol=grad_tol, likely_tokens=x.targets, backend=x.backend,
        **given, **x.head(),
    )  # fmt: skip
    return {"loss": value.detach(), "entropy_sum": metrics["entropy_sum"]} | gradients(value, leaves)


def full_vocab_compact(x: Inputs) -> Results:
    """The same with grad_tol: bounds in the forward, sums over rows in the backward."""
    return full_vocab(x, GRAD_TOL_NATS)


GROUPS: Mapping[str, Callable[[Inputs], Results]] = {
    function.__name__: function for function in (logprob, compact, loss, several, step, full_vocab, full_vocab_compact)
}
CASES = tuple(f"{group}/{kind}" for group in GROUPS for kind in ("plain", "options"))


def run_case(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Results, dict[str, float]]:
    """(results of the Triton kernels, their errors relative to float64 where they are above the limit).

    Raises KeyError for an unknown name.
    """
    group, _, kind = name.partition("/")
    compacts = "compact" in group
    x = make_inputs(kind == "options", compacts, dtype, device)
    with ExitStack() as stack:
        for module in (_triton_forward, _triton_full_vocab, _triton_loss):
            stack.enter_context(mock.patch.object(module, "vocab_splits", few_splits))
        found = GROUPS[group](x)
    return found, excess(found, GROUPS[group](x.exact()), COMPACT_LIMIT if compacts else None)


def few_splits(row_blocks: int, vocab_tiles: int, multiprocessors: int) -> tuple[int, int]:
    return vocab_splits(row_blocks, vocab_tiles, PROCESSORS)


def excess(found: Results, exact: Results, gradient_limit: float | None) -> dict[str, float]:
    """‖Δ‖/‖·‖ of the results that are further off than they may be; NaN counts as that.

    Outputs near 0, as logprobs of certain tokens, count as 0.01 each.
    """
    errors = {}
    for name, value in exact.items():
        least = 1e-30 if name.startswith("grad_") else 0.01 * value.numel() ** 0.5
        error = ((found[name].double() - value).norm() / value.norm().clamp_min(least)).item()
        limit = OUTPUT_LIMIT
        if name.startswith("grad_"):
            limit = gradient_limit or GRADIENT_LIMIT[found[name].dtype]
        if not error <= limit:
            errors[name] = error
    return errors
