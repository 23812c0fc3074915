"""Chunked linear log-probabilities in plain torch, for any device.

Logits exist only as tiles of at most WORKSPACE_BYTES. Softmax statistics are accumulated online over vocabulary
tiles (Milakov & Gimelshein, 2018), so a second pass over the vocabulary is needed only for gradients.
Half-precision inputs are multiplied with fp32 accumulation and fp32 results.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch

from tcopd_kernels._checks import accumulation_dtype

# Upper bound of one logits tile. Up to three such tiles (logits, shifted logits, exponentials) are alive at
# once, besides one fp32 tile of weight rows (of the same bound) and the gradients themselves.
WORKSPACE_BYTES = 64 * 2**20


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hidden [N,D], weight [V,D], targets [N] int64 in [0,V) -> logprob [N], lse [N], entropy [N] or None."""
    n_rows, dim = hidden.shape
    acc = accumulation_dtype(hidden.dtype)
    operand = gemm_dtype(hidden)
    rows_per_tile, cols_per_tile = tile_shape(n_rows, weight.shape[0], dim, acc)
    row_tiles = list(slices(n_rows, rows_per_tile))
    stats = [OnlineSoftmax(targets[rows], acc, entropy) for rows in row_tiles]
    for cols in slices(weight.shape[0], cols_per_tile):
        w = weight[cols].to(operand)
        for rows, row_stats in zip(row_tiles, stats, strict=True):
            row_stats.update(logits(hidden[rows].to(operand), w, bias, cols, temperature, softcap), cols)
    if not stats:
        empty = hidden.new_empty(0, dtype=acc)
        return empty, empty.clone(), empty.clone() if entropy else None
    logprob, lse, ent = zip(*(row_stats.finish() for row_stats in stats), strict=True)
    return torch.cat(logprob), torch.cat(lse), torch.cat(ent) if entropy else None


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    grad_tol: float = 0.0,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden [N,D], weight [V,D], bias [V] in their own dtypes, accumulated in fp32.

    Logits are recomputed tile by tile. The gradients are exact whatever `grad_tol` is.
    """
    n_rows, dim = hidden.shape
    acc = accumulation_dtype(hidden.dtype)
    operand = gemm_dtype(hidden)
    upstream = Upstream.scaled(targets, lse, entropy, grad_logprob, grad_lse, grad_entropy, operand)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=acc) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else None
    rows_per_tile, cols_per_tile = tile_shape(n_rows, weight.shape[0], dim, acc)
    for cols in slices(weight.shape[0], cols_per_tile):
        w = weight[cols].to(operand)
        tile_weight = w.new_zeros(w.shape, dtype=acc) if need_weight else None
        tile_bias = w.new_zeros(len(w), dtype=acc) if grad_bias is not None else None
        for rows in slices(n_rows, rows_per_tile):
            h = hidden[rows].to(operand)
            z = logits(h, w, bias, cols, temperature, softcap)
            dz = upstream[rows].dlogits_(z, cols, temperature, softcap)
            if tile_bias is not None:
                tile_bias += dz.sum(0)
            dz = dz.to(operand)
            if grad_hidden is not None:
                add_matmul_(grad_hidden[rows], dz, w)
            if tile_weight is not None:
                add_matmul_(tile_weight, dz.T, h)
        if grad_weight is not None and tile_weight is not None:
            grad_weight[cols] = tile_weight.mul_(upstream.scale)
        if grad_bias is not None and tile_bias is not None:
            grad_bias[cols] = tile_bias.mul_(upstream.scale)
    if grad_hidden is not None:
        grad_hidden = grad_hidden.mul_(upstream.scale).to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


class OnlineSoftmax:
    """Running max m, Σ exp(z−m), Σ exp(z−m)(z−m) and target logit of a block of rows over vocabulary tiles."""

    def __init__(self, targets: torch.Tensor, dtype: torch.dtype, entropy: bool) -> None:
        self.targets = targets
        self.entropy = entropy
        # The lowest finite number stands for −inf: exp(m − m') is then 0, never NaN, even for a tile of −inf.
        self.lowest = torch.finfo(dtype).min
        self.max = torch.full(targets.shape, self.lowest, dtype=dtype, device=targets.device)
        self.sum = torch.zeros_like(self.max)
        self.weighted_sum = torch.zeros_like(self.max)
        self.target_logit = torch.zeros_like(self.max)

    def update(self, z: torch.Tensor, cols: slice) -> None:
        """z [n, cols]: the next tile, left unchanged."""
        local = self.targets - cols.start
        inside = (local >= 0) & (local < z.shape[1])
        found = z.gather(1, local.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target_logit = torch.where(inside, found, self.target_logit)
        new_max = torch.maximum(self.max, z.amax(1))
        decay = (self.max - new_max).exp()
        shifted = z - new_max.unsqueeze(1)
        if self.entropy:
            exps = shifted.exp()
            carried = decay * (self.weighted_sum + (self.max - new_max) * self.sum)
            # A −inf logit contributes exp(−inf)·(−inf) = 0, hence the finite clamp.
            self.weighted_sum = carried + exps.mul_(shifted.clamp_(min=self.lowest)).sum(1)
            exps = shifted.exp_()
        else:
            exps = shifted.exp_()
        self.sum = decay * self.sum + exps.sum(1)
        self.max = new_max

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(logprob, lse, entropy or None), each [n]."""
        log_sum = self.sum.log()
        entropy = (log_sum - self.weighted_sum / self.sum) if self.entropy else None
        return (self.target_logit - self.max) - log_sum, self.max + log_sum, entropy


class Upstream:
    """Gradients that arrive at logprob, lse and entropy, with what is needed to push them to the logits."""

    def __init__(
        self,
        targets: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor | None,
        grad_logprob: torch.Tensor,
        grad_lse: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        scale: torch.Tensor | float = 1.0,
    ) -> None:
        self.targets, self.lse, self.entropy = targets, lse, entropy
        self.grad_logprob, self.grad_lse, self.grad_entropy = grad_logprob, grad_lse, grad_entropy
        self.scale = scale

    @classmethod
    def scaled(
        cls,
        targets: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor | None,
        grad_logprob: torch.Tensor | None,
        grad_lse: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        operand: torch.dtype,
    ) -> Upstream:
        """Fills absent gradients; for fp16 GEMMs divides them by their largest magnitude, kept in `scale`."""
        zeros = torch.zeros_like(lse)
        g_logprob = zeros if grad_logprob is None else grad_logprob.to(lse.dtype)
        g_lse = zeros if grad_lse is None else grad_lse.to(lse.dtype)
        g_entropy = None if grad_entropy is None else grad_entropy.to(lse.dtype)
        scale: torch.Tensor | float = 1.0
        if operand == torch.float16 and len(lse) > 0:
            # 1/token_count times a probability is below the smallest fp16 number.
            parts = [g.abs().amax() for g in (g_logprob, g_lse, g_entropy) if g is not None]
            scale = torch.stack(parts).amax().clamp_min(torch.finfo(lse.dtype).tiny)
            g_logprob, g_lse = g_logprob / scale, g_lse / scale
            g_entropy = None if g_entropy is None else g_entropy / scale
        return cls(targets, lse, entropy, g_logprob, g_lse, g_entropy, scale)

    def __getitem__(self, rows: slice) -> Upstream:
        return Upstream(
            self.targets[rows],
            self.lse[rows],
            None if self.entropy is None else self.entropy[rows],
            self.grad_logprob[rows],
            self.grad_lse[rows],
            None if self.grad_entropy is None else self.grad_entropy[rows],
            self.scale,
        )

    def dlogits_(self, z: torch.Tensor, cols: slice, temperature: float, softcap: float | None) -> torch.Tensor:
        """Overwrites the logits tile z [n, cols] with the gradient of the raw head output.

        dz_v = g_logprob (1[v=y] − p_v) + g_lse p_v − g_entropy p_v (log p_v + H), then the chain through
        z = softcap·tanh(u/softcap)/temperature.
        """
        slope = None if softcap is None else 1.0 - (z * (temperature / softcap)).square_()
        z.sub_(self.lse.unsqueeze(1))
        coefficient = (self.grad_lse - self.grad_logprob).unsqueeze(1)
        if self.grad_entropy is None or self.entropy is None:
            z.exp_().mul_(coefficient)
        else:
            # The clamp keeps p·log p = 0 where the logit is −inf.
            log_p = z.clamp_(min=torch.finfo(z.dtype).min)
            factor = coefficient - self.grad_entropy.unsqueeze(1) * (log_p + self.entropy.unsqueeze(1))
            z = log_p.exp_().mul_(factor)
        local = self.targets - cols.start
        inside = (local >= 0) & (local < z.shape[1])
        at_target = torch.where(inside, self.grad_logprob, 0.0).unsqueeze(1)
        z.scatter_add_(1, local.clamp(0, z.shape[1] - 1).unsqueeze(1), at_target)
        if slope is not None:
            z.mul_(slope)
        return z if temperature == 1.0 else z.div_(temperature)


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cols: slice,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """softcap·tanh((h Wᵀ + b)/softcap)/temperature for the weight rows `cols`, [n, cols], fp32 or float64."""
    z = matmul(hidden, weight.T)
    if bias is not None:
        z += bias[cols]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


def gemm_dtype(tensor: torch.Tensor) -> torch.dtype:
    """dtype of the GEMM operands: the input's own where it can give an fp32 result, else that of fp32 copies."""
    if tensor.dtype in (torch.float32, torch.float64) or _half_gemm_has_fp32_result(tensor):
        return tensor.dtype
    return torch.float32


def _half_gemm_has_fp32_result(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 (or float64) result; operands as chosen by gemm_dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def add_matmul_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b, out in fp32 or float64."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += matmul(a, b)


def tile_elements(dtype: torch.dtype) -> int:
    return max(1, WORKSPACE_BYTES // dtype.itemsize)


def tile_shape(n_rows: int, vocab: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a logits tile, near square unless few rows or a wide weight say otherwise."""
    elements = tile_elements(dtype)
    wide = max(isqrt(elements), elements // max(n_rows, 1))
    cols = max(1, min(vocab, wide, elements // max(dim, 1)))
    return max(1, min(n_rows, elements // cols)), cols


def slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
