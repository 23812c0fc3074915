"""What a model's config.json says about its size: no weight is read, none is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tcopd_fast.adapter import factor_sizes
from tcopd_fast.config_sections import LoraConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config, text_config


@dataclass(frozen=True)
class Shape:
    """Numbers of weights and widths of one causal language model. Tied weights count once.

    config: transformers' configuration object, text: the same as JSON. tensors: elements of every parameter, in the
    model's order. adapter: elements of every LoRA factor that a student trains beside them, if it does. layer: the
    largest decoder layer. head, embedding: V·D each, one tensor when tied.
    """

    config: Any = field(compare=False)
    text: str
    tensors: tuple[int, ...]
    layers: int
    layer: int
    head: int
    embedding: int
    tied: bool
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    adapter: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        """Weights that a student of this shape trains: its adapter's, or without one all."""
        return sum(self.adapter) or self.weights

    @property
    def weights(self) -> int:
        """Parameters of the model, without an adapter."""
        return sum(self.tensors)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.tensors)

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all but embedding and head."""
        return self.weights - self.head - (0 if self.tied else self.embedding)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def read_shape(path: str, trust_remote_code: bool = False) -> Shape:
    """The shape of a folder, hub id or miniature:NAME. Raises UserError when its config.json cannot be read."""
    return shape_of(load_model_config(path, trust_remote_code))


def student_shape(shape: Shape, lora: LoraConfig | None) -> Shape:
    """`shape` with the adapter that `model.lora` asks for. Raises UserError for targets that it has not."""
    if lora is None:
        return shape
    with torch.device("meta"):
        return replace(shape, adapter=factor_sizes(AutoModelForCausalLM.from_config(shape.config), lora))


def shape_of(config: Any) -> Shape:
    """The shape of a transformers configuration, from the model it describes, built without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = text_config(config)
    decoder, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or type(head) is not nn.Linear:
        raise UserError(
            f"{type(model).__name__}: no plain list of decoder layers and linear head; a plan knows only such models"
        )
    heads = text.num_attention_heads
    return Shape(
        config=config,
        text=config.to_json_string(),
        tensors=tuple(p.numel() for p in model.parameters()),
        layers=len(layers),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        head=head.weight.numel(),
        embedding=embedding.weight.numel(),
        tied=head.weight is embedding.weight,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )
