"""verl's fused language-model head, computed with these kernels."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import verl
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_rank
from transformers import PreTrainedModel
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as triton_head

from ..linear_logprob import linear_logprob
from .transformers import LOGIT_SCALES, cast_as_linear, check_whole, saved_copy

FIRST_VERSION, END_VERSION = "0.8", "0.10"  # FIRST_VERSION <= verl < END_VERSION
HEAD_PARAMETERS = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
FUNCTION_PARAMETERS = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
FAMILIES = ("dense_common", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v")
FORWARDS = ("forward_with_torch_backend", "forward_with_triton_backend")

_switched: list[tuple[Any, Any]] = []  # (verl's function, what stands in for it)


def patch_verl(*, backend: str = "auto", grad_tol: float = 0.0) -> None:
    """Make verl's fused language-model head compute logprob and entropy with linear_logprob.

    All implementations that `model.fused_kernel_options.impl_backend` can name are replaced ("torch", "liger",
    "triton", and the latter's vocabulary-parallel use in Megatron), for models built before and after the call.
    It takes effect where verl uses a fused head, `model.use_fused_kernels=True`; without that verl makes logits.
    Call it in every worker process, for example from a module named in VERL_USE_EXTERNAL_MODULES.

    Shapes and dtypes stay verl's: logprob in fp32; entropy in the dtype of the hidden states, for "triton" in
    fp32. With a process group, rank r owns rows [r·V, (r+1)·V) of the head, and what a rank returns as gradient of
    the hidden states is its part of a sum, as with verl's kernel: Megatron's sequence-parallel region adds them.

    Calling it again only changes the options; unpatch_verl undoes it.

    Args:
        backend, grad_tol: as in linear_logprob.

    Raises:
        RuntimeError: this version of verl is unknown, or its functions take other arguments.
        TypeError, ValueError: later, from a forward whose head is sharded or more than a product with its weight
            (an adapter, a bias, scaled or soft-capped logits); verl's own fused forwards leave that out.
    """
    unpatch_verl()
    _check_version()
    options = {"backend": backend, "grad_tol": grad_tol}
    _switch(torch_functional.FusedLinearForPPO.forward, _make_head_forward(options))
    _switch(triton_head.linear_cross_entropy, _make_linear_cross_entropy(options))
    for family in FAMILIES:
        module = importlib.import_module(f"verl.models.transformers.{family}")
        for name in FORWARDS:
            _switch(getattr(module, name), _with_checked_head(getattr(module, name)))


def unpatch_verl() -> None:
    """Undo patch_verl; does nothing when verl is not patched."""
    while _switched:
        original, replacement = _switched.pop()
        _rebind(replacement, original)


def _make_head_forward(options: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(logprob, entropy), both of the shape of input_ids [B, T] or [N]; hidden_states has one dimension more."""
        logprob, entropy = _logprobs(hidden_states, vocab_weights, input_ids, temperature, options)
        return logprob.view(input_ids.shape), entropy.to(hidden_states.dtype).view(input_ids.shape)

    return forward


def _make_linear_cross_entropy(options: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    reductions: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logprob [N] or its sum or mean, entropy [N]) of hidden [..., D] and N labels, flattened as in verl."""
        if reduction.lower() not in reductions:
            raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {reduction!r}")
        logprob, entropy = _logprobs(hidden, weight, labels, temperature, options, dist_process_group)
        return reductions[reduction.lower()](logprob), entropy

    return linear_cross_entropy


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    options: dict[str, Any],
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of hidden [..., D] and its labels [...], flattened to N tokens."""
    if labels.numel() != hidden.shape[:-1].numel():
        raise ValueError(f"{list(labels.shape)} labels do not fit hidden states of shape {list(hidden.shape)}")
    check_whole(weight)
    hidden, weight, _ = cast_as_linear(hidden.flatten(0, -2), weight, None)
    shard: dict[str, Any] = {}
    if group is not None:
        start = get_rank(group) * weight.shape[0]
        shard = {"vocab_start": start, "process_group": group, "reduce_grad_hidden": False}
    targets = labels.flatten()
    tokens = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, **options, **shard)
    assert tokens.entropy is not None  # it was asked for
    return tokens.logprob, tokens.entropy


def _with_checked_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        _check_head(self)
        return forward(self, *args, **kwargs)

    return checked


def _check_head(model: PreTrainedModel) -> None:
    """Refuse a head of which verl's forwards, which read `lm_head.weight`, would skip a part."""
    head, config = saved_copy(model.lm_head), model.config.get_text_config()
    extra = [
        f"config.{key}={value}"
        for key in ("final_logit_softcapping", *LOGIT_SCALES)
        if (value := getattr(config, key, None)) not in (None, 1.0)
    ]
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"lm_head of {type(model).__name__} is {type(head).__module__}.{type(head).__name__}; verl's fused "
            "forward would skip it and use its weight alone. Leave the head out of the adapter's target_modules, or "
            "set use_fused_kernels=False"
        )
    if head.bias is not None:
        extra.append("the bias of lm_head")
    if extra:
        raise ValueError(
            f"verl's fused forward of {type(model).__name__} would leave out {', '.join(extra)}; "
            "set use_fused_kernels=False"
        )


def _switch(original: Any, replacement: Any) -> None:
    _rebind(original, replacement)
    _switched.append((original, replacement))


def _rebind(old: Any, new: Any) -> None:
    """Put `new` wherever verl keeps `old`: in its modules, in its head and in the models whose forward it replaced."""
    for owner in _owners():
        for name, value in list(vars(owner).items()):
            if value is old:
                setattr(owner, name, new)


def _owners() -> Iterator[type | ModuleType]:
    yield torch_functional.FusedLinearForPPO
    yield from [module for name, module in sys.modules.items() if name.partition(".")[0] == "verl"]
    pending = [PreTrainedModel]
    while pending:
        yield (model := pending.pop())
        pending += model.__subclasses__()


def _check_version() -> None:
    """Refuse a verl in which the replacements would not be called, or called with other arguments."""
    found = None
    function = triton_head.LinearCrossEntropy.forward
    if not Version(FIRST_VERSION) <= Version(verl.__version__) < Version(END_VERSION):
        found = "an unknown version"
    elif (names := tuple(inspect.signature(torch_functional.FusedLinearForPPO.forward).parameters)) != HEAD_PARAMETERS:
        found = f"FusedLinearForPPO.forward takes {names}, expected {HEAD_PARAMETERS}"
    elif (names := tuple(inspect.signature(function).parameters)) != FUNCTION_PARAMETERS:
        found = f"LinearCrossEntropy.forward takes {names}, expected {FUNCTION_PARAMETERS}"
    if found is not None:
        raise RuntimeError(
            f"patch_verl does not support verl {verl.__version__}: {found}; "
            f"it was written for {FIRST_VERSION} <= verl < {END_VERSION}"
        )
