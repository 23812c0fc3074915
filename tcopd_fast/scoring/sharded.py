"""A frozen model whose weights are spread over the ranks: DeepSpeed ZeRO-3 without an optimizer.

Every forward gathers one layer after another from all ranks, so all ranks must run equally many forwards: those with
fewer tokens run fillers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcopd_fast.dist import World
from tcopd_fast.models import HfZero3, PackedCausalLM, load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.types import PackedTokens


def zero3_inference(dtype: str, host: bool) -> dict[str, Any]:
    """DeepSpeed's settings. host: the shards wait in host memory and pass through the device."""
    zero: dict[str, Any] = {
        "stage": 3,
        # Whole layers that may be there at once, in weights; more would only make the frozen model less frozen.
        "stage3_max_live_parameters": 50_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
    if host:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "steps_per_print": 1 << 30,
    }
    if dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        # RoPE frequencies rounded to bfloat16 shift logprobs more with every position.
        settings["data_types"] = {"keep_in_fp32_modules": ["inv_freq"]}
    return settings


class ShardedLM:
    """`forward(groups, temperature)` for all ranks together; each passes its own groups of packed tokens."""

    def __init__(self, path: str, world: World, *, dtype: str, host: bool, **options: Any) -> None:
        """options: of `load_causal_lm`."""
        import deepspeed

        self.world = world
        settings = zero3_inference(dtype, host)
        with HfZero3(settings):
            lm = load_causal_lm(path, dtype=dtype, **options)
        lm.eval().requires_grad_(False)
        self.engine = deepspeed.initialize(model=lm, config=settings)[0]
        self.engine.eval()

    def __call__(self, groups: Sequence[PackedTokens], temperature: float) -> list[Tensor]:
        """Logprobs, float32 [N] per group. A collective."""
        most = int(self.world.max({"groups": float(len(groups))})["groups"])
        filler = pack([[0]], [[0]]).to(self.world.device)
        out = [
            self.engine(PackedCausalLM.logprobs, tokens, temperature=temperature).logprob
            for tokens in [*groups, *[filler] * (most - len(groups))]
        ]
        return out[: len(groups)]
