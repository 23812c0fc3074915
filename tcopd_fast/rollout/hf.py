"""The embedded engine: batched sampling from a transformers model with a KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from tcopd_fast.models import DTYPES, resolve_path
from tcopd_fast.rollout import response_limit
from tcopd_fast.timeline import Span
from tcopd_fast.types import FinishReason, Prompt, Rollout

# Rows of finished sequences are dropped from the KV cache once they are this share of it: dropping copies
# the cache, so it has to pay for itself.
FINISHED_SHARE = 0.25


@dataclass
class _Row:
    """One sequence being decoded."""

    index: int
    prompt: Prompt
    sample: int
    limit: int
    uniforms: Tensor
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HfEngine:
    """RolloutEngine over its own copy of the student.

    Every sequence draws its randomness from a generator seeded by (seed, prompt id, sample), one uniform per
    token turned into a token by the inverse CDF. Samples therefore depend neither on how sequences are batched
    nor on how prompts are spread over ranks (up to rounding of the forward).
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_batch_size: int,
        vocab_size: int | None,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.version = 0
        self.apart = False
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.vocab_size = vocab_size
        self.device = device
        model = AutoModelForCausalLM.from_pretrained(
            resolve_path(model_path),
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.parameters = dict(self.model.named_parameters())
        self.eos_ids = eos_token_ids(model_path, tokenizer, self.model.generation_config)

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights in place. Raises KeyError for a name the model does not have."""
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See RolloutEngine. Prompts of similar length share a batch."""
        rows = [
            _Row(
                i * samples + s,
                prompt,
                s,
                response_limit(prompt, max_new_tokens),
                _uniforms(seed, prompt.id, s, max_new_tokens),
            )
            for i, prompt in enumerate(prompts)
            for s in range(samples)
        ]
        order = sorted(rows, key=lambda row: (len(row.prompt.token_ids), row.index))
        done: dict[int, Rollout] = {}

        def finish(row: _Row, reason: FinishReason) -> None:
            text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
            logprobs = torch.tensor(row.logprobs, dtype=torch.float32)
            done[row.index] = Rollout(
                row.prompt,
                row.sample,
                tuple(row.ids),
                logprobs,
                reason,
                self.version,
                text,
            )
            if on_finished is not None:
                on_finished(done[row.index])

        for start in range(0, len(order), self.max_batch_size):
            self._decode(order[start : start + self.max_batch_size], temperature, finish)
        return [done[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], temperature: float, finish: Callable[[_Row, FinishReason], None]) -> None:
        longest = max(len(row.prompt.token_ids) for row in rows)
        ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
        mask_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
        for b, row in enumerate(rows):
            ids_BT[b, longest - len(row.prompt.token_ids) :] = torch.tensor(row.prompt.token_ids)
            mask_BT[b, longest - len(row.prompt.token_ids) :] = 1
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        uniforms_BL = torch.stack([row.uniforms for row in rows]).to(self.device)
        position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.model.config)
        eos = torch.tensor(sorted(self.eos_ids), device=self.device)
        alive = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        limit_B = torch.tensor([row.limit for row in rows], device=self.device)
        for t in range(max(row.limit for row in rows)):
            out = self.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            token_B, logprob_B = self._sample(out.logits[:, -1], uniforms_BL[:, t], temperature)
            ended_B = torch.isin(token_B, eos)
            was_alive = alive.tolist()
            for b, (token, logprob, ended) in enumerate(
                zip(token_B.tolist(), logprob_B.tolist(), ended_B.tolist(), strict=True)
            ):
                if was_alive[b]:
                    rows[b].ids.append(token)
                    rows[b].logprobs.append(logprob)
                    if ended or t + 1 == rows[b].limit:
                        finish(rows[b], "stop" if ended else "length")
            alive = alive & ~ended_B & (t + 1 < limit_B)
            if not bool(alive.any()):
                return
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            position_BT = position_BT[:, -1:] + 1
            ids_BT = token_B[:, None]
            if int(alive.sum()) <= (1 - FINISHED_SHARE) * len(rows):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows = [rows[b] for b in keep.tolist()]
                ids_BT, mask_BT, position_BT = ids_BT[keep], mask_BT[keep], position_BT[keep]
                uniforms_BL, limit_B, alive = uniforms_BL[keep], limit_B[keep], alive[keep]

    def _sample(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Sampled token ids [B] and their logprobs, float32 [B]."""
        logits_BV = logits_BV[:, : self.vocab_size].float()
        if temperature == 0:
            token_B = logits_BV.argmax(-1)
            return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None])[:, 0]
        logprob_BV = (logits_BV / temperature).log_softmax(-1)
        # float64: the running sum over a large vocabulary must not lose the tail.
        cdf_BV = logprob_BV.double().exp().cumsum(-1)
        threshold_B1 = uniform_B.double()[:, None] * cdf_BV[:, -1:]
        token_B = torch.searchsorted(cdf_BV, threshold_B1, right=True)[:, 0].clamp_max(cdf_BV.shape[1] - 1)
        return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def spans(self, until: float) -> dict[str, list[Span]]:
        """None: it generates in its rank's rollout stage."""
        return {}

    def sleep(self) -> None:
        """Nothing to give back: the KV cache went with the last response."""

    def close(self) -> None:
        """Drop the model."""
        del self.model, self.parameters


def eos_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase, generation_config: object) -> set[int]:
    """Every id that ends a response: the tokenizer's and the checkpoint's generation config's."""
    declared = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    if not ids:
        raise ValueError(f"{model_path}: neither tokenizer nor generation_config names an eos token")
    return ids


def _uniforms(seed: int, prompt_id: str, sample: int, count: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
