"""Linear-head log-probabilities and on-policy distillation losses that never hold the [N, V] logits.

Needs torch alone; Triton is imported only when its backend first runs.
"""

from __future__ import annotations

from tcopd_kernels.advantage import contrastive_advantage
from tcopd_kernels.full_vocab import full_vocab_tcopd_loss
from tcopd_kernels.linear_logprob import linear_logprob
from tcopd_kernels.linear_loss import linear_tcopd_loss
from tcopd_kernels.multi import multi_linear_logprob
from tcopd_kernels.policy_loss import tcopd_policy_loss
from tcopd_kernels.types import TokenLogprobs

__all__ = [
    "TokenLogprobs",
    "contrastive_advantage",
    "full_vocab_tcopd_loss",
    "linear_logprob",
    "linear_tcopd_loss",
    "multi_linear_logprob",
    "tcopd_policy_loss",
]
