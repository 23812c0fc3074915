"""The checkpoints of the mid-size benchmark: random weights in the shapes of Qwen3-0.6B and Qwen3-4B.

    python bench/midsize_models.py FOLDER SHAPE KIND TEACHERS        (started by midsize.py)

KIND base: the student's checkpoint FOLDER/base, the whole teachers FOLDER/full_1 … and LoRA adapters lora_1 … of all
layers. A whole teacher has a final norm of its own, in the first file of its checkpoint, and shares the file with all
other weights by a hard link. That takes the disk and the time of one checkpoint; who loads the teachers has each of
them whole in memory. KIND delta: lossless differences delta_1 … to teachers with 5 % of the base's weights one rounding
step away. The random numbers of the base are drawn on a GPU where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from teacher_memory_models import LORA_ALPHA, LORA_RANK, one_step_away
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from tcopd_fast.miniature.tokenizer import make_tokenizer
from tcopd_fast.models import DTYPES
from tcopd_fast.scoring import delta
from tcopd_fast.scoring.lora import linear_shapes

FINAL_NORM = "model.norm.weight"
# In order of their names: checkpoints are told apart by their first bytes, which must not be the shared ones.
OWN_FILE, SHARED_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INITIAL_STD = 0.02
ADAPTER_SETTINGS = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "bias": "none"}


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with a tied head, and how it is trained: sequences of a step, all weights or a LoRA adapter.

    deltas: whether making deltas of it takes seconds, not minutes.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str
    sequences: int
    lora: bool
    deltas: bool


SHAPES = {
    "qwen3_0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, "bfloat16", sequences=2, lora=False, deltas=True),
    "qwen3_4b": Shape(2560, 9728, 36, 32, 8, 128, 151936, "bfloat16", sequences=1, lora=True, deltas=False),
    "tiny": Shape(64, 128, 2, 4, 2, 32, 1000, "bfloat16", sequences=2, lora=False, deltas=True),
    "tiny_adapter": Shape(64, 128, 2, 4, 2, 32, 1000, "bfloat16", sequences=1, lora=True, deltas=False),
}
TINY = ("tiny", "tiny_adapter")


def model_config(shape: Shape) -> Qwen3Config:
    """transformers' configuration; beside the shape everything is Qwen3's."""
    return Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        dtype=shape.dtype,
    )


def write(folder: Path, shape: Shape, kind: str, teachers: int) -> None:
    """Write what a KIND of the module's docstring names, unless it is there; `base` comes first."""
    record = folder / f"{kind}.json"
    if record.is_file() and json.loads(record.read_text()) == teachers:
        return
    if kind == "base":
        shutil.rmtree(folder, ignore_errors=True)
        write_whole(folder, shape, teachers)
        for number in range(1, teachers + 1):
            write_adapter(folder / f"lora_{number}", shape, number)
    else:
        write_deltas(folder, teachers)
    record.write_text(json.dumps(teachers))


def write_whole(folder: Path, shape: Shape, teachers: int) -> None:
    """The base and the teachers that share its file."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[shape.dtype]
    torch.manual_seed(0)
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(model_config(shape)).named_parameters()}
    # Qwen3's initialisation: matrices normal, norms one.
    weights = {
        name: torch.ones(size, dtype=dtype)
        if len(size) == 1
        else torch.randn(size, device=device, dtype=dtype).mul_(INITIAL_STD).cpu()
        for name, size in sizes.items()
    }
    own = weights.pop(FINAL_NORM)
    write_folder(folder / "base", shape, own, weights)
    save_file(weights, folder / "base" / SHARED_FILE, metadata={"format": "pt"})
    for number in range(1, teachers + 1):
        target = folder / f"full_{number}"
        write_folder(target, shape, own + 0.05 * torch.randn(own.shape, dtype=dtype), weights)
        (target / SHARED_FILE).hardlink_to(folder / "base" / SHARED_FILE)


def write_folder(target: Path, shape: Shape, final_norm: Tensor, others: Mapping[str, Tensor]) -> None:
    """A checkpoint folder but for the shared file."""
    write_config(target, shape)
    make_tokenizer().save_pretrained(target)
    save_file({FINAL_NORM: final_norm}, target / OWN_FILE, metadata={"format": "pt"})
    files = {FINAL_NORM: OWN_FILE, **dict.fromkeys(others, SHARED_FILE)}
    size = sum(t.nbytes for t in (final_norm, *others.values()))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(target: Path, shape: Shape) -> None:
    """A new folder with the config.json of a checkpoint."""
    target.mkdir(parents=True)
    model_config(shape).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))


def adapter_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name of a factor -> its shape, of a LoRA adapter of every layer's matrices."""
    with torch.device("meta"):
        matrices = linear_shapes(AutoModelForCausalLM.from_config(model_config(shape)))
    sizes = {}
    for name, (rows, columns) in matrices.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        sizes[f"{key}.lora_A.weight"] = (LORA_RANK, columns)
        sizes[f"{key}.lora_B.weight"] = (rows, LORA_RANK)
    return sizes


def write_adapter(target: Path, shape: Shape, seed: int) -> None:
    """A LoRA adapter whose A and B are random."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.randn(size, generator=generator) * INITIAL_STD).to(DTYPES[shape.dtype])
        for name, size in adapter_sizes(shape).items()
    }
    target.mkdir(exist_ok=True)
    save_file(factors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(ADAPTER_SETTINGS))


def describe(folder: Path, shape: Shape, teachers: int) -> None:
    """What a plan reads of the checkpoints that `write` makes: config.json, and of adapters and deltas the header."""
    write_config(folder / "base", shape)
    factors = adapter_sizes(shape)
    for number in range(1, teachers + 1):
        write_config(folder / f"full_{number}", shape)
        write_config(folder / f"delta_{number}", shape)
        write_hollow(folder / f"delta_{number}" / delta.DELTA_FILE, {}, number)
        adapter = folder / f"lora_{number}"
        adapter.mkdir()
        write_hollow(adapter / "adapter_model.safetensors", factors, number)
        (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_SETTINGS))


def write_hollow(file: Path, sizes: Mapping[str, Sequence[int]], number: int) -> None:
    """A safetensors file of bfloat16 zeros that takes no room: a header and a hole. Its number tells it from others."""
    header: dict[str, Any] = {"__metadata__": {"number": str(number)}}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": [*size], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def write_deltas(folder: Path, teachers: int) -> None:
    """One process per delta: what takes the time is drawing random numbers and hashing."""
    jobs = min(teachers, os.cpu_count() or 1)
    if jobs == 1:
        for number in range(1, teachers + 1):
            write_delta(folder, torch.get_num_threads(), number)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(write_delta, folder, threads), range(1, teachers + 1)))


def write_delta(folder: Path, threads: int, number: int) -> None:
    """A whole teacher with changed weights, the difference to it, and the teacher away."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(number)
    base, whole = folder / "base", folder / f"changed_{number}"
    shutil.copytree(base, whole, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (OWN_FILE, SHARED_FILE):
        weights = {name: one_step_away(t, generator) for name, t in load_file(base / file).items()}
        save_file(weights, whole / file, metadata={"format": "pt"})
    shutil.rmtree(folder / f"delta_{number}", ignore_errors=True)
    delta.make(str(base), str(whole), folder / f"delta_{number}")
    shutil.rmtree(whole)


def main() -> int:
    folder, shape, kind, teachers = sys.argv[1:]
    write(Path(folder), SHAPES[shape], kind, int(teachers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
