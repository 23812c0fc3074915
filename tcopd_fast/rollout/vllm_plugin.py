"""What vLLM's processes load through the entry point `vllm.general_plugins`: a weight transfer for CPUs.

Registering is all it does, unless the trainer started the process as a rollout engine on a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch

ON_CPU = "TCOPD_CPU_ROLLOUT_ENGINE"
"""Set in the environment of rollout engines that the trainer starts on a CPU."""


def register() -> None:
    """vLLM calls this once in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from tcopd_fast.rollout.vllm_engine import keep_cpu_linears_plain

    module = "tcopd_fast.rollout.vllm_gloo"
    for factory, name in (
        (WeightTransferEngineFactory, "GlooWorkerEngine"),
        (WeightTransferTrainerFactory, "GlooTrainerEngine"),
    ):
        if "tcopd_gloo" not in factory._registry:
            factory.register_engine("tcopd_gloo", module, name)
    if os.environ.get(ON_CPU):
        keep_cpu_linears_plain()


class RolloutWorker:
    """Methods added to vLLM's worker (`--worker-extension-cls`)."""

    model_runner: Any

    def describe(self) -> dict[str, Any]:
        """What the worker runs, for a trainer to compare with its student; see `shape_of`."""
        model = self.model_runner.model_config
        return shape_of(model.hf_config, str(model.dtype).removeprefix("torch."))

    def cut_vocabulary(self, vocab_size: int) -> None:
        """Sample from the leading `vocab_size` rows of the head only."""
        from tcopd_fast.rollout.vllm_engine import cut_vocabulary

        with torch.inference_mode():
            cut_vocabulary(self.model_runner.model, vocab_size)


def shape_of(config: Any, dtype: str) -> dict[str, Any]:
    """The parts of a Hugging Face config that decide which weights fit, and the compute dtype."""
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")  # fmt: skip
    text = config.get_text_config()
    return {**{key: getattr(text, key, None) for key in keys}, "dtype": dtype}
