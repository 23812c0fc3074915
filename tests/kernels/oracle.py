"""float64 truth, torch's own same-dtype result, and an allocation probe, for the kernel tests."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def rounding(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may cost, relative to the largest true value.

    A stored half-precision result: one unit in the last place. An fp32 one is dominated by the rounding of the
    log normaliser, about 10 here, which all probabilities of a row share.
    """
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return (16 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * largest


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert value.shape == truth.shape
    assert torch.isfinite(value).all()
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_no_worse_than_torch(value: torch.Tensor, torch_value: torch.Tensor, truth: torch.Tensor, label: str) -> None:
    """Error at most twice that of torch in the same dtype, or the rounding of the result."""
    error, allowed = max_error(value, truth), 2 * max_error(torch_value, truth)
    allowed = max(allowed, rounding(truth, value.dtype))
    assert error <= allowed, f"{label}: error {error:.3e} > {allowed:.3e}"


def plain_logprob(hidden, weight, targets, bias=None, temperature=1.0, softcap=None):
    """What a training script does: head in the model's dtype, logits to fp32 (or float64), log_softmax."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    logprob = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logprob, torch.logsumexp(z / temperature, -1), -(log_p.exp() * log_p).sum(-1)


def leaves(tensors, dtype):
    """Fresh leaves of `dtype` that need gradients; None stays None."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def make_problem(n, vocab, dim, seed=0, scale=1.0):
    """hidden [n, dim], weight [vocab, dim], bias [vocab], targets [n] with sharp and flat rows mixed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator) * torch.linspace(0.2, 2.0, n).unsqueeze(1) * scale
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    bias = torch.randn(vocab, generator=generator) * 0.1
    targets = torch.randint(0, vocab, (n,), generator=generator)
    return hidden, weight, bias, targets


class Allocations(TorchDispatchMode):
    """Records the number of elements of every newly allocated tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return out
