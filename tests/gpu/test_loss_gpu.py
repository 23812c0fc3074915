"""The compiled single pass of linear_tcopd_loss: accuracy in every dtype, both load paths, memory, determinism."""

from __future__ import annotations

import pytest
import torch
from gpu_mode import DEVICE, DTYPES, GRAD_LIMIT, HALF, HALVES, sized
from tcopd_kernels import linear_tcopd_loss, reference, tcopd_policy_loss

# The odd hidden size and the odd vocabulary take the pointer path and ragged tiles.
SHAPES_NVD = sized(
    [(13, 1000, 96), (200, 50257, 768), (1100, 32003, 136), (333, 2048, 101)],
    [(13, 100, 40), (150, 131, 24), (37, 131, 29)],
)


@pytest.fixture
def small_chunks(monkeypatch):
    from tcopd_kernels import _triton_loss

    monkeypatch.setattr(_triton_loss, "MIN_CHUNK_ROWS", 128)
    monkeypatch.setattr(_triton_loss, "KEPT_BYTES", 1)


def make_case(n, vocab, dim, dtype, with_bias=False):
    generator = torch.Generator(DEVICE).manual_seed(n + vocab + dim)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device=DEVICE) * scale

    hidden, weight = normal(n, dim).to(dtype), normal(vocab, dim, scale=2 / dim**0.5).to(dtype)
    bias = normal(vocab).to(dtype) if with_bias else None
    targets = torch.randint(0, vocab, (n,), generator=generator, device=DEVICE)
    advantage = normal(n)
    advantage[::4] = 0.0
    old = reference.linear_logprob(hidden.double(), weight.double(), targets).logprob.float() + 0.1 * normal(n)
    return hidden, weight, bias, targets, {"advantage": advantage, "old_logprob": old, "weights": normal(n).abs() / n}


def loss_and_grads(hidden, weight, bias, targets, tokens, *, exact=False, **options):
    dtype = torch.float64 if exact else hidden.dtype
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    if exact:
        options.pop("entropy", None)
        stats = reference.linear_logprob(inputs[0], inputs[1], targets, bias=inputs[2], **options)
        tokens = {name: value.double() for name, value in tokens.items()}
        loss = tcopd_policy_loss(stats.logprob, tokens.pop("advantage"), **tokens)[0]
    else:
        loss = linear_tcopd_loss(*inputs[:2], targets, bias=inputs[2], backend="triton", **tokens, **options)[0]
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in inputs if t is not None])]


def relative_error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_NVD, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 10.0, "entropy": True}], ids=["plain", "all"])
def test_matches_float64(small_chunks, shape, options, dtype):
    case = make_case(*shape, dtype, with_bias=bool(options))
    found, exact = loss_and_grads(*case, **options), loss_and_grads(*case, exact=True, **options)
    assert relative_error(found[0], exact[0]) < 1e-4
    for value, true in zip(found[1:], exact[1:], strict=True):
        assert relative_error(value, true) <= GRAD_LIMIT[dtype]


def test_equals_the_torch_backend_without_a_bound_on_the_chunks():
    case = make_case(*sized((700, 40001, 264), (37, 131, 40)), HALF)
    found, exact = loss_and_grads(*case), loss_and_grads(*case, exact=True)
    assert all(relative_error(a, b) <= GRAD_LIMIT[HALF] for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bitwise_repeatable(small_chunks, dtype):
    case = make_case(*sized((515, 32003, 264), (150, 131, 40)), dtype, with_bias=True)
    first, second = loss_and_grads(*case, entropy=True), loss_and_grads(*case, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_are_compacted_without_a_race(small_chunks):
    """In place: with most rows gone, every block of rows moves far."""
    N, *_ = shape = sized((1024, 8200, 64), (150, 131, 16))
    hidden, weight, _, targets, tokens = make_case(*shape, HALF)
    tokens["advantage"][torch.arange(N, device=DEVICE) % 3 != 2] = 0.0
    exact = loss_and_grads(hidden, weight, None, targets, tokens, exact=True)
    for _ in range(5):
        found = loss_and_grads(hidden, weight, None, targets, tokens)
        assert all(relative_error(a, b) <= GRAD_LIMIT[HALF] for a, b in zip(found, exact, strict=True))


def test_memory_stays_within_the_kept_chunk_and_the_gradients():
    n, vocab, dim = sized((4096, 131072, 512), (37, 131, 40))
    hidden, weight, _, targets, tokens = make_case(n, vocab, dim, HALF)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def run():
        linear_tcopd_loss(*inputs, targets, backend="triton", **tokens)[0].backward()
        for leaf in inputs:
            leaf.grad = None

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    head_gradient = vocab * dim * (4 + 2)
    assert extra < (512 << 20) + head_gradient + 8 * n * dim + (64 << 20)
    assert extra < 2 * n * vocab * 2


def test_tolerance_stays_within_the_certificate(bounds_in_proportion):
    generator = torch.Generator(DEVICE).manual_seed(0)
    n, vocab, dim = sized((600, 20000, 256), (140, 1000, 64))
    weight = torch.randn(vocab, dim, generator=generator, device=DEVICE).to(HALF)
    targets = torch.randint(0, vocab, (n,), generator=generator, device=DEVICE)
    hidden = weight[targets] * sized(0.15, 0.6)
    tokens = {"advantage": torch.ones(n, device=DEVICE), "weights": torch.full((n,), 1 / n, device=DEVICE)}
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, metrics, _ = linear_tcopd_loss(*inputs, targets, backend="triton", grad_tol=2.0**-8, **tokens)
    grads = torch.autograd.grad(loss, inputs)
    exact = loss_and_grads(hidden, weight, None, targets, tokens, exact=True)
    assert metrics["dropped_mass_max"] <= 2.0**-8 and metrics["kept_column_sum"] < n * vocab / 4
    bound = metrics["dropped_mass_max"] / n * weight.norm(dim=1).max()
    error = (grads[0].double() - exact[1]).norm(dim=1)
    assert (error <= bound + GRAD_LIMIT[HALF] * exact[1].norm(dim=1).max()).all()
