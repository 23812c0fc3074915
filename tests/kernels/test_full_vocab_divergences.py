from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Allocations, assert_no_worse_than_torch, leaves
from tcopd_kernels import _torch, _torch_loss, full_vocab_tcopd_loss
from test_full_vocab import N, call_loss, log_policy, make_models

DIVERGENCES = {"reverse_kl": {}, "forward_kl": {}, "jsd": {"beta": 0.5}, "jsd_0.1": {"divergence": "jsd", "beta": 0.1}}
LAMBDAS, COEFFICIENTS = [1.5, -0.5], (0.5, 0.75, -0.25)  # of the reference and both teachers


def options_of(name):
    return {"divergence": name, **DIVERGENCES[name]}


def dense_loss(z, others, weights, divergence, beta=0.5):
    """Σ w L from logits [N, V] of the student and of (reference, teachers), written with products of policies."""
    p = torch.softmax(z, -1)
    mixture = torch.stack([torch.softmax(other, -1) ** a for a, other in zip(COEFFICIENTS, others, strict=True)]).prod(
        0
    )
    normaliser = mixture.sum(-1, keepdim=True)
    q = mixture / normaliser
    if divergence == "reverse_kl":
        losses = (p * (p / q).log()).sum(-1) - normaliser.squeeze(-1).log()
    elif divergence == "forward_kl":
        losses = (q * (q / p).log()).sum(-1)
    else:
        m = beta * q + (1 - beta) * p
        losses = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    return (weights * losses).sum()


def plain_divergence(log_p, others, divergence, beta=0.5):
    """[N] as a user writes it from log_softmax."""
    target = sum(a * other for a, other in zip(COEFFICIENTS, others, strict=True))
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - target)).sum(1)
    log_q = torch.log_softmax(target, -1)
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return sum(share * (x.exp() * (x - log_m)).sum(1) for share, x in ((beta, log_q), (1 - beta, log_p)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_matches_products_of_policies(small_tiles, backend, name, softcap):
    models = make_models()
    weights = torch.rand(N, dtype=torch.float64)
    inputs = leaves(models[0][:2], torch.float64)
    loss, _ = call_loss(
        [tuple(inputs), *models[1:]], LAMBDAS, weights=weights, backend=backend, softcap=softcap, temperature=0.8,
        **options_of(name),
    )  # fmt: skip
    z = inputs[0] @ inputs[1].T
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.8
    others = [model[0] @ model[1].T / 0.8 for model in models[1:]]
    expected = dense_loss(z, others, weights, **options_of(name))
    torch.testing.assert_close(loss, expected)
    for grad, true in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_error_is_at_most_twice_that_of_torch(small_tiles, dtype, name):
    models = make_models(dtype)
    weights = torch.rand(N) / N

    def run(function, dtype):
        cast = [tuple(t.to(dtype) for t in model) for model in models]
        inputs = leaves(cast[0], dtype)
        loss = function([tuple(inputs), *cast[1:]], weights.double() if dtype == torch.float64 else weights)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def plain(cast, weights):
        logits = [torch.nn.functional.linear(*model) for model in cast]
        log_p, *others = (torch.log_softmax(z if z.dtype == torch.float64 else z.float(), -1) for z in logits)
        return (weights * plain_divergence(log_p, others, name)).sum()

    def ours(cast, weights):
        biases = [model[2] for model in cast]
        return call_loss(
            cast, LAMBDAS, weights=weights, bias=biases[0], ref_bias=biases[1], teacher_biases=biases[2:],
            divergence=name,
        )[0]  # fmt: skip

    values = zip(run(ours, dtype), run(plain, dtype), run(plain, torch.float64), strict=True)
    for label, (value, torch_value, true) in zip(("loss", "hidden", "weight", "bias"), values, strict=True):
        assert_no_worse_than_torch(value, torch_value, true, label)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_gradcheck(small_tiles, name):
    models = make_models(n=4, vocab=11)

    def function(hidden, weight, bias):
        return call_loss(
            [(hidden, weight), *models[1:]], LAMBDAS, weights=torch.ones(4, dtype=torch.float64), bias=bias,
            softcap=2.0, teacher_softcaps=[None, 1.5], temperature=0.7, divergence=name,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves(models[0], torch.float64))


@settings(max_examples=30, deadline=None)
@given(
    lambdas=st.lists(st.floats(-2, 2), min_size=2, max_size=2),
    beta=st.floats(0.05, 0.95),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_divergences_are_not_negative_and_obey_their_relations(lambdas, beta, scale, seed):
    """KL ≥ 0, 0 ≤ JSD ≤ its bound in entropies of β, and all vanish with their gradient when q = π_θ."""
    generator = torch.Generator().manual_seed(seed)
    n, vocab, dim = 5, 37, 6
    models = [
        tuple(scale * torch.randn(rows, dim, generator=generator).double() for rows in (n, vocab)) for _ in range(4)
    ]
    weights = torch.ones(n, dtype=torch.float64)
    losses = {
        name: call_loss(models, lambdas, weights=weights, divergence=name, beta=beta)[0].item()
        for name in ("forward_kl", "jsd")
    }
    assert losses["forward_kl"] >= -1e-9
    entropy_of_beta = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log()).item()
    assert -1e-9 <= losses["jsd"] <= n * entropy_of_beta + 1e-6
    hidden = models[0][0].clone().requires_grad_()
    for name in ("reverse_kl", "forward_kl", "jsd"):
        loss, _ = full_vocab_tcopd_loss(
            hidden, models[0][1], None, None, [models[0][0]], [models[0][1]], [1.0], weights=weights, divergence=name
        )
        assert abs(loss.item()) < 1e-9
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-9


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e3, 1e4])
def test_far_logits_cost_no_more_accuracy_than_in_torch(name, shift):
    """All logits moved by a bias, and one row that is one-hot."""
    models = [tuple(t.float() for t in model) for model in make_models()]
    models[0][0][0] *= 200

    def run(function, dtype):
        cast = [tuple(t.to(dtype) for t in (h, w, torch.full_like(b, shift))) for h, w, b in models]
        inputs = leaves(cast[0], dtype)
        loss = function([tuple(inputs), *cast[1:]])
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def ours(cast):
        biases = [model[2] for model in cast]
        return call_loss(
            cast, LAMBDAS, weights=torch.ones(N).to(cast[0][0]), bias=biases[0], ref_bias=biases[1],
            teacher_biases=biases[2:], **options_of(name),
        )[0]  # fmt: skip

    def plain(cast):
        log_p, *others = (torch.log_softmax(torch.nn.functional.linear(*model), -1) for model in cast)
        return plain_divergence(log_p, others, **options_of(name)).sum()

    values = zip(run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64), strict=True)
    for label, (value, torch_value, true) in zip(("loss", "hidden", "weight", "bias"), values, strict=True):
        assert_no_worse_than_torch(value, torch_value, true, label)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_memory_is_bounded_and_repeats_are_equal(monkeypatch, name):
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
    models = make_models(torch.float32, n=60, vocab=2000)
    hidden = models[0][0].requires_grad_()
    weights = torch.full((60,), 1 / 60)
    with Allocations() as seen:
        loss, _ = call_loss(models, LAMBDAS, weights=weights, **options_of(name))
        (grad,) = torch.autograd.grad(loss, hidden)
    assert max(seen.sizes) <= 2000 * 12 < 60 * 2000
    again, _ = call_loss(models, LAMBDAS, weights=weights, **options_of(name))
    assert torch.equal(again, loss) and torch.equal(torch.autograd.grad(again, hidden)[0], grad)


def test_a_model_is_not_run_where_its_coefficient_is_zero(monkeypatch):
    models = make_models()
    lambdas = torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(1, N)
    lambdas[:, :5] = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    rows = []
    original = _torch.torch.mm

    def counting(a, b, **options):
        rows.append((a.shape[0], a.shape[1]))
        return original(a, b, **options)

    monkeypatch.setattr(_torch.torch, "mm", counting)
    call_loss(models, lambdas, weights=torch.ones(N))
    assert {n for n, dim in rows if dim == 9} == {N - 5}
    assert {n for n, dim in rows if dim == 16} == {5}
    assert not [n for n, dim in rows if dim == 7]  # the reference drops out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of reverse_kl, forward_kl, jsd, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta must be in \(0.0, 1.0\), got 1.0"),
        ({"divergence": "jsd", "backend": "triton"}, "divergence='jsd' has no Triton kernel; use backend='auto'"),
        ({"grad_tol": -1.0}, "grad_tol must be in"),
        ({"likely_tokens": torch.zeros(N)}, "likely_tokens must be an int64 tensor or None, got torch.float32"),
        ({"likely_tokens": torch.zeros(3).long()}, r"likely_tokens must have shape \[19\], got \[3\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call_loss(make_models(torch.float32), LAMBDAS, weights=torch.ones(N), **change)


def test_reverse_kl_is_that_to_the_normalised_target_but_for_a_constant(small_tiles):
    """L = KL(π_θ‖q) − log Q, with the same gradient."""
    models = make_models()
    ones = torch.ones(N, dtype=torch.float64)
    log_p, *others = (log_policy(model) for model in models)
    log_target = sum(a * other for a, other in zip(COEFFICIENTS, others, strict=True))
    log_q = torch.log_softmax(log_target, -1)
    loss, _ = call_loss(models, LAMBDAS, weights=ones)
    expected = (log_p.exp() * (log_p - log_q)).sum() - torch.logsumexp(log_target, -1).sum()
    torch.testing.assert_close(loss, expected)
