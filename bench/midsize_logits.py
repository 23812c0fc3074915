"""The paper's way for the mid-size benchmark: every frozen model resident, and the logits of every token materialised.

The models and the optimizer are those of the other cells. Plain transformers and torch do the rest, a micro-batch at a
time: logits in the model's dtype, their float32 copy, log_softmax, the sampled token's entry, and autograd back through
all of it. It is written as one would write it who minds memory but not kernels: only positions that predict a response
token get logits, the policy's entropy, which the trainer logs, is left out, and nothing is kept longer than needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tcopd_fast.adapter import ADAPTER
from tcopd_fast.clock import StageClock
from tcopd_fast.config import Config
from tcopd_fast.learner import Learner
from tcopd_fast.models import ModelSet, PackedCausalLM, load_causal_lm
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.types import Batch, PackedTokens, Rollout, ScoredRollout


def token_logprobs(lm: PackedCausalLM, tokens: PackedTokens, temperature: float) -> Tensor:
    """Logprob of every response token, float32 [N], from materialised logits."""
    logits_NV = lm.model(
        input_ids=tokens.input_ids[None],
        position_ids=tokens.position_ids[None],
        use_cache=False,
        logits_to_keep=tokens.predict_at,
        cu_seq_lens_q=tokens.cu_seqlens,
        cu_seq_lens_k=tokens.cu_seqlens,
        max_length_q=tokens.max_seqlen,
        max_length_k=tokens.max_seqlen,
    ).logits[0]
    logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return logits_NV.log_softmax(-1).gather(1, tokens.targets[:, None])[:, 0]


def logits_loss(lm: PackedCausalLM, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """(loss, detached logprobs [N]) of one micro-batch: the clipped objective of `tcopd_fast.loss.policy_loss`.

    batch: on the model's device. The bounds of the objective are all set, as by default; it has no KL penalty and no
    clamp of the advantage.
    """
    settings = config.objective
    logprob = token_logprobs(lm, batch.tokens, config.rollout.temperature)
    old = logprob.detach() if batch.old_logprob is None else batch.old_logprob
    advantage = batch.reward - (old - batch.ref_logprob)
    ratio = (logprob - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    token_loss = torch.maximum(-ratio * advantage, -clipped * advantage)
    token_loss = torch.where(advantage < 0, token_loss.minimum(-settings.dual_clip * advantage), token_loss)
    mismatch = (old - batch.rollout_logprob).exp().clamp(max=settings.is_cap)
    return (batch.weights * mismatch * token_loss).sum(), logprob.detach()


class LogitsLearner(Learner):
    """The learner with its loss taken from logits; weights, DeepSpeed and optimizer are the same."""

    def _forward_backward(self, batch: Batch, old: dict[int, Tensor], clock: StageClock) -> dict[str, float]:
        with clock.stage("loss"):
            loss, logprob = self.engine(logits_loss, on_device(batch, self.world.device), self.config)
        with clock.stage("learner"):
            self.engine.backward(loss, scale_wrt_gas=False)
        old.update(zip(batch.indices, logprob.cpu().split(batch.lengths), strict=True))
        return {"loss": float(loss.detach())}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch elsewhere."""
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor | PackedTokens)}
    return Batch(**{**vars(batch), **moved})


class LogitsScorer:
    """Reference and teachers, all resident; scores them one after another.

    With a LoRA student the reference is the student without its adapter, as in the other cells: no second copy.
    """

    def __init__(self, config: Config, models: ModelSet, learner: Learner) -> None:
        self.config, self.device, self.student = config, learner.world.device, learner.lm
        options: dict[str, Any] = {"dtype": config.model.dtype, "attention": "sdpa", "vocab_size": models.vocab_size}

        def load(path: str) -> PackedCausalLM:
            return load_causal_lm(path, **options).to(self.device).eval().requires_grad_(False)

        self.reference = None if config.model.lora is not None else load(config.model.path)
        self.teachers = {name: load(teacher.path) for name, teacher in config.teachers.items()}

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        if self.reference is None:
            with without_adapter(self.student):
                reference = self._logprobs(self.student, rollouts)
        else:
            reference = self._logprobs(self.reference, rollouts)
        teachers = {name: self._logprobs(lm, rollouts) for name, lm in self.teachers.items()}
        return [
            ScoredRollout(rollout, reference[i], {name: scores[i] for name, scores in teachers.items()}, {}, None)
            for i, rollout in enumerate(rollouts)
        ]

    @torch.no_grad()
    def _logprobs(self, lm: PackedCausalLM, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """float32 [L] per rollout, on the CPU."""
        sizes = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts]
        out: dict[int, Tensor] = {}
        for group in split_by_tokens(sizes, self.config.scoring.max_tokens_per_forward):
            rows = [rollouts[i] for i in group]
            tokens = pack([r.prompt.token_ids for r in rows], [r.token_ids for r in rows]).to(self.device)
            scores = token_logprobs(lm, tokens, self.config.rollout.temperature).cpu()
            out.update(zip(group, scores.split([len(r.token_ids) for r in rows]), strict=True))
        return [out[i] for i in range(len(rollouts))]


@contextmanager
def without_adapter(lm: PackedCausalLM) -> Iterator[None]:
    """While open the model computes with its frozen weights alone.

    peft's own switch would also take the factors' requires_grad away, on which DeepSpeed's hooks hang.
    """
    layers = [module for module in lm.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale
