"""Distillation towards a signed mixture of models over the whole vocabulary, without sampling noise."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from . import _torch_full_vocab, reference
from ._backend import resolve_backend, without_autocast
from ._checks import (
    accumulation_dtype,
    check_device,
    check_head,
    check_head_options,
    check_number,
    check_sequence,
    check_vector,
    follow_autocast,
)
from ._full_vocab_compact import CompactionReport
from ._torch_full_vocab import Head, LossSums, Problem
from ._torch_grads import Needs
from ._torch_loss import AttachGradients
from .advantage import NORMALIZERS, expand_lambdas, normalizing_count

MAX_TRITON_MODELS = 4  # teachers and reference
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def full_vocab_tcopd_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    teacher_hiddens: Sequence[torch.Tensor | None],
    teacher_weights: Sequence[torch.Tensor | None],
    lambdas: torch.Tensor | Sequence[float],
    *,
    weights: torch.Tensor,
    normalizer: str = "active",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ref_bias: torch.Tensor | None = None,
    ref_softcap: float | None = None,
    teacher_biases: Sequence[torch.Tensor | None] | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    grad_tol: float = 0.0,
    likely_tokens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ_n weights_n L_n with the expectation over the next token taken exactly, in place of one sample of it.

        L_n = Σ_v π_θ(v) [log π_θ(v) − Σ_k a_kn log π_k(v) − a_ref,n log π_ref(v)]        ("reverse_kl")
        a_kn = λ_kn / Z_n,   a_ref,n = 1 − Σ_k a_kn        (they sum to 1; Z as in contrastive_advantage)

    Its gradient is the expectation of that of −A log π_θ over y ~ π_θ, with A from contrastive_advantage. With the
    normalised target q = Π_j π_j^{a_j} / Q_n, Q_n = Σ_v Π_j π_j(v)^{a_j}, over teachers and reference,
    L_n = KL(π_θ‖q) − log Q_n, and Q_n is a constant. The other divergences are those to q:

        "forward_kl"   L_n = KL(q‖π_θ),                          dL/dz_v = π_θ(v) − q(v)
        "jsd"          L_n = β KL(q‖m) + (1−β) KL(π_θ‖m),        m = β q + (1−β) π_θ
                       dL/dz_v = (1−β) π_θ(v) [log π_θ(v)/m(v) − KL(π_θ‖m)]

    with z the tempered logits ("jsd" as in GKD, Agarwal et al., 2024). Differentiable in hidden, weight and bias; the
    other models are constants. No [N, V] logits: the torch backend keeps two fp32 [rows, V] buffers of a bounded chunk
    of rows, the Triton backend no logits at all (it recomputes them for the gradients). The gradients are computed in
    the forward; the backward only scales them.

    With grad_tol > 0 columns that matter little in all rows of a chunk take no part in the gradient. Each row's loss

        g_n = Σ_dropped |dL_n/dx_nv|,   x the raw output of the head ("dropped_grad")
        r_n = Σ_dropped π_θ(v)                                       ("dropped_mass")

    is measured by the torch backend; the Triton backend, which knows no dropped column, reports the upper bound
    g_n ≤ (r_n · Σ_dropped π_θ(v) (d_v − L_n)²)^½ / temperature, d_v the bracket above. Rows with g_n > grad_tol (or
    that bound) are computed exactly, so that up to rounding

        ‖ΔdH_n‖ ≤ |weights_n| g_n max_v‖W_v‖,   ‖ΔdW‖_F ≤ Σ_n |weights_n| g_n ‖h_n‖,   ‖Δdb‖_1 ≤ Σ_n |weights_n| g_n

    The loss itself is always exact.

    Args:
        hidden: [N, D], weight: [V, D] of the student, one dtype; in an autocast region both are cast to its dtype,
            as are those of the other models.
        ref_hidden: [N, D_ref], ref_weight: [V, D_ref]; both may be None when every a_ref is 0 to within 1e-6.
        teacher_hiddens, teacher_weights: K tensors [N, D_k] and [V, D_k]; an entry may be None when its λ is
            0 at every token. Rows where λ is 0 may hold anything, and the torch backend does not multiply them.
        lambdas: K numbers, a tensor [K], or [K, N].
        weights: [N] mask and normaliser in one; rows of weight 0 take no part, whatever they hold.
        normalizer: "active", "count" or "none".
        divergence: "reverse_kl", "forward_kl" or "jsd"; the last two on the backends "torch" and "reference" only.
        beta: weight β in (0, 1) of the target in "jsd".
        temperature: applied to every model.
        vocab_size: only the first vocab_size rows of every weight count; required if their numbers differ.
        bias, ref_bias, teacher_biases: [V] each, or None.
        softcap, ref_softcap, teacher_softcaps: final logit soft-caps, or None.
        grad_tol: what the gradient of a row may lose, in nats; 0 is exact, and so is "reference".
        likely_tokens: [N] int64 or None, a probable token of each row, as the sampled one: a hint that lets the
            Triton backend drop more columns under grad_tol. It changes no bound; ids outside [0, V) say nothing.
        backend: "auto" (Triton on a GPU for "reverse_kl", else torch), "triton", "torch", or "reference", which
            holds [N, V] logits.

    All logits must be finite.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: 0-dim detached fp32 sums over tokens with weight ≠ 0: token_count, token_loss_sum (Σ L_n),
            entropy_sum (student, nats). With grad_tol > 0 also the certificate of the gradients: dropped_grad_sum,
            dropped_grad_max, dropped_mass_sum, dropped_mass_max, dense_row_count (rows above grad_tol),
            grad_row_count, and kept_column_sum (Σ over rows of the columns kept, V for a dense row).

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value.
    """
    check_head_options(temperature, softcap, -100, grad_tol)
    _check_choices(normalizer, divergence, beta, backend)
    hidden, weight = follow_autocast(hidden, weight)
    student = Head(hidden, *check_head(hidden, weight, bias, vocab_size), softcap)
    check_vector("weights", weights, hidden.shape[:1], hidden.device)
    _check_likely_tokens(likely_tokens, hidden)
    frozen, coefficients = _frozen_models(
        student, vocab_size, lambdas, normalizer,
        {
            "hiddens": (teacher_hiddens, ref_hidden), "weights": (teacher_weights, ref_weight),
            "biases": (teacher_biases, ref_bias), "softcaps": (teacher_softcaps, ref_softcap),
        },
    )  # fmt: skip
    problem = Problem(student, frozen, coefficients, weights, temperature, divergence, beta)
    name = resolve_backend(backend, hidden, triton_kernel=divergence == "reverse_kl")
    if name == "reference":
        return _reference(problem, grad_tol)
    needs = Needs.of(hidden, student.weight, student.bias)
    with torch.no_grad(), without_autocast(hidden):
        if name == "triton" and _triton_takes(problem, backend):
            triton = importlib.import_module("._triton_full_vocab", __package__)
            sums, grads, certificate = triton.two_passes(problem, needs, grad_tol, likely_tokens)
        else:
            sums, grads, certificate = _torch_full_vocab.single_pass(problem, needs, grad_tol)
    loss = AttachGradients.apply(sums.loss, grads, hidden, student.weight, student.bias)
    return loss, _metrics(sums) | certificate


def _check_choices(normalizer: str, divergence: str, beta: float, backend: str) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence != "reverse_kl" and backend == "triton":
        raise ValueError(
            f"divergence={divergence!r} has no Triton kernel; use backend='auto' or 'torch', or divergence='reverse_kl'"
        )
    check_number("beta", beta, low=0.0, high=1.0)


def _check_likely_tokens(likely_tokens: torch.Tensor | None, hidden: torch.Tensor) -> None:
    if likely_tokens is None:
        return
    if not isinstance(likely_tokens, torch.Tensor) or likely_tokens.dtype != torch.int64:
        found = likely_tokens.dtype if isinstance(likely_tokens, torch.Tensor) else type(likely_tokens).__name__
        raise TypeError(f"likely_tokens must be an int64 tensor or None, got {found}")
    if likely_tokens.shape != hidden.shape[:1]:
        raise ValueError(f"likely_tokens must have shape [{len(hidden)}], got {list(likely_tokens.shape)}")
    check_device("likely_tokens", likely_tokens, hidden.device)


def _frozen_models(
    student: Head,
    vocab_size: int | None,
    lambdas: torch.Tensor | Sequence[float],
    normalizer: str,
    given: dict[str, tuple[Any, Any]],
) -> tuple[list[Head], torch.Tensor]:
    """The J models with a coefficient that is not 0 everywhere, and these coefficients [J, N]."""
    hidden = student.hidden
    n_teachers = len(check_sequence("teacher_hiddens", given["hiddens"][0]))
    coefficients = signed_coefficients(expand_lambdas(lambdas, n_teachers, hidden.shape[0]), normalizer)
    coefficients = coefficients.to(device=hidden.device, dtype=accumulation_dtype(hidden.dtype))
    columns = []
    for name, (per_teacher, of_ref) in given.items():
        one_each = [None] * n_teachers if per_teacher is None else per_teacher
        columns.append([*check_sequence(f"teacher_{name}", one_each, n_teachers), of_ref])
    used = (coefficients != 0).any(1)
    models = zip(zip(*columns, strict=True), _model_names(n_teachers), used.tolist(), strict=True)
    frozen = [_check_frozen(model, names, student, vocab_size) for model, names, is_used in models if is_used]
    return frozen, coefficients[used]


def signed_coefficients(lambdas: torch.Tensor, normalizer: str) -> torch.Tensor:
    """λ [K, N] -> a [K+1, N]: λ_k / Z for each teacher, then the reference's 1 − Σ_k λ_k / Z, in float64.

    The reference's is 0 where it is below 1e-6, the rounding of λ in fp32: nobody wants a model run for that.
    """
    lambdas = lambdas.double()
    teachers = lambdas / normalizing_count(lambdas != 0, normalizer)
    rest = 1 - teachers.sum(0, keepdim=True)
    return torch.cat([teachers, torch.where(rest.abs() > 1e-6, rest, 0.0)])


def _model_names(n_teachers: int) -> list[tuple[str, str, str, str]]:
    teachers = [
        (f"teacher_hiddens[{k}]", f"teacher_weights[{k}]", f"teacher_biases[{k}]", f"teacher_softcaps[{k}]")
        for k in range(n_teachers)
    ]
    return [*teachers, ("ref_hidden", "ref_weight", "ref_bias", "ref_softcap")]


def _check_frozen(
    model: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float | None],
    names: tuple[str, str, str, str],
    student: Head,
    vocab_size: int | None,
) -> Head:
    hidden, weight, bias, softcap = model
    if hidden is None or weight is None:
        missing = names[0] if hidden is None else names[1]
        raise ValueError(f"{missing} is None, but this model has a non-zero coefficient at some token")
    check_number(names[3], softcap, low=0.0, optional=True)
    hidden, weight = follow_autocast(hidden, weight)
    weight, bias = check_head(hidden, weight, bias, vocab_size, names[:3])
    check_device(names[0], hidden, student.hidden.device)
    if hidden.shape[0] != student.hidden.shape[0]:
        raise ValueError(f"{names[0]} has {hidden.shape[0]} rows, but hidden has {student.hidden.shape[0]}")
    if weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            f"{names[1]} has {weight.shape[0]} rows, but weight has {student.weight.shape[0]}; "
            "give vocab_size, the number of real tokens"
        )
    return Head(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), softcap)


def _triton_takes(problem: Problem, backend: str) -> bool:
    """Whether the Triton kernels take this problem; refuses it where the caller insists on them."""
    dtypes = {head.hidden.dtype for head in (problem.student, *problem.frozen)}
    obstacle = None
    if len(problem.frozen) > MAX_TRITON_MODELS:
        obstacle = f"its kernel takes at most {MAX_TRITON_MODELS} frozen models, got {len(problem.frozen)}"
    elif len(dtypes) > 1:
        obstacle = f"its kernel needs all models in one dtype, got {', '.join(sorted(map(str, dtypes)))}"
    if obstacle and backend == "triton":
        raise ValueError(f"backend='triton' is not possible here: {obstacle}; use backend='auto' or 'torch'")
    return obstacle is None


def _metrics(sums: LossSums) -> dict[str, torch.Tensor]:
    return {
        "token_count": torch.full_like(sums.loss, sums.n_rows, dtype=torch.float32),
        "token_loss_sum": sums.token_loss.float(),
        "entropy_sum": sums.entropy.float(),
    }


def _reference(problem: Problem, grad_tol: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student, frozen, coefficients, weights, temperature, divergence, beta = problem
    counted = weights.nonzero().squeeze(1)
    z, *frozen_z = (
        reference.head_logits(head.hidden[counted], head.weight, head.bias, temperature, head.softcap)
        for head in (student, *frozen)
    )
    targets = torch.stack(frozen_z).to(z.dtype) if frozen_z else z.new_zeros(0, *z.shape)
    loss, token_loss, entropy = reference.full_vocab_tcopd_loss(
        z, targets, coefficients[:, counted], weights[counted].to(z.dtype), divergence, beta
    )
    sums = LossSums(loss.detach(), token_loss.detach().sum(), entropy.detach().sum(), len(counted))
    report = CompactionReport(z.shape[1], sums.loss)
    report.add(z.new_zeros(0), z.new_zeros(0), 0, len(counted))
    return loss, _metrics(sums) | (report.metrics() if grad_tol else {})
