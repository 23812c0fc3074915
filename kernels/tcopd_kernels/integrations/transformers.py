"""Causal language models of transformers that return logprobs and entropy in place of logits."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..linear_logprob import linear_logprob

IGNORE_INDEX = -100
# Where configs keep a factor of the logits; some models multiply by it, others divide.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass
class LogprobCausalLMOutput(ModelOutput):
    """What a switched model returns when it is called with labels. B sequences, T tokens.

    loss: 0-dim, −Σ logprob / num_items_in_batch, or the mean over the labels that are not −100.
    logprobs, lse, entropy: as in TokenLogprobs, [B, T−1] for `labels` and [B, T] for `shift_labels`;
        0 where the label is −100.
    past_key_values, hidden_states, attentions: those of the decoder, when they were asked for.
    """

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LogprobOptions(NamedTuple):
    logit_scale: float
    temperature: float
    entropy: bool
    vocab_size: int | None
    grad_tol: float
    backend: str


def with_logprobs(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    vocab_size: int | None = None,
    grad_tol: float = 0.0,
    backend: str = "auto",
) -> PreTrainedModel:
    """Switch `model` in place so that a call with labels returns logprobs and never computes logits.

    `model(input_ids, labels=labels)` scores label t+1 at position t, as transformers does. Under
    `shift_labels` [B, T] the labels are already aligned: give packed sequences as one row with the
    position_ids or cu_seq_lens of the model's attention, and −100 at the last token of each sequence.
    Gradients reach the head and the decoder through loss, logprobs, lse and entropy. Calls without labels,
    and so `generate`, are unchanged. A tied head, a bias, a factor of the logits that the config names,
    `final_logit_softcapping` and a head in PEFT's `modules_to_save` are honoured.

    One forward of two tokens checks that the model's logits are exactly softcap(scale·(hidden Wᵀ + b)).

    Args:
        model: a causal LM with loaded weights, before DDP or an accelerator wraps it. Of a PEFT model take
            `peft_model.get_base_model()`; adapters inside the decoder are fine, one on the head is refused.
        temperature, entropy, vocab_size, grad_tol, backend: as in linear_logprob.

    Returns:
        The same model; its calls with labels return LogprobCausalLMOutput.

    Raises:
        TypeError: model is not a PreTrainedModel, or its head is not a plain nn.Linear (LoRA, quantised).
        ValueError: an encoder-decoder, a forward that is already replaced, logits that are more than
            softcap(scale·linear), or a head that is sharded or not loaded. Calls raise it for the same heads, and
            for `logits_to_keep`, `return_dict=False` and router losses, which the switched forward lacks.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; "
            "unwrap it first (peft: model.get_base_model(), DDP: model.module)"
        )
    without_logprobs(model)
    if "forward" in vars(model):
        raise ValueError(
            f"{type(model).__name__}.forward is already replaced on this instance; "
            "call with_logprobs before other libraries patch the model"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; with_logprobs takes decoder-only models")
    options = LogprobOptions(_measured_scale(model), temperature, entropy, vocab_size, grad_tol, backend)
    original = type(model).forward
    names = list(inspect.signature(original).parameters)[1:]

    # transformers' generate checks its arguments against the signature of forward, which wraps() preserves.
    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("labels") is None and given.get("shift_labels") is None:
            return original(self, *args, **kwargs)
        return _forward_with_labels(self, options, **given)

    forward.logprob_options = options  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return model


def without_logprobs(model: PreTrainedModel) -> PreTrainedModel:
    """Undo with_logprobs; a model that was not switched is left alone. Returns the same model."""
    if hasattr(vars(model).get("forward"), "logprob_options"):
        del model.forward
    return model


def cast_as_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the dtype that nn.Linear would compute in: autocast's where it is on, else hidden's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def fold_scale(scale: float, temperature: float, softcap: float | None) -> tuple[float, float | None]:
    """(T', c') of linear_logprob for logits with a factor s > 0:  c·tanh(s·u/c)/T = c'·tanh(u/c')/T'."""
    return temperature / scale, None if softcap is None else softcap / scale


def check_whole(weight: Tensor) -> None:
    """Raise ValueError for a head that is not one plain tensor from here until its backward."""
    if isinstance(weight, DTensor):
        raise ValueError("the head's weight is a DTensor (FSDP2 or tensor parallel); only whole heads are supported")
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "the head's weight is a ZeRO-3 parameter, which may be partitioned again before the backward; "
            "use ZeRO stage 2 or lower"
        )
    if weight.is_meta:
        raise ValueError("the head's weight is on the meta device; load the weights first")


def _forward_with_labels(
    model: PreTrainedModel,
    options: LogprobOptions,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> LogprobCausalLMOutput:
    _check_inputs(model, inputs)
    head = _plain_head(model)
    inputs.setdefault("use_cache", False)
    outputs = model.base_model(**inputs)
    hidden_BTD = outputs[0]
    if shift_labels is None:
        assert labels is not None  # the switched forward takes this path only with one of the two
        hidden_BTD, shift_labels = hidden_BTD[:, :-1], labels[:, 1:]
    if shift_labels.shape != hidden_BTD.shape[:2]:
        raise ValueError(
            f"labels give {list(shift_labels.shape)} targets but the decoder returned {list(hidden_BTD.shape[:2])} "
            "predicting positions; pass one label for every input token"
        )
    targets_BT = shift_labels.to(head.weight.device)
    hidden_ND = hidden_BTD.to(head.weight.device).flatten(0, 1)
    hidden_ND, weight_VD, bias_V = cast_as_linear(hidden_ND, head.weight, head.bias)
    temperature, softcap = fold_scale(options.logit_scale, options.temperature, _softcap(model))
    tokens = linear_logprob(
        hidden_ND,
        weight_VD,
        targets_BT.flatten(),
        bias=bias_V,
        temperature=temperature,
        softcap=softcap,
        ignore_index=IGNORE_INDEX,
        entropy=options.entropy,
        grad_tol=options.grad_tol,
        backend=options.backend,
        vocab_size=options.vocab_size,
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets_BT != IGNORE_INDEX).sum().clamp(min=1)
    return LogprobCausalLMOutput(
        loss=-tokens.logprob.sum() / num_items_in_batch,
        logprobs=tokens.logprob.view(targets_BT.shape),
        lse=tokens.lse.view(targets_BT.shape),
        entropy=None if tokens.entropy is None else tokens.entropy.view(targets_BT.shape),
        past_key_values=getattr(outputs, "past_key_values", None),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _check_inputs(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    if inputs.get("logits_to_keep"):
        raise ValueError("logits_to_keep cannot be combined with labels; set the labels to −100 instead")
    inputs.pop("logits_to_keep", None)
    if inputs.pop("return_dict", None) is False:
        raise ValueError("return_dict=False is not supported after with_logprobs; read the output by name")
    asked = inputs.get("output_router_logits")
    if getattr(_text_config(model), "output_router_logits", False) if asked is None else asked:
        raise ValueError("output_router_logits adds a router loss that with_logprobs lacks; set it to False")


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    """The head, read at every call because adapters and wrappers may replace it after the switch."""
    head = saved_copy(model.get_output_embeddings())
    if type(head) is not nn.Linear or "forward" in vars(head):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        if type(head) is nn.Linear:
            kind += " with a replaced forward"
        raise TypeError(
            f"the output head of {type(model).__name__} is {kind}; only a plain torch.nn.Linear is supported "
            "(merge adapters first, or leave the head out of their target_modules)"
        )
    check_whole(head.weight)
    return head


def saved_copy(head: Any) -> Any:
    """The module that PEFT's `modules_to_save` computes with in place of `head`; any other head itself."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(head, peft.utils.ModulesToSaveWrapper):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


def _measured_scale(model: PreTrainedModel) -> float:
    """The factor s for which the model's logits are softcap(s·head(decoder output)), found by running it."""
    head = _plain_head(model)
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no decoder below its head (base_model is the model itself)")
    linear, logits = _probe(model, head)
    softcap = _softcap(model)
    named = [v for key in LOGIT_SCALES if isinstance(v := getattr(_text_config(model), key, None), float | int)]
    candidates = [1.0, *(scale for v in named if v > 0 and v != 1 for scale in (float(v), 1 / v))]

    def error(scale: float) -> float:
        """Largest difference of the two logits, relative to the largest logit."""
        expected = scale * linear
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        if expected.shape != logits.shape:
            return float("inf")
        return (
            (logits - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        ).item()

    best = min(candidates, key=error)
    # Soft-capped in half precision by the model and in fp32 here: a few units of 2⁻⁸.
    tolerance = 2**-5 if head.weight.dtype.itemsize == 2 else 1e-4
    if not error(best) <= tolerance or (len(candidates) > 1 and not linear.any()):
        raise ValueError(
            f"the logits of {type(model).__name__} are not softcap(scale·linear(decoder output)) for softcap={softcap} "
            f"and a scale among {candidates}, or the head is all zero; models that change their logits otherwise are "
            "not supported"
        )
    return best


@torch.no_grad()
def _probe(model: PreTrainedModel, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """fp32 output of the head alone and of the whole model for two tokens; the random state stays as it was."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    device = head.weight.device
    tokens = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return head(seen[0].to(device)).float(), logits.float()


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(_text_config(model), "final_logit_softcapping", None)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)
