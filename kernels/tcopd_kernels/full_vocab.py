"""Distillation towards a signed mixture of models over the whole vocabulary, without sampling noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tcopd_kernels import reference
from tcopd_kernels._backend import resolve_backend, without_autocast
from tcopd_kernels._checks import (
    accumulation_dtype,
    check_device,
    check_head,
    check_head_options,
    check_number,
    check_sequence,
    check_vector,
)
from tcopd_kernels._torch import OnlineSoftmax, gemm_dtype, logits, slices
from tcopd_kernels._torch_grads import Grads, HeadGradients, Needs
from tcopd_kernels._torch_loss import AttachGradients, chunk_shape, half_precision_scale
from tcopd_kernels.advantage import NORMALIZERS, expand_lambdas, normalizing_count


class Head(NamedTuple):
    """One model's last hidden states [N, D] and output head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    def logits(self, rows: torch.Tensor, cols: slice, temperature: float) -> torch.Tensor:
        operand = gemm_dtype(self.hidden)
        h, w = self.hidden[rows].to(operand), self.weight[cols].to(operand)
        return logits(h, w, self.bias, cols, temperature, self.softcap)


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
    temperature: float = 1.0,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ref_bias: torch.Tensor | None = None,
    ref_softcap: float | None = None,
    teacher_biases: Sequence[torch.Tensor | None] | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ_n weights_n L_n with the expectation over the next token taken exactly, in place of one sample of it.

        L_n = Σ_v π_θ(v) [log π_θ(v) − Σ_k a_{kn} log π_k(v) − a_ref,n log π_ref(v)]
        a_kn = λ_kn / Z_n,   a_ref,n = 1 − Σ_k a_kn        (they sum to 1; Z as in contrastive_advantage)

    Its gradient is the expectation of that of −A log π_θ over y ~ π_θ, with A from contrastive_advantage.
    Differentiable in hidden, weight and bias; the other models are constants. Row-chunked; the gradients are
    computed in the forward.

    Args:
        hidden: [N, D], weight: [V, D] of the student, one dtype.
        ref_hidden: [N, D_ref], ref_weight: [V, D_ref]; both may be None when every a_ref is exactly 0.
        teacher_hiddens, teacher_weights: K tensors [N, D_k] and [V, D_k]; an entry may be None when its λ is
            0 at every token. Rows where λ is 0 may hold anything.
        lambdas: K numbers, a tensor [K], or [K, N].
        weights: [N] mask and normaliser in one; rows of weight 0 take no part, whatever they hold.
        normalizer: "active", "count" or "none".
        temperature: applied to every model.
        vocab_size: only the first vocab_size rows of every weight count; required if their numbers differ.
        bias, ref_bias, teacher_biases: [V] each, or None.
        softcap, ref_softcap, teacher_softcaps: final logit soft-caps, or None.
        backend: "auto" and "torch" are the same; "reference" holds [N, V] logits.

    All logits must be finite.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: 0-dim detached fp32 sums over tokens with weight ≠ 0: token_count, token_loss_sum (Σ L_n),
            entropy_sum (student, nats).

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value.
    """
    check_head_options(temperature, softcap, -100, 0.0)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    student = Head(hidden, *check_head(hidden, weight, bias, vocab_size), softcap)
    n_rows = hidden.shape[0]
    check_vector("weights", weights, (n_rows,), hidden.device)
    n_teachers = len(check_sequence("teacher_hiddens", teacher_hiddens))
    coefficients = signed_coefficients(expand_lambdas(lambdas, n_teachers, n_rows), normalizer)
    coefficients = coefficients.to(device=hidden.device, dtype=accumulation_dtype(hidden.dtype))
    columns = []
    for name, per_teacher, of_ref in (
        ("teacher_hiddens", teacher_hiddens, ref_hidden),
        ("teacher_weights", teacher_weights, ref_weight),
        ("teacher_biases", teacher_biases, ref_bias),
        ("teacher_softcaps", teacher_softcaps, ref_softcap),
    ):
        given = [None] * n_teachers if per_teacher is None else check_sequence(name, per_teacher, n_teachers)
        columns.append([*given, of_ref])
    used = (coefficients != 0).any(1).tolist()
    models = zip(zip(*columns, strict=True), _model_names(n_teachers), used, strict=True)
    frozen = [_check_frozen(model, names, student, vocab_size) for model, names, is_used in models if is_used]
    coefficients = coefficients[torch.tensor(used, device=hidden.device)]
    if resolve_backend(backend, hidden, triton_kernel=False) == "reference":
        return _reference(student, frozen, coefficients, weights, temperature)
    needs = Needs.of(hidden, student.weight, student.bias)
    with torch.no_grad(), without_autocast(hidden):
        loss, metrics, grads = _single_pass(student, frozen, coefficients, weights, temperature, needs)
    return AttachGradients.apply(loss, grads, hidden, student.weight, student.bias), metrics


def signed_coefficients(lambdas: torch.Tensor, normalizer: str) -> torch.Tensor:
    """λ [K, N] -> a [K+1, N]: λ_k / Z for each teacher, then the reference's 1 − Σ_k λ_k / Z, in float64."""
    lambdas = lambdas.double()
    teachers = lambdas / normalizing_count(lambdas != 0, normalizer)
    return torch.cat([teachers, 1 - teachers.sum(0, keepdim=True)])


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


def _single_pass(
    student: Head,
    frozen: list[Head],
    coefficients: torch.Tensor,
    weights: torch.Tensor,
    temperature: float,
    needs: Needs,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Grads]:
    """(loss, metrics, gradients of hidden, weight, bias) from coefficients [J, N] and weights [N]."""
    grads = HeadGradients(student.hidden, student.weight, needs)
    scale = half_precision_scale(student.hidden.dtype, weights)
    vocab = student.weight.shape[0]
    counted = weights.nonzero().squeeze(1)
    rows_per_chunk, cols_per_tile = chunk_shape(student.hidden, vocab, buffers=2)
    buffers = student.hidden.new_empty((2, rows_per_chunk, vocab), dtype=coefficients.dtype)
    sums = coefficients.new_zeros(3)  # loss, Σ L_n, Σ H_n
    for rows in counted.split(rows_per_chunk) if len(counted) else []:
        chunk = MixtureChunk(
            student, frozen, rows, coefficients[:, rows], buffers[:, : len(rows)], cols_per_tile, temperature
        )
        w = weights[rows].to(coefficients.dtype)
        token_loss, entropy = chunk.forward()
        sums += torch.stack([(w * token_loss).sum(), token_loss.sum(), entropy.sum()])
        if any(needs):
            grads.add(rows, student.hidden[rows].to(grads.operand), chunk.dlogits(w if scale is None else w / scale))
    return sums[0], _metrics(len(counted), sums[1], sums[2]), grads.finish(scale)


class MixtureChunk:
    """Student logits z and their difference d = z − Σ_j a_j z_j to the mixture, for one chunk of n rows.

    L = Σ_v p_v d_v − lse + Σ_j a_j lse_j, and since the normalisers do not depend on v,
    dL/dz_v = p_v (d_v − Σ_u p_u d_u).
    """

    def __init__(
        self,
        student: Head,
        frozen: list[Head],
        rows: torch.Tensor,
        coefficients: torch.Tensor,
        buffers: torch.Tensor,
        cols_per_tile: int,
        temperature: float,
    ) -> None:
        self.student, self.frozen, self.rows, self.coefficients = student, frozen, rows, coefficients
        self.z, self.difference = buffers
        self.tiles = list(slices(self.z.shape[1], cols_per_tile))
        self.temperature = temperature

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(token loss L [n], student entropy [n])."""
        any_token = torch.zeros_like(self.rows)
        softmax = OnlineSoftmax(any_token, self.z.dtype, entropy=False)
        for cols in self.tiles:
            self.z[:, cols] = self.student.logits(self.rows, cols, self.temperature)
            softmax.update(self.z[:, cols], cols)
        self.lse = softmax.finish()[1]
        self.difference.copy_(self.z)
        mixture_lse = torch.zeros_like(self.lse)
        for model, a in zip(self.frozen, self.coefficients, strict=True):
            frozen_softmax = OnlineSoftmax(any_token, self.z.dtype, entropy=False)
            for cols in self.tiles:
                z = model.logits(self.rows, cols, self.temperature).to(self.z.dtype)
                frozen_softmax.update(z, cols)
                self.difference[:, cols] -= _weighted(a.unsqueeze(1), z)
            mixture_lse += _weighted(a, frozen_softmax.finish()[1])
        self.mean, entropy = torch.zeros_like(self.lse), torch.zeros_like(self.lse)
        for cols in self.tiles:
            log_p = self.z[:, cols] - self.lse.unsqueeze(1)
            p = log_p.exp()
            entropy -= log_p.mul_(p).sum(1)
            self.mean += p.mul_(self.difference[:, cols]).sum(1)
        return self.mean - self.lse + mixture_lse, entropy

    def dlogits(self, upstream: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tiles of the gradient of the raw head output for upstream [n]; overwrites the buffers."""
        for cols in self.tiles:
            z, factor = self.z[:, cols], self.difference[:, cols].sub_(self.mean.unsqueeze(1))
            factor.mul_((upstream / self.temperature).unsqueeze(1))
            if self.student.softcap is not None:
                factor.mul_(1.0 - (z * (self.temperature / self.student.softcap)).square_())
            yield cols, z.sub_(self.lse.unsqueeze(1)).exp_().mul_(factor)


def _weighted(a: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """a · values, and 0 where a is 0, whatever the value is there."""
    return torch.where(a != 0, a * values, 0.0)


def _metrics(count: int, token_loss_sum: torch.Tensor, entropy_sum: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "token_count": torch.full_like(token_loss_sum, count, dtype=torch.float32),
        "token_loss_sum": token_loss_sum.float(),
        "entropy_sum": entropy_sum.float(),
    }


def _reference(
    student: Head, frozen: list[Head], coefficients: torch.Tensor, weights: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    counted = weights.nonzero().squeeze(1)
    z, *frozen_z = (
        reference.head_logits(head.hidden[counted], head.weight, head.bias, temperature, head.softcap)
        for head in (student, *frozen)
    )
    targets = torch.stack(frozen_z).to(z.dtype) if frozen_z else z.new_zeros(0, *z.shape)
    loss, token_loss, entropy = reference.full_vocab_tcopd_loss(
        z, targets, coefficients[:, counted], weights[counted].to(z.dtype)
    )
    return loss, _metrics(len(counted), token_loss.detach().sum(), entropy.detach().sum())
