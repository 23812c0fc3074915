"""From the gradients of logprob, lse and entropy to those of the logits, tile by tile."""

from __future__ import annotations

import torch

# exp of this is 0 in fp32 and in float64.
NEGLIGIBLE_LOG_P = -1e4


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
        target_logit: torch.Tensor | None = None,
    ) -> None:
        self.targets, self.lse, self.entropy = targets, lse, entropy
        self.grad_logprob, self.grad_lse, self.grad_entropy = grad_logprob, grad_lse, grad_entropy
        self.scale, self.target_logit = scale, target_logit

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

    def __getitem__(self, rows: slice | torch.Tensor) -> Upstream:
        return Upstream(
            self.targets[rows],
            self.lse[rows],
            None if self.entropy is None else self.entropy[rows],
            self.grad_logprob[rows],
            self.grad_lse[rows],
            None if self.grad_entropy is None else self.grad_entropy[rows],
            self.scale,
            None if self.target_logit is None else self.target_logit[rows],
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
            # A removed token's log p times a gradient above 1 would overflow, and 0 · inf is NaN.
            z.clamp_(min=NEGLIGIBLE_LOG_P)
            factor = coefficient - self.grad_entropy.unsqueeze(1) * (z + self.entropy.unsqueeze(1))
            z = z.exp_().mul_(factor)
        self.add_at_targets_(z, cols, self.grad_logprob)
        if slope is not None:
            z.mul_(slope)
        return z if temperature == 1.0 else z.div_(temperature)

    def from_probabilities_(
        self,
        p: torch.Tensor,
        cols: slice | torch.Tensor,
        temperature: float,
        softcap: float | None,
        share: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dlogits_ from p [n, cols] in place of the logits; needs no gradient of the entropy.

        With a softcap its slope is taken from log p, which a target of vanishing probability does not have: with
        grad_logprob, target_logit [n] must be there for it.

        share: [n] factors that p still lacks. cols: a slice, or ascending indices.
        """
        coefficient, at_target = (self.grad_lse - self.grad_logprob) / temperature, self.grad_logprob / temperature
        if softcap is None:
            p.mul_((coefficient if share is None else coefficient * share).unsqueeze(1))
            self.add_at_targets_(p, cols, at_target)
            return p
        p = p if share is None else p.mul_(share.unsqueeze(1))
        z = p.clamp(min=torch.finfo(p.dtype).tiny).log_().add_(self.lse.unsqueeze(1))
        p.mul_(coefficient.unsqueeze(1)).mul_(1.0 - z.mul_(temperature / softcap).square_())
        if self.target_logit is not None:
            slope_N = 1.0 - (self.target_logit * (temperature / softcap)).square()
            self.add_at_targets_(p, cols, at_target * slope_N)
        return p

    def add_at_targets_(self, dz: torch.Tensor, cols: slice | torch.Tensor, values: torch.Tensor) -> None:
        """Adds values [n] to dz [n, cols] at the targets that are among the columns."""
        if isinstance(cols, slice):
            local = self.targets - cols.start
            inside = (local >= 0) & (local < dz.shape[1])
            local = local.clamp(0, dz.shape[1] - 1)
        else:
            local = torch.searchsorted(cols, self.targets).clamp(max=dz.shape[1] - 1)
            inside = cols[local] == self.targets
        dz.scatter_add_(1, local.unsqueeze(1), torch.where(inside, values, 0.0).unsqueeze(1))
