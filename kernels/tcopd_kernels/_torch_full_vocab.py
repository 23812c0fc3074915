"""Full-vocabulary distillation in chunked torch, on any device.

A chunk of rows keeps two [n, V] buffers, the student's and the mixture's. Every logit is multiplied once, so the
work is one GEMM per model and one per gradient. The buffers are stored tile by tile, and all that needs no statistics
of the whole row is done while a tile is in cache. A frozen model is run only on the rows where its coefficient is
not 0.

With y = Σ_j a_j z_j over the frozen models, log p = z − lse(z) and log q = y − lse(y), the gradient with respect to
the student's logits z is, for the divergences of `full_vocab_tcopd_loss`,

    reverse_kl    p_v (d_v − L),  d_v = log p_v − Σ_j a_j log π_j(v),  L = Σ_v p_v d_v
    forward_kl    p_v − q_v
    jsd           (1−β) p_v (ℓ_v − Σ_u p_u ℓ_u),  ℓ = log p − log(β q + (1−β) p)

Logits are kept relative to a maximum of their row: differences of numbers near 1e3 would lose digits.

With grad_tol > 0 the gradient GEMMs leave out columns whose gradient is small in all rows of a chunk. What a row
loses is measured, g_i = Σ_dropped |dL_i/dx_iv| with x the raw output of the head, and rows above grad_tol are dense.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch

from ._full_vocab_compact import CompactionReport, keep_columns, pieces_within
from ._torch import OnlineSoftmax, gemm_dtype, logits, slices, tile_view
from ._torch_compact import piece_columns
from ._torch_grads import Grads, HeadGradients, Needs
from ._torch_loss import chunk_shape, half_precision_scale


class Head(NamedTuple):
    """One model's last hidden states [N, D] and output head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None


class Problem(NamedTuple):
    """Student, J frozen models with signed coefficients [J, N], weights [N] and the divergence to their mixture."""

    student: Head
    frozen: list[Head]
    coefficients: torch.Tensor
    weights: torch.Tensor
    temperature: float
    divergence: str
    beta: float


class LossSums(NamedTuple):
    """Loss, Σ L_n and Σ H_n over the rows with weight (0-dim), and the number of these rows."""

    loss: torch.Tensor
    token_loss: torch.Tensor
    entropy: torch.Tensor
    n_rows: int


def single_pass(problem: Problem, needs: Needs, grad_tol: float) -> tuple[LossSums, Grads, dict[str, torch.Tensor]]:
    """Sums, gradients of hidden, weight, bias, and with grad_tol > 0 the certificate of what these leave out."""
    student, acc = problem.student, problem.coefficients.dtype
    grads = HeadGradients(student.hidden, student.weight, needs)
    scale = half_precision_scale(student.hidden.dtype, problem.weights)
    report = CompactionReport(student.weight.shape[0], problem.coefficients)
    counted = problem.weights.nonzero().squeeze(1)
    rows_per_chunk, cols_per_tile = chunk_shape(student.hidden, student.weight.shape[0], buffers=2)
    buffers = student.hidden.new_empty((2, rows_per_chunk * student.weight.shape[0]), dtype=acc)
    scratch = student.hidden.new_empty((2, rows_per_chunk * cols_per_tile), dtype=acc)
    sums = problem.coefficients.new_zeros(3)
    kind = ReverseChunk if problem.divergence == "reverse_kl" else NormalizedChunk
    for rows in counted.split(rows_per_chunk) if len(counted) else []:
        chunk = kind(problem, rows, buffers, scratch, cols_per_tile)
        token_loss, entropy = chunk.forward()
        w = problem.weights[rows].to(acc)
        sums += torch.stack([(w * token_loss).sum(), token_loss.sum(), entropy.sum()])
        upstream = w if scale is None else w / scale
        if not any(needs):
            continue
        if grad_tol:
            add_compact(grads, chunk, upstream, grad_tol, report)
        else:
            tiles = ((cols, chunk.gradient(t).mul_(upstream.unsqueeze(1))) for t, cols in enumerate(chunk.cols))
            grads.add(rows, chunk.h, tiles)
    return LossSums(sums[0], sums[1], sums[2], len(counted)), grads.finish(scale), report.metrics() if grad_tol else {}


class FrozenChunk:
    """A frozen model in those rows of a chunk of n in which its coefficient is not 0."""

    def __init__(self, head: Head, rows: torch.Tensor, a: torch.Tensor, temperature: float) -> None:
        self.places = a.nonzero().squeeze(1)
        self.n_rows = len(rows)
        self.head, self.temperature = head, temperature
        self.a = a[self.places]
        self.h = head.hidden[rows[self.places]].to(gemm_dtype(head.hidden))
        self.softmax = OnlineSoftmax(torch.zeros_like(self.places), a.dtype, entropy=False)
        self.tile_max: list[torch.Tensor] = []
        self.reference: torch.Tensor | None = None

    def add_to_(self, out: torch.Tensor, sign: float, cols: slice, scratch: torch.Tensor) -> torch.Tensor:
        """out [n, columns] += sign · a z; returns the tempered logits z [places, columns].

        z is relative to the row's largest logit in the first tile: a constant of the row, which drops out.
        """
        z_out = tile_view(scratch, len(self.h), out.shape[1])
        w = self.head.weight[cols].to(self.h.dtype)
        z = logits(self.h, w, self.head.bias, cols, self.temperature, self.head.softcap, z_out).to(out.dtype)
        if self.reference is None:
            self.reference = z.amax(1)
        z.sub_(self.reference.unsqueeze(1))
        if len(self.places) == self.n_rows:
            out.addcmul_(z, self.a.unsqueeze(1), value=sign)
        else:
            out.index_add_(0, self.places, z * self.a.unsqueeze(1), alpha=sign)
        return z

    def add_max(self, z: torch.Tensor, cols: slice, scratch: torch.Tensor) -> torch.Tensor:
        """Takes up the tile z [places, columns] into the normaliser; returns a · max_v z_v, [n]."""
        self.tile_max.append(self.softmax.update(z, cols, tile_view(scratch, *z.shape)).max)
        return self._spread(self.a * self.tile_max[-1])

    def weighted_log_max(self) -> torch.Tensor:
        """a · log of the largest probability in each tile, [tiles, n]."""
        return self._spread(self.a * log_of_max(self.tile_max, self.softmax))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """[…, places] -> […, n], zeros elsewhere."""
        return values.new_zeros(*values.shape[:-1], self.n_rows).index_copy_(-1, self.places, values)


def log_of_max(tile_max: list[torch.Tensor], softmax: OnlineSoftmax) -> torch.Tensor:
    """log of the largest probability in each tile, [tiles, n], from each tile's largest logit."""
    return (torch.stack(tile_max) - softmax.max).sub_(softmax.sum.log())


class Chunk:
    """Forward and gradient of n rows; `first` and `second` hold one [n, columns] tile of each buffer per tile."""

    def __init__(
        self, problem: Problem, rows: torch.Tensor, buffers: torch.Tensor, scratch: torch.Tensor, width: int
    ) -> None:
        self.problem, self.rows, self.buffers, self.scratch = problem, rows, buffers, scratch
        self.vocab = problem.student.weight.shape[0]
        self.cols = list(slices(self.vocab, width))
        self.h = problem.student.hidden[rows].to(gemm_dtype(problem.student.hidden))
        self.first, self.second = (
            [tile_view(buffer[len(rows) * cols.start :], len(rows), cols.stop - cols.start) for cols in self.cols]
            for buffer in buffers
        )
        coefficients = problem.coefficients[:, rows]
        models = [
            FrozenChunk(head, rows, a, problem.temperature)
            for head, a in zip(problem.frozen, coefficients, strict=True)
        ]
        self.frozen = [model for model in models if len(model.places)]
        self.softmax = OnlineSoftmax(torch.zeros_like(rows), coefficients.dtype, entropy=False)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(token loss L [n], student entropy [n])."""
        raise NotImplementedError

    def gradient(self, t: int) -> torch.Tensor:
        """dL/dx of tile t, x the raw output of the head, in second[t]; leaves p in first[t]. Once per tile."""
        raise NotImplementedError

    def take(self, buffer: int, places: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Elements [m, k] of rows `places` [m] and `columns` [k] of a buffer."""
        width = self.cols[0].stop
        start = columns - columns % width
        stride = (self.vocab - start).clamp(max=width)
        index = (places.unsqueeze(1) * stride).add_(len(self.rows) * start + columns - start)
        return self.buffers[buffer].take(index)

    def _student_logits_(self, cols: slice, out: torch.Tensor) -> torch.Tensor:
        head = self.problem.student
        w = head.weight[cols].to(self.h.dtype)
        return out.copy_(logits(self.h, w, head.bias, cols, self.problem.temperature, head.softcap, out))

    def _to_raw_(self, grad: torch.Tensor, log_p: torch.Tensor | None) -> torch.Tensor:
        """dL/dz -> dL/dx through z = softcap·tanh(x/softcap)/temperature; overwrites log_p, needed with a softcap."""
        temperature, softcap = self.problem.temperature, self.problem.student.softcap
        if softcap is not None and log_p is not None:
            z = log_p.add_((self.softmax.max + self.softmax.sum.log()).unsqueeze(1))
            grad.mul_(1.0 - z.mul_(temperature / softcap).square_())
        return grad if temperature == 1.0 else grad.div_(temperature)


class ReverseChunk(Chunk):
    """first: softmax of each tile by itself.   second: d, relative to its value for the maxima of the tile."""

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        tile_max, tile_sum, mean_z, mean_d = [], [], [], []
        for cols, p, d in zip(self.cols, self.first, self.second, strict=True):
            tile = self.softmax.update(self._student_logits_(cols, d), cols, p)
            tile_max.append(tile.max)
            tile_sum.append(tile.sum)
            mean_z.append(_row_dot(p, d.sub_(tile.max.unsqueeze(1))))
            mixture_max = torch.zeros_like(tile.max)
            for model in self.frozen:
                z = model.add_to_(d, -1.0, cols, self.scratch[0])
                mixture_max += model.add_max(z, cols, self.scratch[1])
            mean_d.append(_row_dot(p, d.add_(mixture_max.unsqueeze(1))))
        log_max = log_of_max(tile_max, self.softmax)
        self.share = log_max.exp().mul_(torch.stack(tile_sum))
        reference = log_max - sum((model.weighted_log_max() for model in self.frozen), torch.zeros_like(log_max))
        token_loss = (self.share * (torch.stack(mean_d) + reference)).sum(0)
        entropy = -(self.share * (torch.stack(mean_z) + log_max)).sum(0)
        self.to_mean = reference - token_loss
        return token_loss, entropy

    def gradient(self, t: int) -> torch.Tensor:
        p = self.first[t].mul_(self.share[t].unsqueeze(1))
        grad = self.second[t].add_(self.to_mean[t].unsqueeze(1)).mul_(p)
        log_p = None
        if self.problem.student.softcap is not None:
            log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log_()
        return self._to_raw_(grad, log_p)


class NormalizedChunk(Chunk):
    """first: log p.   second: log q; both relative to the maximum of their tile until the normalisers are known."""

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        mixture = OnlineSoftmax(torch.zeros_like(self.rows), self.softmax.max.dtype, entropy=False)
        tile_max: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for cols, z, y in zip(self.cols, self.first, self.second, strict=True):
            self._student_logits_(cols, z)
            y.zero_()
            for model in self.frozen:
                model.add_to_(y, 1.0, cols, self.scratch[0])
            for softmax, side, largest in zip((self.softmax, mixture), (z, y), tile_max, strict=True):
                largest.append(softmax.update(side, cols, tile_view(self.scratch[0], *side.shape)).max)
                side.sub_(largest[-1].unsqueeze(1))
        log_max = log_of_max(tile_max[0], self.softmax), log_of_max(tile_max[1], mixture)
        token_loss, entropy, self.mean = (torch.zeros_like(self.softmax.max) for _ in range(3))
        for t, (log_p, log_q) in enumerate(zip(self.first, self.second, strict=True)):
            log_p.add_(log_max[0][t].unsqueeze(1))
            log_q.add_(log_max[1][t].unsqueeze(1))
            p, q = log_p.exp(), log_q.exp()
            entropy -= _row_dot(p, log_p)
            if self.problem.divergence == "forward_kl":
                token_loss += _row_dot(q, log_q - log_p)
            else:
                beta, log_m = self.problem.beta, self._log_middle(log_p, log_q)
                mean = _row_dot(p, log_p - log_m)
                self.mean += mean
                token_loss += (1 - beta) * mean + beta * _row_dot(q, log_q - log_m)
        return token_loss, entropy

    def gradient(self, t: int) -> torch.Tensor:
        log_p, log_q = self.first[t], self.second[t]
        p = log_p.exp()
        if self.problem.divergence == "forward_kl":
            grad = torch.sub(p, log_q.exp_(), out=log_q)
        else:
            difference = log_p - self._log_middle(log_p, log_q)
            grad = torch.mul(difference.sub_(self.mean.unsqueeze(1)), p, out=log_q).mul_(1 - self.problem.beta)
        grad = self._to_raw_(grad, log_p)
        self.first[t].copy_(p)
        return grad

    def _log_middle(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """log(β q + (1−β) p)."""
        return torch.logaddexp(log_p + log(1 - self.problem.beta), log_q + log(self.problem.beta))


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1)


def add_compact(
    grads: HeadGradients, chunk: Chunk, upstream: torch.Tensor, grad_tol: float, report: CompactionReport
) -> None:
    """Adds upstream [n] times the gradient of a chunk, rows within grad_tol from the columns that they kept."""
    bounds, total = [], torch.zeros_like(upstream)
    for t in range(len(chunk.cols)):
        grad = chunk.gradient(t)
        size = torch.abs(grad, out=tile_view(chunk.scratch[0], *grad.shape))
        bounds.append(size.amax(0))
        total += size.sum(1)

    def take(places: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad = chunk.take(1, places, columns)
        return grad, torch.stack([grad.abs().sum(1), chunk.take(0, places, columns).sum(1)])

    def lost(sums: torch.Tensor) -> torch.Tensor:
        return sums[0].clamp(min=0)

    sums = torch.stack([total, torch.ones_like(total)])
    per_piece = piece_columns(chunk.h, chunk.problem.student.weight)
    kept = keep_columns(torch.cat(bounds), sums, take, lost, grad_tol, per_piece)
    for columns, places, grad in pieces_within(kept, grad_tol, report):
        grads.add(chunk.rows[places], chunk.h[places], [(columns, grad.mul_(upstream[places].unsqueeze(1)))])
    others = (~(kept.dropped <= grad_tol)).nonzero().squeeze(1)
    if len(others):
        whole = len(others) == len(upstream)
        tiles = (tile if whole else tile[others] for tile in chunk.second)
        weighted = ((cols, g.mul_(upstream[others].unsqueeze(1))) for cols, g in zip(chunk.cols, tiles, strict=True))
        grads.add(chunk.rows[others], chunk.h[others], weighted)
