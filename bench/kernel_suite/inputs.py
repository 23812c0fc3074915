"""Problems that all providers are measured on: N tokens, V vocabulary, D hidden, K frozen models."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from tcopd_kernels import linear_logprob

LOGIT_STD = 2.0
# Mean entropy in nats of the synthetic peaked problems.
PEAKED_ENTROPY = {"peaked_low": 0.5, "peaked_high": 3.0}
MAX_TEACHERS = 8


class Problem(NamedTuple):
    """Which inputs: `source` is random, peaked_low, peaked_high, real_low or real_high."""

    source: str
    N: int
    V: int
    D: int

    def __str__(self) -> str:
        return f"{self.source} {self.N}x{self.V}x{self.D}"


@dataclass(frozen=True)
class Inputs:
    """One problem; per-token vectors are [N], fp32 (float64 for the exact result)."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [N]
    upstream: torch.Tensor  # gradient of the loss with respect to each logprob
    advantage: torch.Tensor
    old_logprob: torch.Tensor
    weights: torch.Tensor  # 1/N
    teacher_hiddens: tuple[torch.Tensor, ...] = ()
    teacher_weights: tuple[torch.Tensor, ...] = ()

    def head(self, tokens: int) -> Inputs:
        """The first tokens alone."""
        per_token = {f.name: getattr(self, f.name)[:tokens] for f in fields(self) if f.name != "weight"}
        per_token["teacher_weights"] = self.teacher_weights
        per_token["teacher_hiddens"] = tuple(hidden[:tokens] for hidden in self.teacher_hiddens)
        return replace(self, **per_token)

    def double(self, teachers: int) -> Inputs:
        """The same in float64, with the first `teachers` frozen models."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        doubled = {name: v.double() for name, v in values.items() if torch.is_tensor(v) and v.is_floating_point()}
        frozen = {name: tuple(t.double() for t in values[name][:teachers]) for name in values if "teacher" in name}
        return replace(self, **doubled, **frozen)


def random_inputs(problem: Problem, device: torch.device, teachers: int) -> Inputs:
    """Gaussian problem, the same in every process: every token's distribution is flat, the worst case of grad_tol.

    Logits have standard deviation LOGIT_STD; importance ratios are near 1 or outside the clip range, none at its
    edges, where rounding would decide the gradient.
    """
    _, N, V, D = problem
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, device=device, dtype=dtype).normal_(generator=gen).mul_(scale)

    hidden, weight = normal(N, D, dtype=dtype), normal(V, D, scale=LOGIT_STD / D**0.5, dtype=dtype)
    targets = torch.randint(0, V, (N,), generator=gen, device=device)
    target_logit = (hidden.float() * weight[targets].float()).sum(1)
    lse = math.log(V) + LOGIT_STD**2 / 2 * hidden.float().square().mean(1)  # expected, for Gaussian logits
    offset = 0.6 * torch.randint(-1, 2, (N,), generator=gen, device=device)
    vectors = normal(N), normal(N), target_logit - lse + offset, torch.full((N,), 1 / N, device=device)
    hiddens = tuple(normal(N, D, dtype=dtype) for _ in range(teachers))
    heads = tuple(normal(V, D, scale=LOGIT_STD / D**0.5, dtype=dtype) for _ in range(teachers))
    return Inputs(hidden, weight, targets, *vectors, hiddens, heads)


@torch.no_grad()
def peaked_inputs(problem: Problem, device: torch.device) -> Inputs:
    """On-policy problem of a given mean entropy with tails like a language model's, where no trained one is at hand.

    Logits are a Zipf prior −1.5·log(rank), Gaussian noise of 1.5, and for one random token per row so much more that
    its odds against all others are normal around a common level, which bisection finds, with deviation 2. At 0.5
    nats about one row in ten has over 1.2, at 3 nats over 4. Targets are sampled; old_logprob is the policy's own.
    """
    x, entropy = random_inputs(problem, device, 0), PEAKED_ENTROPY[problem.source]
    N, V = problem.N, problem.V
    dtype = x.hidden.dtype
    gen = torch.Generator(device).manual_seed(1)
    weight, content = x.weight.float() / LOGIT_STD, x.hidden.float() * 1.5
    weight[:, 0] = -1.5 / 16 * torch.arange(1, V + 1, device=device).log()
    content[:, 0] = 16.0
    favoured = torch.randint(0, V, (N,), generator=gen, device=device)
    direction = weight[favoured].index_fill(1, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    direction /= direction.square().sum(1, keepdim=True)
    lift = 2.0 * torch.randn(N, generator=gen, device=device)
    lift -= linear_logprob(content, weight, favoured, backend="torch").logprob
    low, high = -15.0, 20.0
    for _ in range(12):
        level = (low + high) / 2
        hidden = content + (lift + level).unsqueeze(1) * direction
        found = linear_logprob(hidden, weight, favoured, entropy=True, backend="torch").entropy
        low, high = (level, high) if found is not None and found.mean() > entropy else (low, level)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    parts = [torch.softmax((h @ weight.T).float(), 1) for h in hidden.split(64)]
    targets = torch.cat([torch.multinomial(p, 1, generator=gen).squeeze(1) for p in parts])
    old = linear_logprob(hidden, weight, targets, backend="torch").logprob
    return replace(x, hidden=hidden, weight=weight, targets=targets, old_logprob=old)


def on_policy_inputs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, old: torch.Tensor) -> Inputs:
    """Problem from a model's own states, samples and their log-probabilities."""
    gen = torch.Generator().manual_seed(2)
    upstream, advantage = (torch.randn(len(targets), generator=gen).to(hidden.device) for _ in range(2))
    return Inputs(hidden, weight, targets, upstream, advantage, old, torch.full_like(old, 1 / len(targets)))


def mixture(teachers: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(λ of the teachers, signed coefficients of all frozen models, which sum to 1) of the full-vocabulary cases.

    One teacher with λ = 1 is the reverse KL, the only one that other packages offer.
    """
    return {1: ((1.0,), (1.0,)), 2: ((1.5, -0.5), (0.75, -0.25, 0.5))}[teachers]
