"""Problems whose float64 truth is cheap at any number of rows, and every public operation as a function of one.

A row of a problem is a copy of one of few distinct rows, with a weight of its own. All objectives are linear in the
weights, so the truth needs the distinct rows alone: with the copies' weights summed the loss and the gradients of
weight and bias are those of all rows, and a row's gradient of hidden is its share of that of its original. A kernel
that reads or writes a wrong row meets another original, or another weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpu_mode import DEVICE, sized
from tcopd_kernels import (
    full_vocab_tcopd_loss,
    linear_logprob,
    linear_tcopd_loss,
    linear_tcopd_step,
    multi_linear_logprob,
    reference,
    topk_tcopd_loss,
)

ORIGINALS = sized(64, 16)
TOP = sized(20, 5)


class Problem(NamedTuple):
    """hiddens [N, D_m], heads [V, D_m] and biases [V] of the student, two teachers and the reference; per row the rest.

    lambdas: [2, N].   top: TOP tokens of the first teacher, [N, TOP].   top_logprobs: of teachers and reference there,
    [3, N, TOP].
    """

    hiddens: list[torch.Tensor]
    heads: list[torch.Tensor]
    biases: list[torch.Tensor]
    targets: torch.Tensor
    advantage: torch.Tensor
    old_logprob: torch.Tensor | None
    rollout_logprob: torch.Tensor | None
    lambdas: torch.Tensor
    top: torch.Tensor
    top_logprobs: torch.Tensor
    weights: torch.Tensor

    def rows(self, places: torch.Tensor, weights: torch.Tensor) -> Problem:
        """These rows, in this order, with weights of their own."""
        old, rollout = (None if t is None else t[places] for t in (self.old_logprob, self.rollout_logprob))
        return Problem(
            [h[places] for h in self.hiddens], self.heads, self.biases, self.targets[places], self.advantage[places],
            old, rollout, self.lambdas[:, places], self.top[places], self.top_logprobs[:, places], weights,
        )  # fmt: skip

    def wide(self) -> Problem:
        """In float64."""

        def double(value: Any) -> Any:
            if isinstance(value, list):
                return [double(v) for v in value]
            return value.double() if value is not None and value.is_floating_point() else value

        return Problem(*map(double, self))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def make_originals(vocab, dims, dtype, *, n=ORIGINALS, level=0.0, scale=1.0, peaked=False, on_policy=False, **head):
    """n rows of weight 1. level: added to all logits.   scale: of the logits.   peaked: Zipf-like, the first tokens
    far above the others.   head: temperature and softcap, which the old logprobs depend on."""
    gen = generator(vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, device=DEVICE)

    slope = -3.0 * torch.arange(1, vocab + 1, device=DEVICE).log() if peaked else torch.zeros(vocab, device=DEVICE)
    hiddens = [normal(n, dim).to(dtype) for dim in dims]
    heads = [(normal(vocab, dim) * (scale * 2 / dim**0.5)).to(dtype) for dim in dims]
    biases = [(slope + level + 0.1 * normal(vocab)).to(dtype) for _ in dims]
    targets = torch.randint(0, vocab, (n,), generator=gen, device=DEVICE)
    targets[0], targets[1] = vocab - 1, 0
    stats = [
        torch.log_softmax(reference.head_logits(h.double(), w.double(), b.double(), **head), 1)
        for h, w, b in zip(hiddens, heads, biases, strict=True)
    ]
    logprob = stats[0].gather(1, targets[:, None])[:, 0].float()
    old, engine = logprob + 0.3 * normal(n), 0.1 * normal(n)
    top = stats[1].topk(TOP, 1).indices
    lambdas = normal(2, n)
    lambdas[1, ::3] = 0.0
    return Problem(
        hiddens, heads, biases, targets, normal(n), None if on_policy else old, None if on_policy else old + engine,
        lambdas, top, torch.stack([s.gather(1, top) for s in stats[1:]]).float(), torch.ones(n, device=DEVICE),
    )  # fmt: skip


def make_copies(originals, n):
    """(n rows, the original of each, the originals with the weights of their copies). Every fifth row is masked, and
    what it holds is not to be read. The weights are those of 64 rows: with 1/n float16 gradients would be subnormal."""
    gen = generator(n)
    places = torch.randint(0, len(originals.weights), (n,), generator=gen, device=DEVICE)
    weights = (0.5 + torch.rand(n, generator=gen, device=DEVICE)) / 64
    weights[3::5] = 0.0
    rows = originals.rows(places, weights)
    rows.targets[3::5] = -100
    for hidden in rows.hiddens:
        hidden[3::5] = torch.nan
    summed = torch.zeros_like(originals.weights).double().index_add_(0, places, weights.double())
    return rows, places, originals._replace(weights=summed)


def _logprob(p: Problem, *, backend="triton", temperature=1.0, softcap=None, **options):
    certificate: dict[str, torch.Tensor] = {}
    out = linear_logprob(
        p.hiddens[0], p.heads[0], p.targets, bias=p.biases[0], temperature=temperature, softcap=softcap,
        backend=backend, certificate=certificate, **options,
    )  # fmt: skip
    objective = out.logprob - 0.5 * out.lse
    if out.entropy is not None:
        objective = objective + 0.7 * out.entropy
    return (p.weights * objective).sum(), [t for t in out if t is not None], certificate


def _loss(p: Problem, *, backend="triton", **options):
    loss, metrics, out = linear_tcopd_loss(
        p.hiddens[0], p.heads[0], p.targets, bias=p.biases[0], advantage=p.advantage, old_logprob=p.old_logprob,
        rollout_logprob=p.rollout_logprob, weights=p.weights, backend=backend, **options,
    )  # fmt: skip
    return loss, [t for t in out if t is not None], metrics


def _frozen(p: Problem, softcap) -> dict[str, Any]:
    """The other models as keyword arguments; every second one has a soft-cap."""
    return {
        "ref_hidden": p.hiddens[3], "ref_weight": p.heads[3], "ref_bias": p.biases[3], "ref_softcap": softcap,
        "teacher_hiddens": p.hiddens[1:3], "teacher_weights": p.heads[1:3], "teacher_biases": p.biases[1:3],
        "teacher_softcaps": [softcap, None], "lambdas": p.lambdas, "weights": p.weights, "softcap": softcap,
    }  # fmt: skip


def _step(p: Problem, *, backend="triton", softcap=None, **options):
    loss, metrics, tokens = linear_tcopd_step(
        p.hiddens[0], p.heads[0], p.targets, bias=p.biases[0], old_logprob=p.old_logprob,
        rollout_logprob=p.rollout_logprob, backend=backend, **_frozen(p, softcap), **options,
    )  # fmt: skip
    return loss, [t for t in tokens if t is not None], metrics


def _multi(p: Problem, *, backend="triton", softcap=None, **options):
    logprobs = multi_linear_logprob(
        p.hiddens, p.heads, p.targets, biases=p.biases, softcaps=[softcap, softcap, None, softcap], backend=backend,
        **options,
    )  # fmt: skip
    return None, [logprobs], {}


def _full_vocab(p: Problem, *, backend="triton", softcap=None, **options):
    loss, metrics = full_vocab_tcopd_loss(
        p.hiddens[0], p.heads[0], bias=p.biases[0], normalizer="none", backend=backend, **_frozen(p, softcap), **options
    )
    return loss, [], metrics


def _topk(p: Problem, *, backend="auto", **options):
    loss, metrics = topk_tcopd_loss(
        p.hiddens[0], p.heads[0], p.top, p.top_logprobs[2], p.top_logprobs[:2], p.lambdas, weights=p.weights,
        bias=p.biases[0], backend=backend, **options,
    )  # fmt: skip
    return loss, [], metrics


OPERATIONS = {
    "logprob": _logprob,
    "loss": _loss,
    "step": _step,
    "multi": _multi,
    "full_vocab": _full_vocab,
    "topk": _topk,
}


class Results(NamedTuple):
    """loss and gradients of the student's hidden, weight and bias, or none; values per row; metrics."""

    grads: list[torch.Tensor]
    tokens: list[torch.Tensor]
    metrics: dict[str, torch.Tensor]


def run(operation: str, problem: Problem, **options) -> Results:
    student = [t[0].detach().requires_grad_() for t in problem[:3]]
    leaves = ([leaf, *others[1:]] for leaf, others in zip(student, problem[:3], strict=True))
    loss, tokens, metrics = OPERATIONS[operation](Problem(*leaves, *problem[3:]), **options)
    grads = [] if loss is None else [loss.detach(), *torch.autograd.grad(loss, student)]
    return Results(grads, [t.detach() for t in tokens], metrics)


def exact(operation: str, originals: Problem, places: torch.Tensor, weights: torch.Tensor, **options) -> Results:
    """The truth in float64 for the copies `places` with `weights`, of originals that hold the sums of the weights."""
    wide = originals.wide()
    grads, tokens, metrics = run(operation, wide, backend="reference", **options)
    if grads:
        share = weights.double() / wide.weights[places]
        grads[1] = torch.where(weights[:, None] != 0, share[:, None] * grads[1][places], 0.0)
    counted = weights != 0
    return Results(grads, [torch.where(counted, t[..., places], 0.0) for t in tokens], metrics)
