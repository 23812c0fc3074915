"""The implementations that are measured, each called the way its own documentation or trainer calls it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tcopd_kernels import (
    full_vocab_tcopd_loss,
    linear_logprob,
    linear_tcopd_loss,
    multi_linear_logprob,
    tcopd_policy_loss,
)

from kernel_suite import peers
from kernel_suite.cases import CASES, KINDS, Case
from kernel_suite.inputs import Inputs, mixture
from kernel_suite.peers import Logprob

GRAD_TOL = 2.0**-8
OURS = ("ours_torch", "ours_torch_tol", "ours_triton", "ours_triton_tol")
NO_KERNEL = "this package has no such kernel"
NO_CUDA = "Triton or CUDA kernels, which need an NVIDIA GPU"
CROSS_ENTROPY = "a cross-entropy without a policy loss"
ONE_TEACHER = {"full_vocab_2": "reverse KL to one teacher is its only such objective"}


@dataclass(frozen=True)
class Provider:
    """One implementation. A kind of call that it does not offer holds the reason instead of a function."""

    name: str
    logprob: Logprob | str = NO_KERNEL  # (hidden, weight, targets) -> [N]
    mean: Logprob | str = NO_KERNEL  # (hidden, weight, targets) -> mean negative logprob
    loss: Callable[[Inputs, torch.Tensor, torch.Tensor], torch.Tensor] | str = NO_KERNEL
    teachers: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor], torch.Tensor] | str = NO_KERNEL
    full_vocab: Callable[[Inputs, torch.Tensor, torch.Tensor, int], torch.Tensor] | str = NO_KERNEL
    # Of the last call, if it left anything out.
    certificate: dict[str, torch.Tensor] = field(default_factory=dict)
    # Reasons against single cases of a kind that is offered.
    without: Mapping[str, str] = field(default_factory=dict)

    def offer(self, case: Case) -> Callable[..., torch.Tensor] | str:
        """The function for this case, or why there is none."""
        return self.without.get(case.name) or getattr(self, case.kind)


def plain(name: str, transform: Callable[[Callable], Callable] = lambda function: function) -> Provider:
    """What trainers without a fused head do: logits in the input's dtype, log_softmax in fp32."""

    def log_softmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax((hidden @ weight.T).float(), dim=-1)

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return log_softmax(hidden, weight).gather(1, targets.unsqueeze(1)).squeeze(1)

    def mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)

    @transform
    def head_loss(hidden, weight, targets, advantage, old_logprob, weights):
        token_logprob = logprob(hidden, weight, targets)
        return tcopd_policy_loss(token_logprob, advantage, old_logprob=old_logprob, weights=weights)[0]

    @transform
    def mixture_loss(hidden, weight, hiddens, heads, coefficients, weights):
        with torch.no_grad():
            target = sum(a * log_softmax(h, w) for a, h, w in zip(coefficients, hiddens, heads))
        log_p = log_softmax(hidden, weight)
        return (weights * (log_p.exp() * (log_p - target)).sum(1)).sum()

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return head_loss(hidden, weight, x.targets, x.advantage, x.old_logprob, x.weights)

    def full_vocab(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        _, coefficients = mixture(K)
        frozen = x.teacher_hiddens[: len(coefficients)], x.teacher_weights[: len(coefficients)]
        return mixture_loss(hidden, weight, *frozen, coefficients, x.weights)

    alone = transform(logprob)
    return Provider(name, alone, transform(mean), loss, in_turn(alone), full_vocab)


def in_turn(logprob: Logprob) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Several models with the function for one."""
    return lambda hiddens, heads, targets: torch.stack([logprob(h, w, targets) for h, w in zip(hiddens, heads)])


def on_logprob(logprob: Logprob) -> Callable[[Inputs, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The policy loss on logprobs, as trainers without a fused loss have it."""

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        token_logprob = logprob(hidden, weight, x.targets)
        return tcopd_policy_loss(token_logprob, x.advantage, old_logprob=x.old_logprob, weights=x.weights)[0]

    return loss


def ours(name: str, backend: str, grad_tol: float = 0.0) -> Provider:
    report: dict[str, torch.Tensor] = {}
    options: dict[str, Any] = {"grad_tol": grad_tol, "backend": backend}

    def keep_certificate(metrics: dict[str, torch.Tensor]) -> None:
        report.clear()
        report.update({key: value for key, value in metrics.items() if key in CERTIFICATE})

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        report.clear()
        return linear_logprob(hidden, weight, targets, certificate=report, **options).logprob

    def policy(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, metrics, stats = linear_tcopd_loss(hidden, weight, targets, **tokens, **options)
        keep_certificate(metrics)
        return loss, stats.logprob

    def mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """On-policy with advantage 1 the gradient is that of the mean negative logprob; the loss itself is −1."""
        one = hidden.new_ones(len(targets), dtype=torch.float32)
        weights = one / len(targets)
        loss, token_logprob = policy(hidden, weight, targets, advantage=one, weights=weights)
        return loss + (1 - (weights * token_logprob).sum())

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tokens = {"advantage": x.advantage, "old_logprob": x.old_logprob, "weights": x.weights}
        return policy(hidden, weight, x.targets, **tokens)[0]

    def teachers(hiddens: Sequence[torch.Tensor], heads: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return multi_linear_logprob(hiddens, heads, targets, backend=backend)

    def full_vocab(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        lambdas, coefficients = mixture(K)
        ref = (x.teacher_hiddens[K], x.teacher_weights[K]) if len(coefficients) > K else (None, None)
        frozen = x.teacher_hiddens[:K], x.teacher_weights[:K]
        loss, metrics = full_vocab_tcopd_loss(hidden, weight, *ref, *frozen, lambdas, weights=x.weights, **options)
        keep_certificate(metrics)
        return loss

    several = "forward only, the same call as without grad_tol" if grad_tol else teachers
    return Provider(name, logprob, mean, loss, several, full_vocab, report)


CERTIFICATE = ("dropped_mass_sum", "dropped_mass_max", "dense_row_count", "grad_row_count", "kept_column_sum")


def torch_lce() -> Provider:
    nll = peers.torch_lce("none")

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -nll(hidden, weight, targets)

    return Provider("torch_lce", logprob, peers.torch_lce("mean"), CROSS_ENTROPY, in_turn(logprob))


def liger() -> Provider:
    logprob = peers.liger_logprob()
    mean = peers.liger_mean() if torch.cuda.is_available() else NO_CUDA
    losses = peers.liger_grpo_loss(), in_turn(logprob), peers.liger_jsd_loss()
    return Provider("liger", logprob, mean, *losses, without=ONE_TEACHER)


def cce(name: str, impl: str, **options: Any) -> Provider:
    logprob, mean = peers.cce(impl, **options)
    if impl == "cce" and not torch.cuda.is_available():
        return Provider(name, *[NO_CUDA] * len(KINDS))
    return Provider(name, logprob, mean, CROSS_ENTROPY, in_turn(logprob))


def trl() -> Provider:
    logprob = peers.trl_logprob()
    loss, full_vocab = on_logprob(logprob), peers.trl_divergence_loss()
    return Provider("trl", logprob, NO_KERNEL, loss, in_turn(logprob), full_vocab, without=ONE_TEACHER)


def verl(name: str) -> Provider:
    logprob = peers.verl_triton_logprob() if name == "verl_triton" else peers.verl_torch_logprob()
    if name == "verl_triton" and not torch.cuda.is_available():
        return Provider(name, *[NO_CUDA] * len(KINDS))
    return Provider(name, logprob, NO_KERNEL, on_logprob(logprob), in_turn(logprob))


def quack() -> Provider:
    """Its chunked loss offers the reductions mean and sum only."""
    mean = peers.quack_mean()
    if not torch.cuda.is_available():
        return Provider("quack", *[NO_CUDA] * len(KINDS))
    reason = "offers the reductions mean and sum only, no gradient per token"
    return Provider("quack", reason, mean, reason, reason)


PROVIDERS: dict[str, Callable[[], Provider]] = {
    "eager": lambda: plain("eager"),
    "compile": lambda: plain("compile", peers.compiled),
    "torch_lce": torch_lce,
    "liger": liger,
    "cce": lambda: cce("cce", "cce"),
    "cce_exact": lambda: cce("cce_exact", "cce", filter_eps=None),
    "cce_torch_compile": lambda: cce("cce_torch_compile", "torch_compile"),
    "trl": trl,
    "verl_torch": lambda: verl("verl_torch"),
    "verl_triton": lambda: verl("verl_triton"),
    "quack": quack,
    "ours_torch": lambda: ours("ours_torch", "torch"),
    "ours_torch_tol": lambda: ours("ours_torch_tol", "torch", GRAD_TOL),
    "ours_triton": lambda: ours("ours_triton", "triton"),
    "ours_triton_tol": lambda: ours("ours_triton_tol", "triton", GRAD_TOL),
}
PACKAGE_OF = {
    "liger": "liger-kernel", "cce": "cut-cross-entropy", "cce_exact": "cut-cross-entropy",
    "cce_torch_compile": "cut-cross-entropy", "trl": "trl", "verl_torch": "verl", "verl_triton": "verl",
    "quack": "quack-kernels",
}  # fmt: skip


def installed(name: str) -> bool:
    return name not in PACKAGE_OF or any(importlib.metadata.distributions(name=PACKAGE_OF[name]))


def reason_not_here(name: str) -> str | None:
    """Why a provider cannot run on this machine at all, or None."""
    if not installed(name):
        return f"the package {PACKAGE_OF[name]} is not installed"
    if name == "torch_lce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return NO_CUDA if name.startswith("ours_triton") and not runs else None


def make_providers(names: Sequence[str]) -> tuple[dict[str, Provider], dict[str, dict[str, Any]]]:
    """The providers that can be made here, and for every name its package and what it offers or why not."""
    providers: dict[str, Provider] = {}
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        package = PACKAGE_OF.get(name)
        about: dict[str, Any] = {"package": package, "version": version_of(package)}
        reason = reason_not_here(name)
        if reason is None:
            try:
                providers[name] = PROVIDERS[name]()
            # A peer that cannot be imported beside these versions must not stop the others.
            except Exception as error:
                if name in OURS:
                    raise
                reason = summary(error)
        offers = {case.name: reason or providers[name].offer(case) for case in CASES.values()}
        about["offers"] = {case: offer if isinstance(offer, str) else "runs" for case, offer in offers.items()}
        report[name] = about
    return providers, report


def version_of(package: str | None) -> str | None:
    try:
        return None if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
