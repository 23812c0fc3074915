"""The models of linear_tcopd_step: student, reference, teachers and the teachers' own bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._checks import (
    accumulation_dtype,
    check_device,
    check_head,
    check_number,
    check_sequence,
    follow_autocast,
)
from ._rows import take_rows
from .advantage import expand_lambdas, normalizing_count


class Model(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V] or None, softcap or None.

    lambdas: [N], or None. Where it is 0 the model's log-probability is not needed.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    lambdas: torch.Tensor | None = None

    def take(self, rows: torch.Tensor | None) -> Model:
        lambdas = None if self.lambdas is None else take_rows(self.lambdas, rows)
        return self._replace(hidden=take_rows(self.hidden, rows), lambdas=lambdas)


class Frozen(NamedTuple):
    """Models without gradient, those that are needed: first the reference, if there is one.

    roles: per teacher the positions in `models` of itself (None when its λ is 0 everywhere) and of its base (None
    for log π = 0 in place of a reference that cancels).
    """

    models: list[Model]
    roles: list[tuple[int | None, int | None]]
    has_ref: bool

    @property
    def own_bases(self) -> bool:
        """Whether any teacher has a base that is not the reference."""
        return self.has_ref and any(base for _, base in self.roles)


class Step(NamedTuple):
    """Checked arguments of linear_tcopd_step.

    targets: [N], ignore_index for every token that takes no part.   rows: indices of the others, None for all.
    lambdas: [K, N], 0 for tokens that take no part.   clips: clip_low, clip_high, dual_clip and is_cap.
    """

    student: Model
    frozen: Frozen
    targets: torch.Tensor
    rows: torch.Tensor | None
    lambdas: torch.Tensor
    weights: torch.Tensor
    old_logprob: torch.Tensor | None
    rollout_logprob: torch.Tensor | None
    normalizer: str
    logratio_clamp: float | None
    advantage_clamp: float | None
    ref_kl_coef: float
    temperature: float
    ignore_index: int
    grad_tol: float
    entropy: bool
    clips: dict[str, float | None]


def check_frozen(
    label: str, index: int | None, n_rows: int, device: torch.device, vocab_size: int | None, *parts: Any
) -> Model | None:
    """Model from (hidden, weight, bias, softcap), named label_hidden or label_hiddens[index]; None if both are."""
    suffix = ("", "", "", "") if index is None else (f"s[{index}]", f"s[{index}]", f"es[{index}]", f"s[{index}]")
    kinds = ("hidden", "weight", "bias", "softcap")
    names = [f"{label}_{kind}{end}" for kind, end in zip(kinds, suffix, strict=True)]
    hidden, weight, bias, softcap = parts
    if hidden is None and weight is None:
        return None
    if hidden is None or weight is None:
        missing, given = names[:2] if hidden is None else names[1::-1]
        raise ValueError(f"{missing} is None but {given} is not; give both, or None for both")
    check_number(names[3], softcap, low=0.0, optional=True)
    weight, bias = check_head(hidden, weight, bias, vocab_size, (names[0], names[1], names[2]))
    check_device(names[0], hidden, device)
    if len(hidden) != n_rows:
        raise ValueError(f"{names[0]} has {len(hidden)} rows, but hidden has {n_rows}")
    operands = follow_autocast(hidden.detach(), weight.detach())
    return Model(*operands, None if bias is None else bias.detach(), softcap)


def check_frozen_list(
    label: str, length: int, n_rows: int, device: torch.device, vocab_size: int | None, *columns: Any
) -> list[Model | None]:
    """One model or None per entry of the sequences (hiddens, weights, biases, softcaps), each of which may be None."""
    names = (f"{label}_hiddens", f"{label}_weights", f"{label}_biases", f"{label}_softcaps")
    full: list[Sequence] = [
        [None] * length if column is None else check_sequence(name, column, length)
        for name, column in zip(names, columns, strict=True)
    ]
    return [
        check_frozen(label, k, n_rows, device, vocab_size, *parts) for k, parts in enumerate(zip(*full, strict=True))
    ]


def needed_models(
    ref: Model | None,
    teachers: Sequence[Model | None],
    bases: Sequence[Model | None],
    lambdas: torch.Tensor | Sequence[float],
    counted: torch.Tensor,
    normalizer: str,
) -> tuple[Frozen, torch.Tensor]:
    """The models that the counted tokens [N] bool need, and λ [K, N] on their device, 0 where a token does not count.

    Raises ValueError where a teacher is missing that has a λ, and where the reference is missing and does not cancel.
    Reads λ from the device, if it is there.
    """
    given = lambdas if isinstance(lambdas, torch.Tensor) else torch.tensor(lambdas, dtype=torch.float64)
    per_token = given.dim() == 2
    wide = given.detach().to(counted.device, accumulation_dtype(given.dtype))
    table = torch.where(counted, expand_lambdas(wide, len(teachers), len(counted)), 0.0)
    used = ((table != 0).any(1) if per_token else given != 0).tolist()
    for k in range(len(teachers)):
        if used[k] and teachers[k] is None:
            raise ValueError(f"teacher_hiddens[{k}] is None, but lambdas[{k}] is not 0 everywhere")
    if ref is None:
        _check_reference_cancels(table, counted, normalizer)
    models = [] if ref is None else [ref]
    # A base that several teachers share, or that is the reference itself, is run once, for the tokens of all.
    positions: dict[tuple[Any, ...], int] = {} if ref is None else {_identity(ref): 0}
    roles: list[tuple[int | None, int | None]] = []
    for k, (teacher, base) in enumerate(zip(teachers, bases, strict=True)):
        if teacher is None or not used[k]:
            roles.append((None, None))
            continue
        models.append(teacher._replace(lambdas=table[k] if per_token else None))
        own = len(models) - 1
        if base is None:
            roles.append((own, None if ref is None else 0))
            continue
        place = positions.setdefault(_identity(base), len(models))
        if place == len(models):
            models.append(base)
        roles.append((own, place))
    return Frozen(models, roles, ref is not None), table


def _identity(model: Model) -> tuple[Any, ...]:
    """Equal for models in the same memory."""
    tensors = (model.hidden, model.weight, model.bias)
    return *(None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in tensors), model.softcap


def _check_reference_cancels(table: torch.Tensor, counted: torch.Tensor, normalizer: str) -> None:
    """Σ_k λ_k / Z = 1 at every counted token, to rounding."""
    share = table.sum(0) / normalizing_count(table != 0, normalizer)
    off = torch.where(counted, (share - 1).abs(), 0.0)
    if len(off) and not off.amax() <= 1e-5:
        worst = int(off.argmax())
        raise ValueError(
            f"ref_hidden is None, but the reference does not cancel at token {worst}: Σ λ / Z is "
            f"{share[worst].item():.6g}, not 1; give ref_hidden and ref_weight"
        )
