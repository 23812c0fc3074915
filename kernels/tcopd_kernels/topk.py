"""Distillation towards a signed mixture of models of which only the log-probabilities of some tokens are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import reference
from ._backend import resolve_backend, without_autocast
from ._checks import (
    accumulation_dtype,
    check_device,
    check_head,
    check_head_options,
    check_number,
    check_vector,
    follow_autocast,
)
from ._torch import OnlineSoftmax, gemm_dtype, logits, slices, tile_view
from ._torch_full_vocab import Head
from ._torch_grads import Grads, HeadGradients, Needs
from ._torch_loss import AttachGradients, chunk_shape, half_precision_scale
from .advantage import NORMALIZERS, expand_lambdas
from .full_vocab import signed_coefficients

DIVERGENCES = ("reverse_kl", "forward_kl")


def topk_tcopd_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    topk_ids: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    teacher_logprobs: torch.Tensor,
    lambdas: torch.Tensor | Sequence[float],
    *,
    weights: torch.Tensor,
    normalizer: str = "active",
    divergence: str = "reverse_kl",
    tail_floor: float = 1e-6,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """full_vocab_tcopd_loss on M tokens per position and one bucket that holds all the others.

    For teachers behind a server, which gives the log-probabilities of a few tokens and no hidden states. Every
    distribution is reduced to S_n, the tokens of row n of topk_ids, and the tail b, π(b) = 1 − Σ_{v∈S} π(v). On that

        "reverse_kl"   L_n = Σ_{v∈S∪b} π_θ(v) [log π_θ(v) − t(v)],   t(v) = Σ_k a_kn log π_k(v) + a_ref,n log π_ref(v)
        "forward_kl"   L_n = KL(q‖π_θ),   q ∝ exp t over S∪b

    with a as in full_vocab_tcopd_loss. Both are exact for the reduced distributions and differentiable in hidden,
    weight and bias: with g_v = log π_θ(v) − t(v) and ḡ its mean under π_θ the gradient of "reverse_kl" with respect to
    the tempered logit z_v is π_θ(v) (g_v − ḡ), where all tokens of the tail share g_b; that of "forward_kl" is
    π_θ(v) − q(v) in S and π_θ(v) (1 − q(b)/π_θ(b)) in the tail.

    Against the full form "reverse_kl" leaves out π_θ(b) Σ_{v∉S} π_θ(v|b) [log π_θ(v|b) − Σ_j a_j log π_j(v|b)], what
    happens inside the tail. For one teacher that is a KL ≥ 0, so the loss is a lower bound (data processing); for
    signed mixtures it has no sign. It vanishes as π_θ(b) → 0, which tail_mass_sum reports, and is 0 for S = V.
    All models must be known on the same tokens: the union of their top tokens is a good S.

    No [N, V] logits: a chunk of rows keeps its probabilities. The gradients are computed in the forward.

    Args:
        hidden: [N, D], weight: [V, D] of the student, one dtype; in an autocast region both are cast to its dtype.
        topk_ids: [N, M] int32 or int64, distinct tokens in [0, V) in each row; −1 pads.
        ref_logprobs: [N, M] log π_ref(topk_ids), at the same temperature; None when every a_ref is 0 to within 1e-6.
        teacher_logprobs: [K, N, M]. Padded entries, and models where their coefficient is 0, may hold anything.
        lambdas, weights, normalizer: as in full_vocab_tcopd_loss.
        divergence: "reverse_kl" or "forward_kl".
        tail_floor: tail masses count as at least this inside logarithms: they are known to rounding only.
        temperature, vocab_size, bias, softcap: of the student.
        backend: "auto" and "torch" are the same; "reference" holds [N, V] logits.

    Returns:
        loss: 0-dim, fp32 or float64.
        metrics: 0-dim detached fp32: token_count, token_loss_sum, tail_mass_sum and tail_mass_max (of π_θ(b)), over
            tokens with weight ≠ 0.

    Raises:
        TypeError, ValueError: naming the argument that has a wrong type, dtype, shape, device or value.
    """
    check_head_options(temperature, softcap, -100, 0.0)
    check_number("tail_floor", tail_floor, low=0.0, high=1.0)
    for name, value, known in (("normalizer", normalizer, NORMALIZERS), ("divergence", divergence, DIVERGENCES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    hidden, weight = follow_autocast(hidden, weight)
    student = Head(hidden, *check_head(hidden, weight, bias, vocab_size), softcap)
    check_vector("weights", weights, hidden.shape[:1], hidden.device)
    _check_ids(topk_ids, student)
    backend = resolve_backend(backend, hidden, triton_kernel=False)

    counted = weights.nonzero().squeeze(1)
    ids = topk_ids[counted].long()
    w = weights[counted].to(accumulation_dtype(hidden.dtype))
    coefficients = _coefficients(lambdas, normalizer, ref_logprobs, teacher_logprobs, topk_ids)
    models = [*teacher_logprobs, *([] if ref_logprobs is None else [ref_logprobs])]
    target = _target([model[counted] for model in models], coefficients.to(w)[:, counted], ids, tail_floor)
    options = _Options(temperature, divergence, tail_floor)
    if backend == "reference":
        z = reference.head_logits(hidden[counted], student.weight, student.bias, temperature, softcap)
        token_loss, tail = reference.topk_tcopd_loss(z, ids, *target, divergence, tail_floor)
        return (w * token_loss).sum(), _metrics(token_loss.detach(), tail.detach())
    needs = Needs.of(hidden, student.weight, student.bias)
    with torch.no_grad(), without_autocast(hidden):
        token_loss, tail, grads = _single_pass(student, counted, ids, target, w, options, needs)
    loss = AttachGradients.apply((w * token_loss).sum(), grads, hidden, student.weight, student.bias)
    return loss, _metrics(token_loss, tail)


class _Options(NamedTuple):
    temperature: float
    divergence: str
    tail_floor: float


# t of the tokens [n, M], 0 where padded, and of the tail [n].
_Target = tuple[torch.Tensor, torch.Tensor]


def _check_ids(topk_ids: torch.Tensor, student: Head) -> None:
    if not isinstance(topk_ids, torch.Tensor) or topk_ids.dtype not in (torch.int32, torch.int64):
        found = topk_ids.dtype if isinstance(topk_ids, torch.Tensor) else type(topk_ids).__name__
        raise TypeError(f"topk_ids must be an int32 or int64 tensor, got {found}")
    n_rows, vocab = len(student.hidden), len(student.weight)
    if topk_ids.dim() != 2 or len(topk_ids) != n_rows or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must have shape [{n_rows}, M] with M > 0, got {list(topk_ids.shape)}")
    check_device("topk_ids", topk_ids, student.hidden.device)
    if n_rows == 0:
        return
    ordered = topk_ids.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    low, high, n_repeated = torch.stack([ordered.amin(), ordered.amax(), repeated.sum()]).tolist()
    if low < -1 or high >= vocab:
        raise ValueError(f"topk_ids holds {low if low < -1 else high}, expected a token id in [0, {vocab}) or −1")
    if n_repeated:
        row = int(repeated.any(1).nonzero()[0])
        raise ValueError(f"topk_ids repeats a token in row {row}; every token may occur once, pad with −1")


def _coefficients(
    lambdas: torch.Tensor | Sequence[float],
    normalizer: str,
    ref_logprobs: torch.Tensor | None,
    teacher_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Checks the log-probabilities; a [K+1, N] as in signed_coefficients, in float64."""
    n_rows, n_ids = topk_ids.shape
    if not isinstance(teacher_logprobs, torch.Tensor) or teacher_logprobs.dim() != 3:
        found = list(teacher_logprobs.shape) if isinstance(teacher_logprobs, torch.Tensor) else type(teacher_logprobs)
        raise ValueError(f"teacher_logprobs must be a tensor [K, {n_rows}, {n_ids}], got {found}")
    n_teachers = len(teacher_logprobs)
    check_vector("teacher_logprobs", teacher_logprobs, (n_teachers, n_rows, n_ids), topk_ids.device)
    coefficients = signed_coefficients(expand_lambdas(lambdas, n_teachers, n_rows), normalizer)
    if ref_logprobs is not None:
        check_vector("ref_logprobs", ref_logprobs, (n_rows, n_ids), topk_ids.device)
    elif (coefficients[-1] != 0).any():
        raise ValueError("ref_logprobs is None, but the reference has a non-zero coefficient at some token")
    return coefficients


def _target(models: list[torch.Tensor], coefficients: torch.Tensor, ids: torch.Tensor, tail_floor: float) -> _Target:
    """From the log-probabilities [n, M] of each model; a reference that was not given is the last coefficient."""
    t, t_tail = coefficients.new_zeros(ids.shape), coefficients.new_zeros(len(ids))
    for a, logprobs in zip(coefficients, models, strict=False):
        used = (a != 0).unsqueeze(1) & (ids >= 0)
        known = torch.where(used, logprobs.to(t.dtype), 0.0)
        mass = torch.where(used, known.exp(), 0.0).sum(1)
        t += a.unsqueeze(1) * known
        t_tail += a * (1 - mass).clamp(min=tail_floor).log()
    return t, t_tail


def _single_pass(
    student: Head,
    counted: torch.Tensor,
    ids: torch.Tensor,
    target: _Target,
    w: torch.Tensor,
    options: _Options,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, Grads]:
    """(L [n], student's tail mass [n], gradients) of the rows `counted` [n]; ids [n, M], target and w of these."""
    grads = HeadGradients(student.hidden, student.weight, needs)
    scale = half_precision_scale(student.hidden.dtype, w)
    vocab = len(student.weight)
    rows_per_chunk, width = chunk_shape(student.hidden, vocab, buffers=1)
    buffer = w.new_empty(rows_per_chunk * vocab)
    scratch = w.new_empty(rows_per_chunk * width)
    parts = [(w.new_zeros(0), w.new_zeros(0))]
    for places in slices(len(counted), rows_per_chunk):
        chunk = _Chunk(student, counted[places], ids[places], buffer, scratch, width, options.temperature)
        with torch.enable_grad():
            z, lse = chunk.z.requires_grad_(), chunk.lse.requires_grad_()
            part = _coarse_loss(z, lse, ids[places] >= 0, (target[0][places], target[1][places]), options)
        parts.append((part[0].detach(), part[1].detach()))
        if any(needs):
            upstream = w[places] if scale is None else w[places] / scale
            dz, dlse = torch.autograd.grad(part[0], (z, lse), upstream)
            grads.add(counted[places], chunk.h, chunk.dlogits(dz, dlse))
    token_loss, tail = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return token_loss, tail, grads.finish(scale)


def _coarse_loss(
    z: torch.Tensor, lse: torch.Tensor, valid: torch.Tensor, target: _Target, options: _Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L [n], tail mass [n]) from the tokens' logits z [n, M] and lse [n]."""
    t, t_tail = target
    log_p = torch.where(valid, z - lse.unsqueeze(1), 0.0)
    p = torch.where(valid, log_p.exp(), 0.0)
    rest = 1 - p.sum(1)
    tail, log_tail = rest.clamp(min=0), rest.clamp(min=options.tail_floor).log()
    if options.divergence == "reverse_kl":
        return (p * (log_p - t)).sum(1) + tail * (log_tail - t_tail), tail
    log_q = torch.log_softmax(torch.cat([t.masked_fill(~valid, -torch.inf), t_tail.unsqueeze(1)], 1), 1)
    q = log_q.exp()
    inside = torch.where(valid, q[:, :-1] * (log_q[:, :-1] - log_p), 0.0).sum(1)
    return inside + q[:, -1] * (log_q[:, -1] - log_tail), tail


class _Chunk:
    """n rows of the student: each vocabulary tile's own softmax, the logits z [n, M] of `ids`, and lse [n]."""

    def __init__(
        self,
        student: Head,
        rows: torch.Tensor,
        ids: torch.Tensor,
        buffer: torch.Tensor,
        scratch: torch.Tensor,
        width: int,
        temperature: float,
    ) -> None:
        self.ids, self.options = ids, (temperature, student.softcap)
        self.h = student.hidden[rows].to(gemm_dtype(student.hidden))
        self.z = buffer.new_zeros(ids.shape)
        self.tiles = []
        softmax = OnlineSoftmax(torch.zeros_like(rows), buffer.dtype, entropy=False)
        for cols in slices(len(student.weight), width):
            shape = len(rows), cols.stop - cols.start
            w = student.weight[cols].to(self.h.dtype)
            tile = logits(self.h, w, student.bias, cols, *self.options, tile_view(scratch, *shape)).to(buffer.dtype)
            local, inside = self._local(cols)
            self.z += torch.where(inside, tile.gather(1, local), 0.0)
            self.tiles.append((cols, softmax.update(tile, cols, tile_view(buffer[len(rows) * cols.start :], *shape))))
        self.lse = softmax.lse()

    def dlogits(self, dz: torch.Tensor, dlse: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tiles of the gradient of the raw head output from that of z [n, M] and lse [n]; overwrites the tiles."""
        temperature, softcap = self.options
        lse = self.lse.detach()
        p_ids = (self.z.detach() - lse.unsqueeze(1)).exp()
        at_ids = (dz + p_ids * dlse.unsqueeze(1)) * self._slope(self.z.detach()) / temperature
        for cols, tile in self.tiles:
            p = tile.probabilities_(lse)
            slope = None
            if softcap is not None:
                slope = self._slope(p.clamp(min=torch.finfo(p.dtype).tiny).log_().add_(lse.unsqueeze(1)))
            grad = p.mul_((dlse / temperature).unsqueeze(1))
            if slope is not None:
                grad.mul_(slope)
            local, inside = self._local(cols)
            missing = torch.where(inside, at_ids - grad.gather(1, local), 0.0)
            yield cols, grad.scatter_add_(1, local, missing)

    def _local(self, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of `ids` in a tile [n, M], and which of them are there."""
        local = self.ids - cols.start
        inside = (local >= 0) & (self.ids < cols.stop) & (self.ids >= 0)
        return local.clamp(0, cols.stop - cols.start - 1), inside

    def _slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """d z / d x · temperature, x the raw output."""
        temperature, softcap = self.options
        return 1.0 if softcap is None else 1.0 - (z * (temperature / softcap)).square()


def _metrics(token_loss: torch.Tensor, tail: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "token_count": torch.full_like(token_loss.sum(), len(token_loss), dtype=torch.float32),
        "token_loss_sum": token_loss.sum().float(),
        "tail_mass_sum": tail.sum().float(),
        "tail_mass_max": (tail.amax() if len(tail) else tail.sum()).float(),
    }
