"""Stage 6, loss: the clipped policy loss of one micro-batch, without logits.

    A = r − (log π_old − log π_ref)      loss = −Σ_n weights_n · w_n · clip(ρ_n) A_n

ρ = π_θ/π_old token by token; w corrects the mismatch between sampler and learner (see tcopd_kernels.tcopd_policy_loss).
"""

from __future__ import annotations

from tcopd_kernels import TokenLogprobs, linear_tcopd_loss
from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.models import PackedCausalLM
from tcopd_fast.types import Batch


def policy_loss(lm: PackedCausalLM, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor], TokenLogprobs]:
    """(loss, metrics, detached logprobs and entropies [N]) of one micro-batch.

    The loss is a 0-dim float32 tensor: this micro-batch's share of the global mean, times the number of ranks.
    Metrics add up over micro-batches, but for those named *_max.
    """
    objective = config.objective
    hidden_ND = lm.hidden(batch.tokens)
    head = lm.head()
    loss, metrics, scored = linear_tcopd_loss(
        hidden_ND,
        head.weight,
        batch.tokens.targets,
        reward=batch.reward,
        ref_logprob=batch.ref_logprob,
        old_logprob=batch.old_logprob,
        rollout_logprob=batch.rollout_logprob if objective.is_cap is not None else None,
        weights=batch.weights,
        bias=head.bias,
        temperature=config.rollout.temperature,
        softcap=head.softcap,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        is_cap=objective.is_cap,
        advantage_clamp=objective.advantage_clamp,
        ref_kl_coef=objective.ref_kl_coef,
        entropy=True,
        vocab_size=lm.vocab_size,
        grad_tol=config.loss.grad_tol,
    )
    if config.loss.grad_tol:
        metrics["column_sum"] = metrics["grad_row_count"] * (lm.vocab_size or len(head.weight))
    return loss, metrics, scored
