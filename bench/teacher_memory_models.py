"""The checkpoints of the teachers' memory benchmark: a random Qwen3 base and teachers a few weights away from it.

Each teacher differs from the base in 5 % of its weights, by one rounding step, as after reinforcement learning in
bfloat16; so resident, offloaded and sharded teachers and their deltas are the same models. LoRA teachers are adapters
of rank 16 in peft's layout, and what the first one merges to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from tcopd_fast.miniature.tokenizer import make_tokenizer
from tcopd_fast.scoring import delta

CHANGED_SHARE = 0.05
LORA_RANK, LORA_ALPHA = 16, 32
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 with heads of 64 and a tied head, and of what it scores."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    sequences: int
    response_tokens: int


SHAPES = {
    "tiny": Shape(512, 64, 128, 2, sequences=4, response_tokens=8),
    "cpu": Shape(32000, 768, 2048, 12, sequences=8, response_tokens=64),
    "gpu": Shape(32000, 1024, 3072, 14, sequences=64, response_tokens=256),
}


def write_models(folder: Path, shape: Shape, kinds: Sequence[str], teachers: int, jobs: int) -> None:
    """Write base and full_1 … full_K, of `kinds` also delta_1 … and lora_1 … with merged_1, unless they are there."""
    about = {**asdict(shape), "teachers": teachers, "kinds": sorted(kinds)}
    record = folder / "models.json"
    if record.is_file() and json.loads(record.read_text()) == about:
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_base(folder / "base", shape)
    if jobs == 1:
        for seed in range(1, teachers + 1):
            _write_teacher(folder, kinds, seed)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(_write_teacher, folder, kinds, seed) for seed in range(1, teachers + 1)]:
                done.result()
    record.write_text(json.dumps(about))


def write_base(folder: Path, shape: Shape) -> None:
    """A random bfloat16 model with the miniature's tokenizer, which uses the first rows of its vocabulary."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 256),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_teacher(folder: Path, kinds: Sequence[str], seed: int) -> None:
    torch.set_num_threads(1)
    base = load_file(folder / "base" / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    _write_checkpoint(folder, f"full_{seed}", {name: one_step_away(t, generator) for name, t in base.items()})
    if "delta" in kinds:
        delta.make(str(folder / "base"), str(folder / f"full_{seed}"), folder / f"delta_{seed}")
    if "lora" in kinds:
        merged = write_adapter(base, folder / f"lora_{seed}", seed)
        if seed == 1:
            _write_checkpoint(folder, f"merged_{seed}", merged)


def one_step_away(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A copy with CHANGED_SHARE of the weights moved to a neighbouring number: their last mantissa bit is flipped."""
    chosen = torch.rand(tensor.shape, generator=generator) < CHANGED_SHARE
    bits = tensor.view(delta.BITS[tensor.element_size()])
    return (bits ^ chosen.to(bits.dtype)).view(tensor.dtype)


def write_adapter(base: Mapping[str, Tensor], folder: Path, seed: int) -> dict[str, Tensor]:
    """Write a LoRA adapter of every layer's matrices, A and B random, and return the base with it merged in."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    merged = dict(base)
    for name, weight in base.items():
        if ".layers." not in name or weight.dim() != 2:
            continue
        a = (torch.randn(LORA_RANK, weight.shape[1], generator=generator) * 0.02).to(weight.dtype)
        b = (torch.randn(weight.shape[0], LORA_RANK, generator=generator) * 0.02).to(weight.dtype)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        sum_in_float32 = torch.addmm(weight.float(), b.float(), a.float(), alpha=LORA_ALPHA / LORA_RANK)
        merged[name] = sum_in_float32.to(weight.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def _write_checkpoint(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    target = folder / name
    target.mkdir(exist_ok=True)
    save_file(dict(tensors), target / WEIGHTS, metadata={"format": "pt"})
    for file in delta.COMPANIONS:
        if (folder / "base" / file).is_file():
            (target / file).write_bytes((folder / "base" / file).read_bytes())


def file_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
