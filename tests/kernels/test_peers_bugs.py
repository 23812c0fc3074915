"""Faults found in comparable kernels, one test each.

An adapter on the head that is skipped in silence is the subject of tests in the three test_integration files.
"""

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_tokens_keep_their_normaliser_gradient(small_tiles, backend):
    """Where p(target) rounds to 1 the gradient of logprob vanishes, and a tile skipped for that loses that of lse."""
    hidden, weight, _, targets = make_problem(9, 301, 8)
    weight[targets] *= 40
    hidden = weight[targets].clone()
    inputs = leaves((hidden, weight), torch.float64)
    logprob, lse, _ = plain_logprob(*inputs, targets)
    truth = torch.autograd.grad((2.0 * lse).sum(), inputs)
    assert (logprob.float() == 0).all(), "the tokens are not confident"
    single = leaves((hidden, weight), torch.float32)
    out = linear_logprob(*single, targets, backend=backend)
    for grad, true in zip(torch.autograd.grad((out.logprob + 2.0 * out.lse).sum(), single), truth, strict=True):
        assert true.abs().max() > 1
        torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_confident_tokens_keep_their_small_gradients(small_tiles, backend):
    """A filter on |p − 1| or on small p, of 2⁻¹² say, would drop all of this gradient."""
    vocab = 1003
    weight = torch.eye(vocab, 8, dtype=torch.float64)
    weight[8:] = 0.01 * torch.randn(vocab - 8, 8, dtype=torch.float64)
    hidden = torch.zeros(5, 8, dtype=torch.float64)
    targets = torch.arange(5)
    hidden[targets, targets] = 15.5
    inputs = leaves((hidden, weight), torch.float64)
    logprob, _, _ = plain_logprob(*inputs, targets)
    assert (-logprob < 2.0**-12).all(), "the tokens are not confident"
    truth = torch.autograd.grad(logprob.sum(), inputs)
    single = leaves((hidden, weight), torch.float32)
    grads = torch.autograd.grad(linear_logprob(*single, targets, backend=backend).logprob.sum(), single)
    for grad, true in zip(grads, truth, strict=True):
        # 1 − p is about 2e-4, of which logits near 16 lose one part in 200 in fp32.
        assert (grad.double() - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_hidden_gradient_is_not_accumulated_in_bf16(small_tiles, half_operands, fused):
    """Adding up vocabulary tiles in bf16 loses several bits; the gradient may be rounded once, at its end."""
    hidden, weight, _, targets = make_problem(9, 4001, 16)
    hidden, weight = (t.bfloat16() for t in (hidden, weight))
    inputs = leaves((hidden, weight), torch.bfloat16)
    upstream = torch.linspace(-2, 2, 9)
    if fused:
        loss, _, _ = linear_tcopd_loss(*inputs, targets, advantage=-upstream, weights=torch.ones(9), backend="torch")
    else:
        loss = (upstream * linear_logprob(*inputs, targets, backend="torch").logprob).sum()
    grad = torch.autograd.grad(loss, inputs[0])[0]
    exact = leaves((hidden, weight), torch.float64)
    truth = torch.autograd.grad((upstream * plain_logprob(*exact, targets)[0]).sum(), exact[0])[0]

    p = torch.softmax(hidden.float() @ weight.float().T, 1)
    dz = (upstream.unsqueeze(1) * (torch.nn.functional.one_hot(targets, 4001) - p)).bfloat16()
    in_bf16 = torch.zeros_like(hidden)
    for cols in torch.arange(4001).split(128):
        in_bf16 += dz[:, cols] @ weight[cols]
    error, fault = ((g.double() - truth).norm() for g in (grad, in_bf16))
    assert fault > 3 * error, "the problem does not show the fault"
    assert error < 2.0**-8 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 7, 127, 129])
def test_any_width_of_the_hidden_state(small_tiles, backend, dim):
    hidden, weight, _, targets = make_problem(9, 301, dim)
    inputs, exact = leaves((hidden, weight), torch.float32), leaves((hidden, weight), torch.float64)
    logprob = linear_logprob(*inputs, targets, backend=backend).logprob
    truth = plain_logprob(*exact, targets)[0]
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(logprob.sum(), inputs), torch.autograd.grad(truth.sum(), exact), strict=True)
    for grad, true in pairs:
        torch.testing.assert_close(grad.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_per_token_and_not_only_their_mean_or_sum(small_tiles, backend):
    """A policy loss is not linear in the logprobs: here a ratio that is clipped for some tokens."""
    hidden, weight, _, targets = make_problem(9, 301, 8)
    old = plain_logprob(hidden, weight, targets)[0] + torch.linspace(-1, 1, 9)

    def objective(logprob):
        ratio = torch.exp(logprob - old.to(logprob.dtype))
        return torch.minimum(ratio, ratio.clamp(0.8, 1.2)).square().sum()

    inputs = leaves((hidden, weight), torch.float64)
    out = linear_logprob(*inputs, targets, backend=backend)
    assert out.logprob.shape == (9,)
    grads = torch.autograd.grad(objective(out.logprob), inputs)
    truth = torch.autograd.grad(objective(plain_logprob(*inputs, targets)[0]), inputs)
    for grad, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-8])
@pytest.mark.parametrize("fused", [False, True])
def test_repetitions_are_equal_bit_by_bit(small_tiles, fused, grad_tol):
    """Locks and atomic additions give sums whose order, and so whose last bits, change from run to run."""
    hidden, weight, bias, targets = make_problem(37, 1003, 16)
    weight[targets] += hidden

    def run():
        inputs = leaves((hidden, weight, bias), torch.float32)
        options = {"bias": inputs[2], "grad_tol": grad_tol, "backend": "torch"}
        if fused:
            terms = {"advantage": torch.linspace(-1, 1, 37), "weights": torch.full((37,), 1 / 37)}
            loss, _, tokens = linear_tcopd_loss(*inputs[:2], targets, **terms, **options)
        else:
            tokens = linear_logprob(*inputs[:2], targets, **options)
            loss = (tokens.logprob * torch.linspace(-1, 1, 37) + tokens.lse).sum()
        return [tokens.logprob, loss, *torch.autograd.grad(loss, inputs)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_half_precision_results_would_round_a_loss_of_thousands_of_tokens():
    """torch 2.13's own fused function returns its inputs' dtype: bf16 numbers near 20,000 are 128 apart."""
    hidden, weight, _, targets = make_problem(2000, 400, 32, scale=3.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    truth = plain_logprob(hidden.double(), weight.double(), targets)[0].sum()
    logprob = linear_logprob(hidden, weight, targets, backend="torch").logprob
    assert logprob.dtype == torch.float32 and abs(logprob.sum().item() - truth.item()) < 1e-2
    peer = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if peer is not None:
        of_torch = -peer(hidden, weight, targets, reduction="sum")
        assert of_torch.dtype == torch.bfloat16 and abs(of_torch.item() - truth.item()) > 1
