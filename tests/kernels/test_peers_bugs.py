"""Faults found in comparable kernels, one test each."""

from __future__ import annotations

import pytest
import torch
from oracle import leaves, make_problem, plain_logprob
from tcopd_kernels import linear_logprob, linear_tcopd_loss

BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 127, 129, 1003])
def test_unmasked_vocabulary_tail(small_tiles, backend, vocab):
    """Zero-filled columns past the vocabulary would dominate the normaliser when true logits are low."""
    hidden, weight, _, targets = make_problem(9, vocab, 8)
    bias = torch.full((vocab,), -123.0)
    out = linear_logprob(hidden, weight, targets, bias=bias, entropy=True, backend=backend)
    truth = plain_logprob(hidden.double(), weight.double(), targets, bias.double())
    for value, true in zip(out, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_maximum_must_not_start_at_zero(small_tiles, backend):
    """With all logits under −1e3 every exponential relative to 0 underflows."""
    weight = -1e3 - torch.rand(700, 1, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(3, 1)
    out = linear_logprob(hidden, weight, torch.tensor([0, 350, 699]), backend=backend)
    torch.testing.assert_close(out.lse.double(), torch.logsumexp(weight.double(), 0).expand(3), rtol=1e-6, atol=1e-3)
    assert torch.isfinite(out.logprob).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_uses_its_own_upstream_gradient(small_tiles, backend):
    hidden, weight, _, targets = make_problem(13, 301, 8)
    inputs = leaves((hidden, weight), torch.float64)
    out = linear_logprob(*inputs, targets, backend=backend).logprob
    upstream = torch.linspace(-3, 3, 13, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, upstream)
    truth = torch.autograd.grad(plain_logprob(*inputs, targets)[0], inputs, upstream)
    for grad, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true)


def test_bf16_logits_would_shift_a_summed_logprob():
    """The log-probability of a 2,000-token sequence must not drift through rounding of the logits to bf16."""
    hidden, weight, _, targets = make_problem(2000, 400, 32, scale=3.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth = plain_logprob(hidden.double(), weight.double(), targets)[0].sum()
    drift = (linear_logprob(hidden, weight, targets, backend="torch").logprob.double().sum() - truth).abs()
    bf16_drift = (plain_logprob(hidden, weight, targets)[0].double().sum() - truth).abs()
    assert bf16_drift > 0.05, "the problem does not show the fault"
    assert drift < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [False, True])
def test_second_backward_gives_the_same_gradients(small_tiles, backend, fused):
    """Gradients kept from the forward must not be scaled in place."""
    hidden, weight, _, targets = make_problem(11, 301, 8)
    inputs = leaves((hidden, weight), torch.float32)
    if fused:
        advantage, weights = torch.randn(11), torch.full((11,), 1 / 11)
        loss, _, _ = linear_tcopd_loss(*inputs, targets, advantage=advantage, weights=weights, backend=backend)
    else:
        loss = linear_logprob(*inputs, targets, backend=backend).logprob.sum()
    first = torch.autograd.grad(7.0 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(7.0 * loss, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, 7.0 * b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("function", [linear_logprob, linear_tcopd_loss])
def test_partitioned_head_is_refused(function):
    """A ZeRO-3 parameter outside of its module has shape [0]."""
    extra = {"advantage": torch.zeros(3), "weights": torch.ones(3)} if function is linear_tcopd_loss else {}
    with pytest.raises(ValueError, match=r"weight has shape \[0\].*GatheredParameters"):
        function(torch.zeros(3, 4), torch.zeros(0), torch.tensor([0, 1, 2]), **extra)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["entropy", "lse"])
def test_entropy_and_normaliser_have_gradients(small_tiles, backend, output):
    hidden, weight, bias, targets = make_problem(9, 301, 8)
    inputs = leaves((hidden, weight, bias), torch.float64)
    out = linear_logprob(inputs[0], inputs[1], targets, bias=inputs[2], entropy=True, backend=backend)
    grads = torch.autograd.grad(getattr(out, output).sum(), inputs)
    _, lse, entropy = plain_logprob(*inputs[:2], targets, inputs[2])
    truth = torch.autograd.grad({"lse": lse, "entropy": entropy}[output].sum(), inputs)
    for grad, true in zip(grads, truth, strict=True):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, true)


def test_confident_tokens_keep_their_normaliser_gradient():
    """Where p(target) rounds to 1 the logprob gradient vanishes, but that of lse does not."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[60.0], [0.0], [-5.0]])
    out = linear_logprob(hidden, weight, torch.tensor([0, 0]), backend="torch")
    (grad,) = torch.autograd.grad(out.lse.sum(), hidden)
    torch.testing.assert_close(grad, torch.full((2, 1), 60.0))
