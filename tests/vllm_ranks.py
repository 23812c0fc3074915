"""One rank with vLLM engines, as a program: `vllm_ranks.py RANK FOLDER` writes what it saw to FOLDER/seen-RANK.json.

vLLM belongs to one process group for good and takes long to start, so test_vllm.py judges what these record.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tcopd_fast.config_sections import RolloutConfig, VllmConfig
from tcopd_fast.miniature.tokenizer import make_tokenizer
from tcopd_fast.rollout.vllm_engine import VllmEngine
from tcopd_fast.types import Prompt, Rollout

RANKS = 2
MAX_MODEL_LEN, MAX_POSITIONS = 208, 256
SECOND_EOS = "}"
# Head rows past the tokenizer's ids, as in padded checkpoints; for the untied model the engine cuts them off.
PADDING = 10
UNTIED_VOCABULARY = len(make_tokenizer())
# The long ones fill a block of vLLM's prefix cache (128 tokens on a CPU), which a weight sync must drop.
LONG = "M:" + "47+38-" * 25 + "19="
PROBLEMS = {0: [LONG, "L:5=", "M:1+1="], 1: ["L:906-17=", LONG]}


def prompts_of(rank: int) -> list[Prompt]:
    tokenizer = make_tokenizer()
    return [
        Prompt(f"{rank}-{i}", "math", tuple(tokenizer(text)["input_ids"]), text, None, "problems.jsonl")
        for i, text in enumerate(PROBLEMS[rank])
    ]


def as_record(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs.tolist(),
        "dtype": str(rollout.logprobs.dtype),
        "finish_reason": rollout.finish_reason,
        "version": rollout.version,
        "text": rollout.text,
    }


def message_of(call: Any) -> list[str]:
    """[type, message] of the error that `call` raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def tied_scenario(engine: Any, rank: int, folder: Path, seen: dict[str, Any]) -> None:
    prompts = prompts_of(rank)

    def sample(samples: int = 8, new: int = 20, temperature: float = 1.0, seed: int = 7) -> list[Any]:
        rollouts = engine.generate(prompts, samples=samples, max_new_tokens=new, temperature=temperature, seed=seed)
        return [as_record(rollout) for rollout in rollouts]

    order: list[list[Any]] = []
    engine.generate(
        prompts,
        samples=8,
        max_new_tokens=20,
        temperature=1.0,
        seed=7,
        on_finished=lambda rollout: order.append([rollout.prompt.id, rollout.sample]),
    )
    seen["order"] = order
    seen["t1"], seen["repeat"], seen["other_seed"] = sample(), sample(), sample(seed=8)
    seen["t07"], seen["greedy"] = sample(temperature=0.7), sample(samples=2, temperature=0.0)
    if rank == 0:  # the other rank meanwhile does something else: generate must not be collective
        seen["first_token"] = sample(samples=2000, new=1)
        seen["too_long"] = message_of(lambda: sample(new=MAX_MODEL_LEN))
        seen["too_cold"] = message_of(lambda: sample(temperature=0.001))

    weights = load_file(folder / "perturbed.safetensors")
    engine.load_weights(iter(weights.items()), version=3)
    seen["synced"] = sample()
    head = ("lm_head.weight", weights["model.embed_tokens.weight"])
    engine.load_weights([*weights.items(), head], version=4)
    seen["synced_with_head"] = sample()
    some = [item for item in weights.items() if item[0] != "model.norm.weight"]
    seen["partial"] = message_of(lambda: engine.load_weights(some, version=5))
    unknown = [("model.nonsense", weights["model.norm.weight"])]
    seen["unknown"] = message_of(lambda: engine.load_weights(unknown, version=5))
    seen["version_after_errors"] = engine.version

    def interrupt(_: Rollout) -> None:
        raise KeyError("stop here")

    seen["interrupted"] = message_of(
        lambda: engine.generate(prompts, samples=8, max_new_tokens=20, temperature=1.0, seed=9, on_finished=interrupt)
    )
    seen["after_interrupt"] = sample()


def worker(rank: int, folder: Path) -> None:
    seen: dict[str, Any] = {}
    tokenizer = make_tokenizer()

    def build(
        name: str, max_model_len: int = MAX_MODEL_LEN, cache: int = 32 << 20, vocab_size: int | None = None
    ) -> VllmEngine:
        return VllmEngine(
            str(folder / name),
            tokenizer,
            config=RolloutConfig(vllm=VllmConfig(kv_cache_memory_bytes=cache, max_num_seqs=64)),
            dtype="float32",
            max_model_len=max_model_len,
            seed=rank,
            device=torch.device("cpu"),
            vocab_size=vocab_size,
        )

    seen["no_group"] = message_of(lambda: build("tied"))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    torch.manual_seed(99)
    random_state = torch.get_rng_state()
    environment = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}

    engine = build("tied")
    tied_scenario(engine, rank, folder, seen)
    seen["random_state_kept"] = torch.equal(random_state, torch.get_rng_state())
    seen["environment_kept"] = environment == {name: os.environ.get(name) for name in environment}
    engine.close()
    seen["too_wide"] = message_of(lambda: build("tied", max_model_len=1000))

    seen["too_little_cache"] = message_of(lambda: build("tied", cache=1 << 10))

    engine = build("untied", vocab_size=UNTIED_VOCABULARY)
    ask = partial(engine.generate, prompts_of(rank), samples=8, max_new_tokens=20, temperature=1.0, seed=7)
    seen["untied"] = [as_record(rollout) for rollout in ask()]
    engine.load_weights(load_file(folder / "untied_perturbed.safetensors").items(), version=1)
    seen["untied_synced"] = [as_record(rollout) for rollout in ask()]
    engine.close()

    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    seen["group_sum"] = int(total)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
