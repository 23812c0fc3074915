"""Tiny real checkpoints and prompts that every test can build in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = ("<pad>", "<eos>", "<unk>", *"0123456789", "+", "-", "=", "\\boxed{", "}", " ")


def make_tokenizer(eos: str = "<eos>", characters: tuple[str, ...] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, `\\boxed{` included, with a chat template that ends in '='."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


def make_model(
    seed: int, vocab_rows: int = 24, tied: bool = True, scale: float = 0.15, sliding_window: int | None = None
) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with grouped-query attention; `scale` sets how peaked its distribution is."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        use_sliding_window=sliding_window is not None,
        sliding_window=sliding_window,
        max_window_layers=0,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * scale)
    return model


@dataclass(frozen=True)
class Tiny:
    """Folders of a student, two teachers and a padded teacher, and a prompt file."""

    root: Path
    student: Path
    expert: Path
    anti: Path
    padded: Path
    prompts: Path

    def tree(self, run_dir: Path, **sections) -> dict:
        """A configuration tree of a very small run; sections are merged one level deep."""
        tree = {
            "run_dir": str(run_dir),
            "steps": 2,
            "seed": 3,
            "model": {"path": str(self.student), "dtype": "float32"},
            "teachers": {"expert": {"path": str(self.expert)}, "anti": {"path": str(self.anti)}},
            "data": {"train": [{"path": str(self.prompts)}], "max_prompt_tokens": 32},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 12},
            "objective": {"lambdas": {"expert": 1.5, "anti": -0.5}},
            "learner": {"lr": 1e-3, "max_tokens_per_microbatch": 64},
            "logging": {"tensorboard": False},
        }
        for name, value in sections.items():
            tree[name] = (
                {**tree[name], **value} if isinstance(value, dict) and isinstance(tree.get(name), dict) else value
            )
        return tree
