"""Calls into other packages. Each function imports its package when it is called, so that none is required."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from kernel_suite.inputs import Inputs

# (hidden [N, D], weight [V, D], targets [N]) -> [N], or a number
Logprob = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CPU_CHUNK_ROWS = 256


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def torch_lce(reduction: str) -> Logprob:
    """Its chunked path. On a CPU its own choice of the chunk is one or two rows here, so it is given CPU_CHUNK_ROWS."""

    def call(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        chunk = {} if hidden.is_cuda else {"batch_chunk_size": CPU_CHUNK_ROWS, "chunking_method": None}
        options = torch.nn.LinearCrossEntropyOptions(**chunk)
        return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)

    return call


def liger_logprob() -> Logprob:
    """Not the fused cross-entropy, whose backward takes one upstream gradient for all tokens."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
        return -(out[0] if isinstance(out, tuple) else out)

    return logprob


def liger_mean() -> Logprob:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets: liger_fused_linear_cross_entropy(hidden, weight, targets)


def liger_grpo_loss() -> Callable[[Inputs, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Every token is a sequence of its own, because its advantages are per sequence; delta is the dual clip."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        N = len(x.targets)
        grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", delta=3.0, chunk_size=N)
        ones = torch.ones(N, 1, device=hidden.device)
        tokens = x.targets.unsqueeze(1), ones, x.advantage
        return grpo(hidden.unsqueeze(1), weight, *tokens, old_per_token_logps=x.old_logprob.unsqueeze(1))[0]

    return loss


def liger_jsd_loss() -> Callable[[Inputs, torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """beta = 1 is the reverse KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        return jsd(hidden, weight, x.teacher_hiddens[0], x.teacher_weights[0], x.targets)

    return loss


def cce(impl: str, **options: Any) -> tuple[Logprob, Logprob]:
    """(logprob, mean). By default gradients below its own threshold are filtered; filter_eps=None keeps them."""
    from cut_cross_entropy import linear_cross_entropy

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl, **options)

    def mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, impl=impl, **options)

    return logprob, mean


def trl_logprob() -> Logprob:
    from trl.trainer import utils

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        args = hidden, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        return utils._ChunkedLogProbFunction.apply(*args)[0]

    return logprob


def trl_divergence_loss() -> Callable[[Inputs, torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """beta = 1 is the reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Inputs, hidden: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        teacher = x.teacher_hiddens[0], x.teacher_weights[0], None
        per_token, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, *teacher, 1.0)
        return (x.weights * per_token).sum()

    return loss


def verl_torch_logprob() -> Logprob:
    skip_init_of("verl", "verl.utils")
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return lambda hidden, weight, targets: FusedLinearForPPOFunction.apply(hidden, weight, targets, 1.0, 512)[0]


def verl_triton_logprob() -> Logprob:
    skip_init_of("verl", "verl.utils")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]


def quack_mean() -> Logprob:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets)


def skip_init_of(*names: str) -> None:
    """Lets submodules of the packages be imported without running the packages' own __init__, in this process.

    verl's imports Ray, tensordict and a trainer; its kernels need torch alone.
    """
    if names[0] in sys.modules:
        return
    spec = find_spec(names[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {names[0]!r}")
    root = spec.submodule_search_locations[0]
    for name in names:
        module = ModuleType(name)
        module.__path__ = ["/".join([root, *name.split(".")[1:]])]
        sys.modules[name] = module
