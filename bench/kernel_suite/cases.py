"""What is measured: the classes of calls, their algorithmic cost, and which inputs each runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernel_suite.inputs import Inputs, mixture

if TYPE_CHECKING:
    from kernel_suite.providers import Provider

Results = dict[str, torch.Tensor]
KINDS = ("logprob", "mean", "loss", "teachers", "full_vocab")


class Case(NamedTuple):
    """One kind of call. `models`: frozen models beside the student (teachers: instead of it)."""

    kind: str
    backward: bool = False
    models: int = 0

    @property
    def name(self) -> str:
        if self.kind in ("teachers", "full_vocab"):
            return f"{self.kind}_{self.models}"
        return f"{self.kind}_{'forward_backward' if self.backward else 'forward'}"

    @property
    def frozen(self) -> int:
        """Frozen models whose logits are needed; a reference with a coefficient counts."""
        return len(mixture(self.models)[1]) if self.kind == "full_vocab" else self.models

    @property
    def gemms(self) -> int:
        """Head GEMMs that the result needs, 2·N·V·D FLOP each: one per model, and two more for gradients."""
        return (self.kind != "teachers") * (3 if self.backward else 1) + self.frozen

    def run(self, provider: Provider, x: Inputs) -> Results:
        """logprob [N] or [K, N], or loss; with a backward also grad_hidden [N, D] and grad_weight [V, D]."""
        if not self.backward:
            with torch.no_grad():
                return {self.result: self._call(provider, x, x.hidden, x.weight)}
        leaves = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        out = self._call(provider, x, *leaves)
        grads = torch.autograd.grad(out, leaves, x.upstream.to(out.dtype) if self.kind == "logprob" else None)
        return {self.result: out.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]}

    @property
    def result(self) -> str:
        return "logprob" if self.kind in ("logprob", "teachers") else "loss"

    def _call(self, provider: Provider, x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        call = provider.offer(self)
        if isinstance(call, str):
            raise LookupError(f"{provider.name} has no {self.name}: {call}")
        match self.kind:
            case "logprob" | "mean":
                return call(hidden, weight, x.targets)
            case "teachers":
                return call(x.teacher_hiddens[: self.models], x.teacher_weights[: self.models], x.targets)
            case "full_vocab":
                return call(x, hidden, weight, self.models)
        return call(x, hidden, weight)


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("logprob"),
        Case("logprob", backward=True),
        Case("mean", backward=True),
        Case("loss"),
        Case("loss", backward=True),
        *(Case("teachers", models=K) for K in (1, 2, 4, 8)),
        *(Case("full_vocab", backward=True, models=K) for K in (1, 2)),
    )
}
# On the other inputs only what depends on the distribution.
BACKWARD_CASES = ("logprob_forward_backward", "loss_forward_backward")
CASES_OF = {"real_low": ("logprob_forward", *BACKWARD_CASES)}
# A process of its own for each, and compiling in it.
MEMORY_CASES = ("logprob_forward", "logprob_forward_backward", "mean_forward_backward", "loss_forward_backward")


def cases_of(source: str, first_shape: bool) -> list[Case]:
    """Several models and the whole vocabulary are measured on the first random shape only."""
    if source != "random":
        return [CASES[name] for name in CASES_OF.get(source, BACKWARD_CASES)]
    return [case for case in CASES.values() if first_shape or not case.models]
