"""Activations of a model's own code, counted on tensors that have sizes but no storage.

The packed forward and its backward run under torch's FakeTensorMode while every tensor that an operation makes is
counted until it is freed. So what is counted is what autograd keeps and what the operations need on the way, with and
without gradient checkpointing, for whatever transformers builds from a config.json.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM

from tcopd_fast.adapter import ADAPTER, add_adapter
from tcopd_fast.config_sections import LoraConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import DTYPES
from tcopd_fast.plan.head import HeadBytes, loss_head
from tcopd_fast.plan.shapes import Shape

ONE_LENGTH_SDPA = "one_length_sdpa"


@dataclass(frozen=True)
class LearnBytes:
    """Of one micro-batch, beside weights and what DeepSpeed holds.

    saved: kept from the forward for the backward. trunk: peak of the forward up to the head's input. forward, backward:
    peaks; the gradients of the head and of the layer under way are in, gradients of finished parameters are not unless
    they were asked for.
    """

    saved: int
    trunk: int
    forward: int
    backward: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, each until its storage is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {_key(tensor): 0 for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def hold(self, nbytes: int) -> None:
        """Count bytes that no tensor here stands for."""
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _add(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        storage = tensor.untyped_storage()
        self._known[key] = storage.nbytes()
        self.hold(storage.nbytes())
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@cache
def learn_bytes(
    shape: Shape,
    dtype: str,
    tokens: int,
    predicted: int,
    *,
    checkpointing: bool,
    head: HeadBytes,
    kept_per_gradient: int,
    lora: str | None = None,
) -> LearnBytes:
    """Forward, loss and backward over one packed row of `tokens`, of which `predicted` take part in the loss.

    kept_per_gradient: bytes that stay for every element of a finished parameter's gradient. lora: the section
    model.lora as JSON; then only the adapter has gradients. Raises UserError when that takes peft and it is missing.
    """
    adapted = None if lora is None else _adapted(shape, LoraConfig.model_validate_json(lora))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(shape, dtype)
        if adapted is not None:
            _graft(model, adapted, DTYPES[dtype])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        with LiveBytes(model) as counter:
            for parameter in [p for p in model.parameters() if p.requires_grad]:
                parameter.register_post_accumulate_grad_hook(_finished(counter, kept_per_gradient))
            hidden_ND = _hidden(model, tokens).index_select(0, torch.arange(predicted))
            trunk = counter.peak
            loss = loss_head(hidden_ND, model.get_output_embeddings().weight, head)
            saved, forward = counter.live, counter.peak
            counter.peak = counter.live
            del hidden_ND
            loss.backward()
            return LearnBytes(saved, trunk, forward, counter.peak)


@cache
def forward_bytes(shape: Shape, dtype: str, tokens: int, predicted: int) -> int:
    """Peak of a forward without gradients, up to the hidden states that the head reads."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(shape, dtype).eval()
        with LiveBytes(model) as counter:
            _hidden(model, tokens).index_select(0, torch.arange(predicted))
            return counter.peak


def _adapted(shape: Shape, lora: LoraConfig) -> Any:
    """The model with peft's layers, without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config)
        try:
            add_adapter(model, lora, seed=0)
        except ImportError as error:
            raise UserError("model.lora: planning it needs the package peft, which is not installed") from error
    return model


def _graft(model: Any, adapted: Any, dtype: torch.dtype) -> None:
    """Freeze `model` and give it the LoRA layers of `adapted`: peft cannot make them of tensors without storage."""
    model.requires_grad_(False)
    layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        layer.base_layer = model.get_submodule(name)
        for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            factor.weight = nn.Parameter(torch.empty(factor.weight.shape, dtype=dtype))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)


def _finished(counter: LiveBytes, kept: int) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        # DeepSpeed takes the gradient as soon as it is complete; what it makes of it is `kept`.
        parameter.grad = None
        counter.hold(kept * parameter.numel())

    return hook


def _model(shape: Shape, dtype: str) -> Any:
    return AutoModelForCausalLM.from_config(shape.config, dtype=DTYPES[dtype], attn_implementation=ONE_LENGTH_SDPA)


def _hidden(model: Any, tokens: int) -> Tensor:
    """Final hidden states [T, D] of one packed row that holds one sequence."""
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    return model.get_decoder()(
        input_ids=torch.zeros(1, tokens, dtype=torch.int64),
        position_ids=torch.arange(tokens)[None],
        use_cache=False,
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=tokens,
        max_length_k=tokens,
    ).last_hidden_state[0]


def one_length_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """`tcopd_fast.packing.packed_sdpa` for a row whose sequences are equally long: the same operations, but none whose
    result's size depends on data, which tensors without storage cannot have."""
    tokens = query.shape[2]
    rows = torch.arange(tokens, device=query.device)

    def unpack(x: Tensor) -> Tensor:
        return x[0].index_select(1, rows).unflatten(1, (1, tokens)).transpose(0, 1)

    groups = query.shape[1] // key.shape[1]
    key_B, value_B = unpack(key), unpack(value)
    if groups > 1:
        key_B = key_B.repeat_interleave(groups, dim=1)
        value_B = value_B.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(
        unpack(query), key_B, value_B, dropout_p=dropout, scale=scaling, is_causal=True
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, rows).unsqueeze(0), None


AttentionInterface.register(ONE_LENGTH_SDPA, one_length_sdpa)
