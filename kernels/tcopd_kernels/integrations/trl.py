"""TRL trainers that take their per-token logprobs and entropies from these kernels."""

from __future__ import annotations

import inspect
from types import CodeType, ModuleType
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils

from ..linear_logprob import linear_logprob
from .transformers import cast_as_linear, check_whole, fold_scale

NAME = "_ChunkedLogProbFunction"
FUNCTION_PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
METHOD_PARAMETERS = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy")
OURS = {"log_probs", "entropy"}


def patch_trl(*, backend: str = "auto", grad_tol: float = 0.0) -> None:
    """Make TRL's fused language-model head compute logprob and entropy with linear_logprob.

    TRL's trainers give their models a forward that passes hidden states and head to one autograd function.
    That function is replaced, so trainers built before and after the call are both switched: GRPO and RLOO
    whole, and of DPO and KTO the reference model. Calls that ask for statistics other than
    logprob and entropy (the policy of SFT, DPO and KTO) keep TRL's own function.

    Temperature, bias, soft-cap, logit scale, autocast and fp32 heads mean what they mean in TRL. Under autocast
    the head is cast once per call and its gradient passes through that dtype.

    Calling it again only changes the options; unpatch_trl undoes it.

    Args:
        backend, grad_tol: as in linear_logprob.

    Raises:
        RuntimeError: this version of TRL has no such function, or one with other arguments.
        ValueError: later, from a forward whose head is sharded (ZeRO-3) or whose logit scale is not positive.
    """
    original = _original(trl_utils)
    _check_version(original)
    setattr(trl_utils, NAME, KernelLogprobFunction(original, backend, grad_tol))


def unpatch_trl() -> None:
    """Undo patch_trl; does nothing when TRL is not patched."""
    current = getattr(trl_utils, NAME, None)
    if isinstance(current, KernelLogprobFunction):
        setattr(trl_utils, NAME, current.original)


class KernelLogprobFunction:
    """Stands in for TRL's autograd function: the same `apply`, other kernels."""

    def __init__(self, original: Any, backend: str, grad_tol: float) -> None:
        self.original, self.backend, self.grad_tol = original, backend, grad_tol

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """logprob [N], entropy [N] or None, and None for TRL's three other statistics.

        z = c·tanh(s·u/c)/T,   u = h Wᵀ + b,   s = logit_scale > 0, c = softcap, T = temperature
        """
        if not OURS.issuperset(outputs):
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        check_whole(weight)
        if not logit_scale > 0:
            raise ValueError(f"the model's logit scale must be positive, got {logit_scale}; call unpatch_trl()")
        hidden, weight, bias = cast_as_linear(hidden, weight, bias)
        temperature, softcap = fold_scale(logit_scale, temperature, final_logit_softcapping)
        tokens = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            entropy="entropy" in outputs,
            grad_tol=self.grad_tol,
            backend=self.backend,
        )
        return tokens.logprob, tokens.entropy, None, None, None


def _original(utils: ModuleType) -> Any:
    current = getattr(utils, NAME, None)
    return current.original if isinstance(current, KernelLogprobFunction) else current


def _check_version(function: Any) -> None:
    """Refuse a TRL in which replacing `function` would not reach GRPOTrainer, or would change its arguments."""
    method = getattr(grpo_trainer.GRPOTrainer, "_get_per_token_logps_and_entropies", None)
    found: str | None = None
    if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
        found = f"trl.trainer.utils.{NAME} is {function!r}, expected an autograd function"
    elif (parameters := tuple(inspect.signature(function.forward).parameters)) != FUNCTION_PARAMETERS:
        found = f"trl.trainer.utils.{NAME}.forward takes {parameters}, expected {FUNCTION_PARAMETERS}"
    elif not _mentions(getattr(trl_utils, "add_fused_lm_head", None), NAME):
        found = f"trl.trainer.utils.add_fused_lm_head does not call {NAME}"
    elif method is None:
        found = "GRPOTrainer has no _get_per_token_logps_and_entropies"
    elif (parameters := tuple(inspect.signature(method).parameters))[: len(METHOD_PARAMETERS)] != METHOD_PARAMETERS:
        found = f"GRPOTrainer._get_per_token_logps_and_entropies takes {parameters}, expected {METHOD_PARAMETERS}, …"
    elif not _mentions(method, "fused_lm_head"):
        found = "GRPOTrainer._get_per_token_logps_and_entropies does not ask its model for fused_lm_head"
    if found is not None:
        raise RuntimeError(f"patch_trl does not support trl {trl.__version__}: {found}; it was written for trl 1.16")


def _mentions(function: Any, name: str) -> bool:
    """Whether the code of a function, or of one defined inside it, reads `name` or passes it as a keyword."""
    if function is None:
        return False
    pending: list[CodeType] = [inspect.unwrap(function).__code__]
    while pending:
        code = pending.pop()
        if name in code.co_names or any(isinstance(c, tuple) and name in c for c in code.co_consts):
            return True
        pending += [c for c in code.co_consts if isinstance(c, CodeType)]
    return False
