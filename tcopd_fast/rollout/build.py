"""The engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tcopd_fast.config_sections import ModelConfig, RolloutConfig
from tcopd_fast.dist import World
from tcopd_fast.rollout import RolloutEngine, Weights


def build_engine(
    model: ModelConfig,
    rollout: RolloutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_model_len: int,
    vocab_size: int | None,
    seed: int,
    world: World,
    weights: Weights | None = None,
    run_dir: str | Path | None = None,
) -> RolloutEngine:
    """`rollout.engine` over the checkpoint as it lies on disk.

    max_model_len: most tokens of prompt and response. vocab_size: sample from these leading rows only. A collective
    with vllm, which also needs an initialised process group. weights and run_dir: the learner's, for engines in
    processes of their own; without them vLLM runs in this process whatever the mode.
    """
    device = world.device
    if rollout.engine == "vllm" and rollout.vllm.mode == "server" and weights is not None and run_dir is not None:
        from tcopd_fast.rollout.fleet import Fleet
        from tcopd_fast.rollout.remote import RemoteFleet
        from tcopd_fast.rollout.vllm_server import ServerEngine, log_folder

        fleet = (
            RemoteFleet(rollout, model.path, model.dtype, max_model_len, model.trust_remote_code)
            if rollout.vllm.server.urls
            else Fleet(
                rollout, model.path, model.dtype, max_model_len, seed, log_folder(run_dir), model.trust_remote_code
            )
        )
        return ServerEngine(fleet, tokenizer, world=world, weights=weights, config=rollout, vocab_size=vocab_size)
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
