"""One whole TC-OPD step: all models' log-probabilities, advantage, loss and the student's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ._backend import load_backend, resolve_backend, without_autocast
from ._checks import (
    accumulation_dtype,
    check_head,
    check_head_options,
    check_number,
    check_policy_options,
    check_sequence,
    check_targets,
    check_vector,
    counted_rows,
    follow_autocast,
)
from ._launch_plan import LAUNCHES
from ._loss_grads import head_gradients
from ._rows import scatter_rows, take_rows
from ._step_models import Model, Step, check_frozen, check_frozen_list, needed_models
from ._torch_compact import exact_certificate
from ._torch_grads import Grads, Needs
from ._torch_loss import AttachGradients, half_precision_scale
from .advantage import NORMALIZERS, contrastive_advantage
from .linear_logprob import linear_logprob
from .linear_loss import linear_tcopd_loss


class StepTokens(NamedTuple):
    """Per-token results of a step, detached; fp32, or float64 if any model is. Tokens that take no part hold 0.

    logprob: [N] student.   entropy: [N] student's, or None.   ref_logprob: [N], or None without a reference.
    teacher_logprobs: [K, N], 0 where λ is.   reward, advantage: [N] as in contrastive_advantage.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    teacher_logprobs: torch.Tensor
    reward: torch.Tensor
    advantage: torch.Tensor


def linear_tcopd_step(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    teacher_hiddens: Sequence[torch.Tensor | None],
    teacher_weights: Sequence[torch.Tensor | None],
    lambdas: torch.Tensor | Sequence[float],
    *,
    weights: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    rollout_logprob: torch.Tensor | None = None,
    normalizer: str = "active",
    logratio_clamp: float | None = None,
    advantage_clamp: float | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
    is_cap: float | None = 5.0,
    ref_kl_coef: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ref_bias: torch.Tensor | None = None,
    ref_softcap: float | None = None,
    teacher_biases: Sequence[torch.Tensor | None] | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    teacher_ref_hiddens: Sequence[torch.Tensor | None] | None = None,
    teacher_ref_weights: Sequence[torch.Tensor | None] | None = None,
    teacher_ref_biases: Sequence[torch.Tensor | None] | None = None,
    teacher_ref_softcaps: Sequence[float | None] | None = None,
    grad_tol: float = 0.0,
    entropy: bool = False,
    backend: str = "auto",
    launch: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor], StepTokens]:
    """TC-OPD loss from the last hidden states of student, reference and K teachers; no logits are held.

        r_n = (1/Z_n) Σ_k λ_kn [log π_k(y_n) − log π_ref(y_n)]
        A_n = r_n − [log π_old(y_n) − log π_ref(y_n)]
        loss = Σ_n weights_n w_n ℓ_n + ref_kl_coef · Σ_n weights_n k3(π_θ‖π_ref)_n

    with Z from contrastive_advantage, w and ℓ from tcopd_policy_loss, and k3 from linear_tcopd_loss. The loss is
    differentiable in hidden, weight and bias; all else is constant. The gradients are computed during the forward
    and kept; the backward only scales them. Without old_logprob the step is strictly on-policy: log π_old is this
    forward's own detached log-probability.

    Only what counts is computed: tokens of weight 0 and ignored ones cost nothing in any model, a teacher with λ = 0
    everywhere is not run, and tokens with λ_k = 0 cost teacher k nothing (on Triton: nothing in blocks of tokens
    that all have it).

    Args:
        hidden: [N, D], weight: [V, D] of the student, one dtype (fp16, bf16, fp32; float64 not on Triton). Under
            autocast all models are cast to the region's dtype.
        targets: [N] int32 or int64, sampled tokens; ignore_index where there is none.
        ref_hidden: [N, D_ref], ref_weight: [V, D_ref]. Both may be None where the reference cancels, that is where
            Σ_k λ_kn / Z_n = 1 at every token that counts, and nothing else needs it; log π_ref = 0 then stands in for
            it in the reward.
        teacher_hiddens, teacher_weights: K tensors [N, D_k] and [V, D_k] each; both entries may be None for a teacher
            whose λ is 0 at every token. Frozen models may have dtypes of their own.
        lambdas: K numbers, a tensor [K], or [K, N].
        weights: [N] mask and normaliser in one; rows of weight 0 take no part, whatever they hold.
        old_logprob, rollout_logprob: [N] or None, as in tcopd_policy_loss.
        normalizer, logratio_clamp, advantage_clamp: as in contrastive_advantage.
        clip_low, clip_high, dual_clip, is_cap: as in tcopd_policy_loss.   ref_kl_coef: as in linear_tcopd_loss.
        temperature, ignore_index: for all models.
        vocab_size: only the first vocab_size rows of every weight count. Give it when the vocabularies are padded to
            different sizes; every target must be below the smallest.
        bias, ref_bias, teacher_biases: [V] each, or None.   softcap, ref_softcap, teacher_softcaps: likewise.
        teacher_ref_hiddens, teacher_ref_weights, teacher_ref_biases, teacher_ref_softcaps: bases of their own for
            teachers, in place of the reference in their term of r; an entry None keeps the reference.
        grad_tol, entropy: as in linear_tcopd_loss.
        backend: "auto", "triton", "torch" or "reference", for all models.
        launch: how the Triton backend computes the log-probabilities: "joint" (one launch for the models of a dtype),
            "separate" (one each) or "auto", which takes the one that is predicted to be faster. A student with
            grad_tol or entropy is always computed apart.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: those of linear_tcopd_loss; ref_kl_sum only with a reference.
        StepTokens.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value.
    """
    hidden, weight = follow_autocast(hidden, weight)
    check_head_options(temperature, softcap, ignore_index, grad_tol)
    check_policy_options(clip_low, clip_high, dual_clip, is_cap)
    check_number("logratio_clamp", logratio_clamp, low=0.0, optional=True)
    check_number("advantage_clamp", advantage_clamp, low=0.0, optional=True)
    check_number("ref_kl_coef", ref_kl_coef, low=0.0, open_low=False)
    for name, value, known in (("normalizer", normalizer, NORMALIZERS), ("launch", launch, LAUNCHES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    weight, bias = check_head(hidden, weight, bias, vocab_size)
    n_rows, device = hidden.shape[0], hidden.device
    for name, vector in (("weights", weights), ("old_logprob", old_logprob), ("rollout_logprob", rollout_logprob)):
        if vector is not None or name == "weights":
            check_vector(name, vector, (n_rows,), device)
    where = (n_rows, device, vocab_size)
    ref = check_frozen("ref", None, *where, ref_hidden, ref_weight, ref_bias, ref_softcap)
    n_teachers = len(check_sequence("teacher_hiddens", teacher_hiddens))
    teachers = check_frozen_list(
        "teacher", n_teachers, *where, teacher_hiddens, teacher_weights, teacher_biases, teacher_softcaps
    )
    bases = check_frozen_list(
        "teacher_ref", n_teachers, *where,
        teacher_ref_hiddens, teacher_ref_weights, teacher_ref_biases, teacher_ref_softcaps,
    )  # fmt: skip
    _check_reference_given(ref, bases, logratio_clamp, ref_kl_coef)
    vocab = min(len(m.weight) for m in (ref, *teachers, *bases, Model(hidden, weight)) if m is not None)
    check_targets(targets, n_rows, device)
    step_targets = torch.where(weights != 0, targets, ignore_index)
    rows = counted_rows(step_targets, vocab, ignore_index)
    frozen, table = needed_models(ref, teachers, bases, lambdas, step_targets != ignore_index, normalizer)
    step = Step(
        Model(hidden, weight, bias, softcap), frozen, step_targets, rows, table, weights, old_logprob, rollout_logprob,
        normalizer, logratio_clamp, advantage_clamp, ref_kl_coef, temperature, ignore_index, grad_tol, entropy,
        {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "is_cap": is_cap},
    )  # fmt: skip
    name = _common_backend(backend, [hidden, *(model.hidden for model in frozen.models)])
    if name == "triton" and (n_rows if rows is None else len(rows)):
        return _fused(step, launch)
    return _composed(step, "torch" if name == "triton" else name)


def _check_reference_given(
    ref: Model | None, bases: Sequence[Model | None], logratio_clamp: float | None, ref_kl_coef: float
) -> None:
    if ref is not None:
        return
    needed_by = {
        f"logratio_clamp={logratio_clamp}": logratio_clamp is not None,
        f"ref_kl_coef={ref_kl_coef}": ref_kl_coef,
        "teacher_ref_hiddens": any(base is not None for base in bases),
    }
    for name, needed in needed_by.items():
        if needed:
            raise ValueError(f"ref_hidden and ref_weight are required with {name}; got None")


def _common_backend(backend: str, hiddens: Sequence[torch.Tensor]) -> str:
    """One backend for all models; with "auto" torch where any model needs it."""
    names = {resolve_backend(backend, hidden) for hidden in hiddens}
    return names.pop() if len(names) == 1 else "torch"


def _composed(step: Step, backend: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], StepTokens]:
    """The step from the functions for its parts, on the backends "torch" and "reference"."""
    student, frozen, targets = step.student, step.frozen, step.targets
    head: dict[str, Any] = {
        "temperature": step.temperature, "ignore_index": step.ignore_index, "backend": backend,
    }  # fmt: skip
    logprobs = []
    with torch.no_grad():
        for model in frozen.models:
            own = targets if model.lambdas is None else torch.where(model.lambdas != 0, targets, step.ignore_index)
            stats = linear_logprob(model.hidden, model.weight, own, bias=model.bias, softcap=model.softcap, **head)
            logprobs.append(stats.logprob)
    zeros = torch.zeros_like(step.weights, dtype=accumulation_dtype(student.hidden.dtype, *(t.dtype for t in logprobs)))
    ref = logprobs[0].to(zeros.dtype) if frozen.has_ref else zeros
    teachers = zeros.new_zeros(len(frozen.roles), len(zeros))
    bases = ref.expand_as(teachers).clone() if frozen.own_bases else ref
    for k, (own_place, base_place) in enumerate(frozen.roles):
        if own_place is not None:
            teachers[k] = logprobs[own_place]
        if frozen.own_bases and base_place is not None:
            bases[k] = logprobs[base_place]
    contrast = partial(
        contrastive_advantage, ref_logprob=bases, teacher_logprobs=teachers, lambdas=step.lambdas,
        normalizer=step.normalizer, logratio_clamp=step.logratio_clamp, student_ref_logprob=ref,
    )  # fmt: skip
    _, reward = contrast(ref)
    policy: dict[str, Any] = dict(step.clips)
    loss, metrics, stats = linear_tcopd_loss(
        student.hidden, student.weight, targets, reward=reward, ref_logprob=ref, old_logprob=step.old_logprob,
        rollout_logprob=step.rollout_logprob, weights=step.weights, bias=student.bias, softcap=student.softcap,
        advantage_clamp=step.advantage_clamp, ref_kl_coef=step.ref_kl_coef, grad_tol=step.grad_tol,
        entropy=step.entropy, **policy, **head,
    )  # fmt: skip
    if not frozen.has_ref:
        metrics = {name: value for name, value in metrics.items() if name != "ref_kl_sum"}
    old = stats.logprob if step.old_logprob is None else step.old_logprob
    advantage, _ = contrast(old, advantage_clamp=step.advantage_clamp)
    advantage = torch.where(targets != step.ignore_index, advantage, 0.0)
    ref_logprob = ref if frozen.has_ref else None
    return loss, metrics, StepTokens(stats.logprob, stats.entropy, ref_logprob, teachers, reward, advantage)


def _fused(step: Step, launch: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], StepTokens]:
    """The step on the Triton kernels: statistics of all models, one kernel to the loss, the student's backward."""
    from ._triton_finalize import finalize
    from ._triton_multi import as_split, join_partials, model_partials

    kernels = load_backend("triton")
    student, targets = step.student.take(step.rows), take_rows(step.targets, step.rows).long()
    frozen = [model.take(step.rows) for model in step.frozen.models]
    needs = Needs.of(step.student.hidden, student.weight, student.bias)
    compact = step.grad_tol > 0 and any(needs)
    head: dict[str, Any] = {"bias": student.bias, "temperature": step.temperature, "softcap": student.softcap}
    entropy = None
    with torch.no_grad(), without_autocast(student.hidden):
        bounds = kernels.new_bounds(len(targets), student.weight) if compact else None
        if compact or step.entropy:
            own = kernels.partials(student.hidden, student.weight, targets, entropy=step.entropy, bounds=bounds, **head)
            entropy = kernels.finish(own)[2]
            others = [model_partials(frozen, targets, step.temperature, launch)] if frozen else []
            partials = join_partials([as_split([own]), *others], range(1 + len(frozen)))
        else:
            partials = model_partials([student, *frozen], targets, step.temperature, launch)
        weights = take_rows(step.weights, step.rows).float()
        old_logprob, rollout_logprob = (
            None if t is None else take_rows(t, step.rows).float() for t in (step.old_logprob, step.rollout_logprob)
        )
        done = finalize(
            partials, [_kernel_role(role) for role in step.frozen.roles], _columns(step.lambdas, step.rows).float(),
            weights, old_logprob, rollout_logprob, clips=step.clips,
            has_ref=step.frozen.has_ref, normalizer=step.normalizer, logratio_clamp=step.logratio_clamp,
            advantage_clamp=step.advantage_clamp, ref_kl_coef=step.ref_kl_coef,
        )  # fmt: skip
        grads, report = _student_gradients(step, student, targets, done.lse, done.dlogprob, needs, bounds)

        def spread(tensor: torch.Tensor) -> torch.Tensor:
            return scatter_rows(tensor, step.rows, len(step.targets))

        if grads[0] is not None:
            grads = (spread(grads[0]), *grads[1:])
        tokens = StepTokens(
            spread(done.logprob),
            None if entropy is None else spread(entropy),
            None if done.ref_logprob is None else spread(done.ref_logprob),
            spread(done.teacher_logprobs.T).T,
            spread(done.reward),
            spread(done.advantage),
        )
    whole = step.student
    loss = AttachGradients.apply(done.loss, grads, whole.hidden, whole.weight, whole.bias)
    return loss, done.metrics | report, tokens


def _kernel_role(role: tuple[int | None, int | None]) -> tuple[int, int]:
    """The student is model 0 there, and stands in for what is not run."""
    own, base = role
    return 0 if own is None else own + 1, 0 if base is None else base + 1


def _columns(table: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return table if rows is None else table.index_select(1, rows)


def _student_gradients(
    step: Step,
    student: Model,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dlogprob: torch.Tensor,
    needs: Needs,
    bounds: torch.Tensor | None,
) -> tuple[Grads, dict[str, torch.Tensor]]:
    """Gradients of the loss, and with grad_tol their certificate."""
    if not any(needs):
        return (None, None, None), exact_certificate(0, len(student.weight), lse) if step.grad_tol else {}
    head: dict[str, Any] = {"bias": student.bias, "temperature": step.temperature, "softcap": student.softcap}
    return head_gradients(
        load_backend("triton"), student.hidden, student.weight, targets, lse, dlogprob, head=head, needs=needs,
        scale=half_precision_scale(student.hidden.dtype, take_rows(step.weights, step.rows)),
        grad_tol=step.grad_tol, bounds=bounds,
    )  # fmt: skip
