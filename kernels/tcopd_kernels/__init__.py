"""Linear-head log-probabilities and on-policy distillation losses that never hold the [N, V] logits.

Needs torch alone; Triton is imported only when its backend first runs.
"""

from __future__ import annotations

from .advantage import contrastive_advantage
from .full_vocab import full_vocab_tcopd_loss
from .linear_logprob import linear_logprob
from .linear_loss import linear_tcopd_loss
from .linear_step import StepTokens, linear_tcopd_step
from .multi import multi_linear_logprob
from .policy_loss import tcopd_policy_loss
from .topk import topk_tcopd_loss
from .types import TokenLogprobs

__all__ = [
    "StepTokens",
    "TokenLogprobs",
    "contrastive_advantage",
    "full_vocab_tcopd_loss",
    "linear_logprob",
    "linear_tcopd_loss",
    "linear_tcopd_step",
    "multi_linear_logprob",
    "tcopd_policy_loss",
    "topk_tcopd_loss",
]
