"""Vocabulary compaction of the full-vocabulary loss: its bound on every gradient, its certificate, its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import leaves
from tcopd_kernels import _torch_loss, full_vocab_tcopd_loss
from tcopd_kernels.policy_loss import merge_metrics

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def peaked_models(n=40, vocab=900, dim=24, spread=0.05, seed=0, dtype=torch.float32):
    """Student, reference and two teachers near one another, with a bias that gives language-like tails."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 1.5 * torch.randn(n, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    bias = (-3.0 * torch.arange(1, vocab + 1).log())[torch.randperm(vocab, generator=generator)]

    def noisy(tensor):
        return (tensor + spread * torch.randn(tensor.shape, generator=generator)).to(dtype)

    return [(noisy(hidden), noisy(weight), noisy(bias)) for _ in range(4)]


def run(models, weights, grad_tol=0.0, **options):
    inputs = leaves(models[0], models[0][0].dtype)
    student, ref, *teachers = [tuple(inputs), *models[1:]]
    loss, metrics = full_vocab_tcopd_loss(
        student[0], student[1], ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], [1.5, -0.5],
        weights=weights, bias=student[2], ref_bias=ref[2], teacher_biases=[t[2] for t in teachers],
        grad_tol=grad_tol, **options,
    )  # fmt: skip
    return loss.detach(), metrics, torch.autograd.grad(loss, inputs)


def assert_within_bounds(models, weights, exact, found, grad_tol, rounding=2e-6):
    """The documented bounds with g_n ≤ grad_tol in place of g_n, plus rounding of the gradients."""
    hidden, weight, _ = models[0]
    errors = [(a.double() - b.double()) for a, b in zip(found, exact, strict=True)]
    slack = [rounding * g.abs().max().item() * g.shape[-1] ** 0.5 for g in exact]
    w = weights.abs().double()
    assert (errors[0].norm(dim=1) <= w * grad_tol * weight.double().norm(dim=1).max() + slack[0]).all()
    assert errors[1].norm() <= (w * hidden.double().norm(dim=1)).sum() * grad_tol + slack[1] * len(weight) ** 0.5
    assert errors[2].abs().sum() <= w.sum() * grad_tol + slack[2] * len(weight) ** 0.5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("grad_tol", [1e-3, 1e-2, 1e-1])
def test_gradients_are_within_the_bound_and_columns_are_dropped(monkeypatch, divergence, grad_tol):
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 2 * 900 * 15)  # three chunks of rows
    models = peaked_models()
    weights = torch.rand(40) / 40
    weights[7] = 0
    exact_loss, _, exact = run(models, weights, divergence=divergence)
    loss, metrics, found = run(models, weights, grad_tol, divergence=divergence)
    assert torch.equal(loss, exact_loss)
    assert_within_bounds(models, weights, exact, found, grad_tol)
    assert metrics["grad_row_count"] == 39
    assert metrics["dropped_grad_max"] <= grad_tol
    if grad_tol >= 1e-2:
        assert metrics["kept_column_sum"] < 0.5 * 39 * 900
        assert metrics["dense_row_count"] < 39


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_certificate_is_what_was_dropped(divergence):
    """Of one row: Σ_dropped |dL/dx| and Σ_dropped p, from the dense gradient of the row's logits."""
    models = [tuple(t.double() for t in model) for model in peaked_models(n=1)]
    ones = torch.ones(1, dtype=torch.float64)
    _, metrics, found = run(models, ones, 0.02, divergence=divergence)
    _, _, exact = run(models, ones, divergence=divergence)
    dropped = (found[2] == 0) & (exact[2] != 0)  # the bias gradient of one row is dL/dx
    assert 0 < dropped.sum() < 900
    p = torch.softmax(models[0][0] @ models[0][1].T + models[0][2], 1)[0]
    torch.testing.assert_close(metrics["dropped_grad_sum"], exact[2][dropped].abs().sum().float())
    torch.testing.assert_close(metrics["dropped_mass_sum"], p[dropped].sum().float())
    assert metrics["kept_column_sum"] == 900 - dropped.sum()
    assert metrics["dropped_grad_max"] == metrics["dropped_grad_sum"]


@settings(max_examples=25, deadline=None)
@given(
    grad_tol=st.floats(1e-6, 1.0),
    spread=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_bound_holds_for_any_models(grad_tol, spread, divergence, temperature, softcap, seed):
    models = peaked_models(n=12, vocab=300, dim=8, spread=spread, seed=seed)
    weights = torch.rand(12, generator=torch.Generator().manual_seed(seed)) - 0.3
    options = {"divergence": divergence, "temperature": temperature, "softcap": softcap}
    _, _, exact = run(models, weights, **options)
    _, metrics, found = run(models, weights, grad_tol, **options)
    # A student that is its own target has gradients of rounding alone.
    assert_within_bounds(models, weights, exact, found, grad_tol + 1e-6)
    assert metrics["dropped_grad_max"] <= grad_tol


def test_rows_that_are_too_flat_are_exact():
    models = peaked_models(spread=0.5)
    for model in models:
        model[2].zero_()
    weights = torch.ones(40)
    _, _, exact = run(models, weights)
    _, metrics, found = run(models, weights, 1e-6)
    assert metrics["dense_row_count"] == 40 and metrics["kept_column_sum"] == 40 * 900
    assert metrics["dropped_grad_sum"] == 0
    for value, true in zip(found, exact, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-6)


def test_certificates_of_micro_batches_merge():
    models = peaked_models()
    weights = torch.ones(40)
    _, whole, _ = run(models, weights, 1e-2)
    halves = [
        run([(h[rows], w, b) for h, w, b in models], weights[rows], 1e-2)[1] for rows in (slice(0, 20), slice(20, 40))
    ]
    merged = merge_metrics(halves)
    assert merged.keys() == whole.keys()
    assert merged["grad_row_count"] == whole["grad_row_count"] == 40
    assert merged["dropped_grad_max"] <= 1e-2


def test_reference_backend_reports_an_exact_gradient():
    models = peaked_models(n=6)
    _, metrics, _ = run(models, torch.ones(6), 1e-2, backend="reference")
    assert metrics["dense_row_count"] == metrics["grad_row_count"] == 6
    assert metrics["dropped_grad_max"] == metrics["dropped_mass_max"] == 0
    assert metrics["kept_column_sum"] == 6 * 900


def test_no_gradient_and_no_rows():
    models = peaked_models(n=5)
    with torch.no_grad():
        student, ref, *teachers = models
        arguments = (*student[:2], *ref[:2], [t[0] for t in teachers], [t[1] for t in teachers], [1.5, -0.5])
        loss, metrics = full_vocab_tcopd_loss(*arguments, weights=torch.zeros(5), grad_tol=0.1)
        assert loss == 0 and metrics["token_count"] == metrics["grad_row_count"] == 0
        loss, metrics = full_vocab_tcopd_loss(*arguments, weights=torch.ones(5), grad_tol=0.1)
        assert metrics["grad_row_count"] == 0
        assert loss == full_vocab_tcopd_loss(*arguments, weights=torch.ones(5))[0]
