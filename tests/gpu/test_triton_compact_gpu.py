"""Certified vocabulary compaction on the GPU at the sizes of a language model, and what it costs the host."""

from __future__ import annotations

import warnings

import pytest
import torch
from gpu_mode import DEVICE, DTYPES, HALF, sized
from tcopd_kernels import linear_logprob, linear_tcopd_loss
from tcopd_kernels._backend import load_backend


def make_peaked(n, vocab, dim, dtype, flat_rows=0):
    """Rows with a Zipf-like prior over token ids and their target on top; the last rows are nearly flat."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    prior = torch.arange(1, vocab + 1, device=DEVICE).log()
    weight = torch.randn(vocab, dim, generator=gen, device=DEVICE) / dim**0.5
    weight[:, 0] = -prior / 4
    targets = torch.multinomial((-1.2 * prior).exp(), n, replacement=True, generator=gen)
    hidden = 0.1 * torch.randn(n, dim, generator=gen, device=DEVICE) + sized(14.0, 20.0) * weight[targets]
    hidden[:, 0] = 6.0
    if flat_rows:
        hidden[-flat_rows:] *= 0.01
    return hidden.to(dtype), weight.to(dtype), targets


def exact_by_rows(hidden, weight, targets, upstream, rows=256):
    """float64 gradients of hidden and weight of Σ upstream·logprob, and the entropy [n], a few rows at a time."""
    wide = weight.double()
    grad_weight, grad_hidden, entropy = torch.zeros_like(wide), [], []
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        h = hidden[part].double()
        log_p = torch.log_softmax(h @ wide.T, 1)
        p = log_p.exp()
        entropy.append(-(p * log_p).sum(1))
        dz = -p * upstream[part, None]
        dz.scatter_add_(1, targets[part, None], upstream[part, None].double())
        grad_hidden.append(dz @ wide)
        grad_weight += dz.T @ h
    return torch.cat(grad_hidden), grad_weight, torch.cat(entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_are_above_every_probability(dtype):
    n, vocab, dim = sized((600, 50257, 256), (150, 300, 32))
    hidden, weight, targets = make_peaked(n, vocab, dim, dtype, flat_rows=3)
    triton = load_backend("triton")
    bounds = triton.new_bounds(n, weight).fill_(float("nan"))
    options = {"bias": None, "temperature": 1.0, "softcap": None, "entropy": False}
    triton.partials(hidden, weight, targets, bounds=bounds, **options)
    p = torch.softmax(hidden.double() @ weight.double().T, 1)
    for bound, rows in zip(bounds, p.split(triton.BOUND_ROWS), strict=True):
        assert (bound >= rows.amax(0) * (1 - 1e-3)).all() and (bound <= 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", sized([(5000, 151936, 256), (333, 50257, 101)], [(64, 600, 32), (48, 700, 29)]), ids=str
)
def test_error_is_within_the_certificate(bounds_in_proportion, dtype, shape):
    n, vocab, dim = shape
    hidden, weight, targets = make_peaked(n, vocab, dim, dtype, flat_rows=5)
    upstream = torch.randn(n, device=DEVICE)
    grad_hidden, grad_weight, entropy = exact_by_rows(hidden, weight, targets, upstream)
    assert entropy[:-5].median() < 3
    longest, lengths = weight.double().norm(dim=1).max(), hidden.double().norm(dim=1)
    eps = 2 * torch.finfo(dtype).eps
    for grad_tol in (2.0**-5, 2.0**-8):
        inputs, certificate = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()], {}
        out = linear_logprob(*inputs, targets, grad_tol=grad_tol, backend="triton", certificate=certificate)
        found = torch.autograd.grad((upstream * out.logprob).sum(), inputs)
        r = certificate["dropped_mass_max"].item()
        assert 0 < r <= grad_tol
        assert certificate["dense_row_count"] < n / 2 and certificate["kept_column_sum"] < n * vocab / 2
        r += 4e-6 + 2 * eps
        error = (found[0].double() - grad_hidden).norm(dim=1)
        assert (error <= upstream.abs() * r * longest + eps * grad_hidden.norm(dim=1)).all()
        error = (found[1].double() - grad_weight).norm()
        assert error <= (upstream.abs() * r * lengths).sum() + eps * grad_weight.norm()


def test_runs_are_bitwise_equal():
    hidden, weight, targets = make_peaked(*sized((2500, 151936, 256), (24, 500, 32)), HALF, flat_rows=5)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for _ in range(3):
        out = linear_logprob(*inputs, targets, grad_tol=2.0**-7, backend="triton")
        results.append(torch.autograd.grad(out.logprob.sum(), inputs))
    for other in results[2:]:  # the tiles are chosen in the first run
        assert all(torch.equal(a, b) for a, b in zip(results[1], other, strict=True))


def test_the_host_waits_seldom():
    hidden, weight, targets = make_peaked(*sized((8192, 151936, 256), (24, 500, 32)), HALF)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    for run in range(2):
        out = linear_logprob(*inputs, targets, grad_tol=2.0**-7, backend="triton")
        value = out.logprob.sum()
        torch.cuda.set_sync_debug_mode("warn" if run else "default")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.autograd.grad(value, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]  # numpy's are RuntimeWarnings
    assert sized(1, 0) <= len(waits) <= 30, waits


def test_memory_is_below_that_of_an_fp32_gradient_of_the_weight():
    n, vocab, dim = sized((4096, 151936, 1024), (24, 500, 32))
    hidden, weight, targets = make_peaked(n, vocab, dim, HALF)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    for _ in range(2):
        out = linear_logprob(*inputs, targets, grad_tol=2.0**-5, backend="triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(out.logprob.sum(), inputs)
    extra = torch.cuda.max_memory_allocated() - before
    own_gradient = 2 * vocab * dim
    assert extra < own_gradient + 4 * vocab * dim / 2 + (900 << 20)


def test_fused_loss_with_compaction(bounds_in_proportion):
    n, vocab, dim = sized((2048, 50257, 256), (40, 600, 32))
    hidden, weight, targets = make_peaked(n, vocab, dim, HALF, flat_rows=2)
    weights = torch.full((n,), 1 / n, device=DEVICE)
    advantage = torch.randn(n, device=DEVICE)
    grads = []
    for grad_tol in (0.0, 2.0**-8):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, metrics, _ = linear_tcopd_loss(
            *inputs, targets, advantage=advantage, weights=weights, grad_tol=grad_tol, backend="triton"
        )
        grads.append(torch.autograd.grad(loss, inputs))
    assert metrics["dense_row_count"] < n
    for exact, found in zip(*grads, strict=True):
        assert (exact.double() - found.double()).norm() <= 0.02 * exact.double().norm()
