"""The faults of test_peers_bugs.py, in the Triton kernels under Triton's interpreter.

test_triton_interpreter.py runs this file in a process where Triton is interpreted; elsewhere it is skipped.
"""

from __future__ import annotations

import pytest
import torch
from tcopd_kernels import linear_logprob, linear_tcopd_loss, reference
from test_triton_interpreter import INTERPRETED, make_inputs, plain_torch, run_float64, run_triton

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_triton_interpreter.py"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("vocab", [1, 31, 33, 131])
def test_unmasked_vocabulary_tail(monkeypatch, vocab, descriptors):
    from tcopd_kernels import _triton_forward

    monkeypatch.setattr(_triton_forward, "tma_usable", lambda *matrices: descriptors)
    hidden, weight, targets, _ = make_inputs(9, vocab, 8)
    bias = torch.full((vocab,), -123.0)
    found = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend="triton")
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets, bias=bias.double(), entropy=True)
    for value, true in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-4)


def test_running_maximum_must_not_start_at_zero():
    weight = -1e3 - torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    out = linear_logprob(torch.ones(3, 1), weight, torch.tensor([0, 100, 199]), backend="triton")
    exact = torch.logsumexp(weight.double(), 0).expand(3)
    torch.testing.assert_close(out.lse.double(), exact, rtol=1e-6, atol=1e-3)
    assert torch.isfinite(out.logprob).all()


def test_every_row_uses_its_own_upstream_gradient():
    inputs = make_inputs(19, 70, 8)
    upstream = {"logprob": torch.linspace(-3, 3, 19)}
    found, exact = run_triton(*inputs, upstream), run_float64(*inputs, upstream)
    for name in ("grad_hidden", "grad_weight"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-5)


def test_half_precision_logits_would_shift_a_summed_logprob():
    hidden, weight, targets, _ = make_inputs(160, 100, 16, torch.float16, scale=3.0)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets).logprob.sum()
    with torch.no_grad():
        drift = (linear_logprob(hidden, weight, targets, backend="triton").logprob.double().sum() - exact).abs()
    rounded = plain_torch(hidden, weight, targets, bias=None).logprob.double().sum()
    assert (rounded - exact).abs() > 5e-3, "the problem does not show the fault"
    assert drift < 5e-4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-4])
def test_second_backward_gives_the_same_gradients(fused, grad_tol):
    hidden, weight, targets, _ = make_inputs(11, 130, 8, scale=4.0)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    options = {"grad_tol": grad_tol, "backend": "triton"}
    if fused:
        advantage, weights = torch.randn(11), torch.full((11,), 1 / 11)
        loss = linear_tcopd_loss(*inputs, targets, advantage=advantage, weights=weights, **options)[0]
    else:
        loss = linear_logprob(*inputs, targets, **options).logprob.sum()
    first = torch.autograd.grad(8.0 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(8.0 * loss, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, 8.0 * b)
        assert torch.equal(a, c)


def test_partitioned_head_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \[0\].*GatheredParameters"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(0), torch.tensor([0, 1, 2]), backend="triton")


@pytest.mark.parametrize("output", ["entropy", "lse"])
def test_entropy_and_normaliser_have_gradients(output):
    inputs = make_inputs(9, 70, 8, bias=True)
    upstream = {output: torch.ones(9)}
    found = run_triton(*inputs, upstream, entropy=True)
    for name, exact in run_float64(*inputs, upstream, entropy=True).items():
        if name.startswith("grad_"):
            assert exact.abs().max() > 1e-3
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-4, atol=1e-5)


def test_confident_tokens_keep_their_normaliser_gradient():
    weight = torch.tensor([[60.0], [0.0], [-5.0]])
    found = run_triton(torch.ones(2, 1), weight, torch.tensor([0, 0]), None, {"lse": torch.ones(2)})
    torch.testing.assert_close(found["grad_hidden"], torch.full((2, 1), 60.0))
