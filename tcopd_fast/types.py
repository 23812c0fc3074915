"""What the stages hand to each other: frozen dataclasses, with shapes.

Letters: B sequences, L response tokens of one sequence, N response tokens of a batch, T packed tokens
(prompt and response), K teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One question, already chat-templated.

    id: unique within its source. domain: key into a per-domain λ table. token_ids: what the engines see.
    problem: the user's text, for people. answer: the judge's reference, or None when there is none.
    source: where it came from (`data_source` of verl rows, else the path).
    max_new_tokens: longest response to this one, None where only the engine's limit holds.
    """

    id: str
    domain: str
    token_ids: tuple[int, ...]
    problem: str
    answer: str | None
    source: str
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    token_ids: L sampled ids, the end-of-sequence token included when one was sampled.
    logprobs: float32 [L], log-probability of each sampled id under the sampler at the sampling temperature.
    finish_reason: "stop" (ended by itself) or "length" (cut at the limit).
    version: how many weight syncs the engine had seen; sample: index among the prompt's samples.
    """

    prompt: Prompt
    sample: int
    token_ids: tuple[int, ...]
    logprobs: Tensor
    finish_reason: FinishReason
    version: int
    text: str


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the logprob of every sampled token under every frozen model.

    ref_logprob: float32 [L], or None when no formula in use needs it.
    teacher_logprobs: name -> float32 [L]; a teacher whose λ is 0 for this sample is absent.
    teacher_ref_logprobs: name -> float32 [L], only for teachers with a base of their own.
    old_logprob: float32 [L] under the learner's weights before this batch's first optimizer step, or None
    when the step is strictly on-policy and the learner's own forward supplies it.
    """

    rollout: Rollout
    ref_logprob: Tensor | None
    teacher_logprobs: Mapping[str, Tensor]
    teacher_ref_logprobs: Mapping[str, Tensor]
    old_logprob: Tensor | None


@dataclass(frozen=True)
class RewardedRollout:
    """A scored rollout with its reward.

    reward: float32 [L], r_t (plus the judge's term when it is mixed in).
    ref_logprob: float32 [L], the log π_ref the reward was taken against (zeros when it cancels).
    lambdas: name -> signed coefficient in force for this sample. correct: the judge's verdict.
    """

    scored: ScoredRollout
    reward: Tensor
    ref_logprob: Tensor
    lambdas: Mapping[str, float]
    correct: bool | None


@dataclass(frozen=True)
class PackedTokens:
    """Sequences laid end to end, without padding.

    input_ids, position_ids: int64 [T]. cu_seqlens: int32 [B+1], where each sequence starts and ends.
    predict_at: int64 [N], positions whose hidden state predicts a response token.
    targets: int64 [N], those response tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    predict_at: Tensor
    targets: Tensor
    max_seqlen: int

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on `device`; cu_seqlens goes along."""
        return PackedTokens(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.cu_seqlens.to(device),
            self.predict_at.to(device),
            self.targets.to(device),
            self.max_seqlen,
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the loss.

    indices: which of the rank's rollouts are packed here, in order (empty: a filler that keeps ranks in step).
    lengths: response tokens of each, summing to N.
    tokens: the packed sequences. reward, ref_logprob, rollout_logprob, weights: float32 [N];
    old_logprob: float32 [N] or None (strictly on-policy). weights carry the mask, the global normaliser and
    the number of ranks, so that the sum over all micro-batches and the mean over ranks is the loss.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: PackedTokens
    reward: Tensor
    ref_logprob: Tensor
    rollout_logprob: Tensor
    old_logprob: Tensor | None
    weights: Tensor
