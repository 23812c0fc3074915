"""Argument checks. Every message names the argument, the value it had and what to pass instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Asked once and here: torch.compile of torch 2.11 cannot look into the function.
AUTOCAST_KINDS = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia") if torch.amp.is_autocast_available(kind)
)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_float_tensor(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    return value


def check_plain_tensor(name: str, value: object) -> None:
    """Refuses what stands for a head's weight but does not hold it."""
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name} must be a torch.Tensor, got the module {type(value).__name__}; pass its weight. Of a head with an "
            "adapter (LoRA) pass the merged weight: nothing else of the module would be used"
        )
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor; under FSDP call this inside the forward of the wrapped module, where the parameter "
            "is whole, and for a head that is sharded over the vocabulary pass to_local() with vocab_start and "
            "process_group"
        )


def follow_autocast(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype of an active autocast region, as torch.nn.functional.linear would take them.

    Gradients return in the dtypes that the arguments had. float64 is left alone, as autocast does.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_plain_tensor(name, value)
        check_float_tensor(name, value)
    kind = hidden.device.type
    if kind not in AUTOCAST_KINDS or not torch.is_autocast_enabled(kind):
        return hidden, weight
    if torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab_size: int | None,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checks hidden [N,D], weight [V,D], bias [V]; returns the views of their first vocab_size rows."""
    hidden_name, weight_name, bias_name = names
    for name, tensor in zip(names, (hidden, weight, bias), strict=True):
        check_plain_tensor(name, tensor)
    check_float_tensor(hidden_name, hidden)
    check_float_tensor(weight_name, weight)
    if hidden.dim() != 2:
        raise ValueError(
            f"{hidden_name} must have shape [N, D], got {list(hidden.shape)}; flatten batch and time first"
        )
    if weight.numel() == 0 and weight.dim() == 1:
        raise ValueError(
            f"{weight_name} has shape [0]: it is a partitioned ZeRO-3 parameter; call this inside the forward "
            "of a module that owns it, or gather it with deepspeed.zero.GatheredParameters"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{weight_name} must have shape [V, D] with V > 0 and D={hidden.shape[1]} as in {hidden_name}, "
            f"got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{weight_name} is {weight.dtype} but {hidden_name} is {hidden.dtype}; cast one to the other's dtype"
        )
    check_device(weight_name, weight, hidden.device)
    if bias is not None:
        check_float_tensor(bias_name, bias)
        check_device(bias_name, bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name} must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    return limit_vocab(weight, bias, vocab_size, weight_name)


def limit_vocab(
    weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int | None, weight_name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if vocab_size is None:
        return weight, bias
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be in [1, {weight.shape[0]}], the rows of {weight_name}, got {vocab_size}")
    if vocab_size == weight.shape[0]:
        return weight, bias
    return weight[:vocab_size], None if bias is None else bias[:vocab_size]


def check_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} like the other tensors")


def check_targets(targets: torch.Tensor, n_rows: int, device: torch.device) -> None:
    """All that can be checked without reading the values."""
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != (n_rows,):
        raise ValueError(f"targets must have shape [{n_rows}] like the rows of hidden, got {list(targets.shape)}")
    check_device("targets", targets, device)


def target_facts(targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens count [N], and [3] int64: their number, lowest and highest id (0 counts as present)."""
    valid = targets != ignore_index
    known = torch.where(valid, targets, 0).long()
    known = known if len(known) else known.new_zeros(1)
    return valid, torch.stack([valid.sum(), known.min(), known.max()])


def counted_rows(targets: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor | None:
    """Row indices of the tokens that count, or None when all N do. Costs one device synchronisation."""
    if len(targets) == 0:
        return None
    valid, facts = target_facts(targets, ignore_index)
    count, low, high = facts.tolist()
    if low < 0 or high >= vocab:
        raise ValueError(
            f"targets holds {low if low < 0 else high}, expected a token id in [0, {vocab}) "
            f"or ignore_index={ignore_index}"
        )
    return None if count == len(targets) else valid.nonzero().squeeze(1)


def select_targets(
    targets: torch.Tensor, n_rows: int, vocab: int, ignore_index: int, device: torch.device
) -> torch.Tensor | None:
    """check_targets, then counted_rows."""
    check_targets(targets, n_rows, device)
    return counted_rows(targets, vocab, ignore_index)


def check_vector(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    tensor = check_float_tensor(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, device)
    return tensor


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    optional: bool = False,
    open_low: bool = True,
) -> None:
    """A real number in (low, high), or [low, high) when open_low is False; None passes when optional."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {value!r}")
    above = value > low if open_low else value >= low
    if not (above and value < high):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be in {bracket}{low}, {high}), got {value}")


def check_head_options(temperature: float, softcap: float | None, ignore_index: int, grad_tol: float) -> None:
    check_number("temperature", temperature, low=0.0)
    check_number("softcap", softcap, low=0.0, optional=True)
    check_number("grad_tol", grad_tol, low=0.0, open_low=False)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def check_policy_options(
    clip_low: float | None, clip_high: float | None, dual_clip: float | None, is_cap: float | None
) -> None:
    check_number("clip_low", clip_low, low=0.0, high=1.0, optional=True, open_low=False)
    check_number("clip_high", clip_high, low=0.0, optional=True, open_low=False)
    check_number("dual_clip", dual_clip, low=1.0, optional=True)
    check_number("is_cap", is_cap, low=0.0, optional=True)


def check_sequence(name: str, value: object, length: int | None = None) -> Sequence:
    if isinstance(value, torch.Tensor) or not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list or tuple, one entry per model, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} entries, one per model, got {len(value)}")
    return value
