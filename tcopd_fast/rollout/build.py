"""The engine that a configuration asks for."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from tcopd_fast.config_sections import ModelConfig, RolloutConfig
from tcopd_fast.rollout import RolloutEngine


def build_engine(
    model: ModelConfig,
    rollout: RolloutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_model_len: int,
    vocab_size: int | None,
    seed: int,
    device: torch.device,
) -> RolloutEngine:
    """`rollout.engine` over the checkpoint as it lies on disk.

    max_model_len: most tokens of prompt and response. vocab_size: sample from these leading rows only. A collective
    with vllm, which also needs an initialised process group.
    """
    if rollout.engine == "vllm":
        from tcopd_fast.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model.path,
            tokenizer,
            config=rollout,
            dtype=model.dtype,
            max_model_len=max_model_len,
            seed=seed,
            device=device,
            vocab_size=vocab_size,
            trust_remote_code=model.trust_remote_code,
        )
    from tcopd_fast.rollout.hf import HfEngine

    return HfEngine(
        model.path,
        tokenizer,
        dtype=model.dtype,
        max_batch_size=rollout.max_batch_size,
        vocab_size=vocab_size,
        device=device,
        trust_remote_code=model.trust_remote_code,
    )
