"""Certified vocabulary compaction of the torch backend: the promised bounds, the certificate, the exact cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Allocations, leaves, make_problem
from tcopd_kernels import _torch, _torch_compact, _torch_loss, linear_logprob, linear_tcopd_loss
from tcopd_kernels._torch_grads import Needs
from tcopd_kernels.policy_loss import merge_metrics

KEYS = {"dropped_mass_sum", "dropped_mass_max", "dense_row_count", "grad_row_count", "kept_column_sum"}


def make_peaked(n, vocab, sharpness, seed=0, flat_rows=0, dim=64):
    """Rows with a Zipf-like prior over token ids and `sharpness` nats more for the target; the last rows are flat."""
    generator = torch.Generator().manual_seed(seed)
    prior = torch.arange(1, vocab + 1).log()
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    weight[:, 0] = -prior / 4
    targets = torch.multinomial((-1.5 * prior).exp(), n, replacement=True, generator=generator)
    hidden = 0.3 * torch.randn(n, dim, generator=generator) + sharpness * weight[targets]
    hidden[:, 0] = 6.0
    if flat_rows:
        hidden[-flat_rows:] = 0.0
    return hidden, weight, targets


def logprob_grads(inputs, targets, upstream, grad_tol, **head):
    """(gradients, certificate) of Σ upstream[0]·logprob + upstream[1]·lse."""
    certificate = {}
    out = linear_logprob(*inputs[:2], targets, bias=inputs[2], grad_tol=grad_tol, backend="torch",
                         certificate=certificate, **head)  # fmt: skip
    value = (upstream[0] * out.logprob).sum() + (upstream[1] * out.lse).sum()
    return torch.autograd.grad(value, [t for t in inputs if t is not None]), certificate


def loss_grads(inputs, targets, advantage, grad_tol, **head):
    """(gradients, metrics) of the on-policy loss, whose d loss / d logprob is −advantage."""
    loss, metrics, _ = linear_tcopd_loss(
        *inputs[:2], targets, bias=inputs[2], advantage=advantage, weights=torch.ones_like(advantage),
        grad_tol=grad_tol, backend="torch", **head,
    )  # fmt: skip
    return torch.autograd.grad(loss, [t for t in inputs if t is not None]), metrics


def assert_within_bounds(found, exact, inputs, coefficient, certificate, grad_tol, temperature):
    """The three inequalities of the module, with max r in place of each r_i, and r ≤ grad_tol."""
    hidden, weight = inputs[0].detach(), inputs[1].detach()
    r = certificate["dropped_mass_max"].item()
    assert 0 <= r <= grad_tol * (1 + 1e-6)
    c = coefficient.abs() / temperature
    slack = 1e-9 * max(1.0, *(g.abs().max().item() for g in exact)) + 1e-12
    errors = [a - b for a, b in zip(found, exact, strict=True)]
    # dropped_mass_max is reported in fp32.
    r = r * (1 + 1e-6)
    assert (errors[0].norm(dim=1) <= c * r * weight.norm(dim=1).max() + slack).all()
    assert errors[1].norm() <= (c * r * hidden.norm(dim=1)).sum() + slack
    if len(errors) > 2:
        assert errors[2].abs().sum() <= (c * r).sum() + slack * len(weight)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 12),
    vocab=st.integers(1, 300),
    dim=st.integers(1, 9),
    exponent=st.integers(-14, 3),
    scale=st.sampled_from([0.0, 0.3, 3.0, 30.0, 1e3]),
    level=st.sampled_from([0.0, 1e3, -1e3]),
    temperature=st.floats(0.3, 3.0),
    softcap=st.one_of(st.none(), st.floats(1.0, 30.0)),
    block=st.integers(1, 6),
    tile=st.integers(1, 400),
    lse_gradient=st.booleans(),
    seed=st.integers(0, 999),
)
def test_bounds_hold_for_any_input(
    n, vocab, dim, exponent, scale, level, temperature, softcap, block, tile, lse_gradient, seed
):
    """Random and extreme logits: flat, one-hot, shifted by ±1000; blocks, tiles and tolerance of any size."""
    hidden, weight, bias, targets = make_problem(n, vocab, dim, seed, scale)
    inputs = leaves((hidden, weight, bias + level), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(2, n, generator=generator, dtype=torch.float64)
    upstream[1] *= lse_gradient
    upstream[:, torch.rand(n, generator=generator) < 0.2] = 0.0
    head, grad_tol = {"temperature": temperature, "softcap": softcap}, 2.0**exponent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "BOUND_ROWS", block)
        patch.setattr(_torch, "WORKSPACE_BYTES", 8 * tile)
        patch.setattr(_torch_compact, "BOUND_ROWS", block)
        patch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 8 * tile * 5)
        exact, full = logprob_grads(inputs, targets, upstream, 0.0, **head)
        found, certificate = logprob_grads(inputs, targets, upstream, grad_tol, **head)
        assert full["dropped_mass_sum"] == 0 and full["kept_column_sum"] == vocab * full["grad_row_count"]
        assert certificate["grad_row_count"] == full["grad_row_count"]
        assert_within_bounds(found, exact, inputs, upstream[1] - upstream[0], certificate, grad_tol, temperature)
        exact, _ = loss_grads(inputs, targets, upstream[0], 0.0, **head)
        found, metrics = loss_grads(inputs, targets, upstream[0], grad_tol, **head)
        assert_within_bounds(found, exact, inputs, upstream[0], metrics, grad_tol, temperature)


@pytest.mark.parametrize("of", ["logprob", "loss"])
def test_measured_mass_is_the_true_mass_and_each_row_keeps_its_own_bound(monkeypatch, of):
    monkeypatch.setattr(_torch, "BOUND_ROWS", 16)
    n, vocab, grad_tol = 48, 700, 2.0**-8
    hidden, weight, targets = make_peaked(n, vocab, 8.0, flat_rows=3)
    inputs = [*leaves((hidden, weight), torch.float64), None]
    p = torch.softmax(hidden.double() @ weight.double().T, 1)
    seen = []
    original = _torch_compact.keep_columns

    def spy(*args):
        pieces, dropped = original(*args)
        mask = torch.zeros(len(dropped), vocab, dtype=torch.bool)
        for columns, places, _ in pieces:
            assert not mask[places][:, columns].any()
            mask[places.unsqueeze(1), columns] = True
        seen.append((mask, dropped.clone()))
        return pieces, dropped

    monkeypatch.setattr(_torch_compact, "keep_columns", spy)
    upstream = torch.randn(2, n, dtype=torch.float64)
    upstream[1] = 0.0
    run = (lambda tol: logprob_grads(inputs, targets, upstream, tol)) if of == "logprob" else (
        lambda tol: loss_grads(inputs, targets, upstream[0], tol)
    )  # fmt: skip
    found, certificate = run(grad_tol)
    start, rows_dropped = 0, []
    for mask, dropped in seen:
        rows = slice(start, start + len(dropped))
        start = rows.stop
        assert mask.gather(1, targets[rows].unsqueeze(1)).all()
        torch.testing.assert_close(dropped, (p[rows] * ~mask).sum(1), rtol=0, atol=1e-12)
        rows_dropped.append(dropped)
    r = torch.cat(rows_dropped)
    assert len(r) == n
    within = r <= grad_tol
    assert 3 <= certificate["dense_row_count"] == (~within).sum() < n
    torch.testing.assert_close(certificate["dropped_mass_sum"], r[within].sum().float())
    torch.testing.assert_close(certificate["dropped_mass_max"], r[within].max().float())
    assert certificate["dropped_mass_max"] > 0
    assert certificate["kept_column_sum"] < n * vocab / 2
    exact, _ = run(0.0)
    error = (found[0] - exact[0]).norm(dim=1)
    assert (error <= upstream[0].abs() * r * weight.norm(dim=1).max() + 1e-12).all()
    torch.testing.assert_close(found[0][~within], exact[0][~within])
    assert (error[within] > 0).any()


def test_dropped_columns_have_exactly_zero_weight_gradient():
    hidden, weight, targets = make_peaked(40, 900, 8.0)
    inputs = [*leaves((hidden, weight), torch.float32), None]
    exact, _ = loss_grads(inputs, targets, torch.ones(40), 0.0)
    for grads, certificate in (
        loss_grads(inputs, targets, torch.ones(40), 2.0**-4),
        logprob_grads(inputs, targets, torch.ones(2, 40) * torch.tensor([[-1.0], [0.0]]), 2.0**-4),
    ):
        assert certificate["dense_row_count"] == 0
        zero = (grads[1] == 0).all(1)
        assert 300 < zero.sum() < 900 and certificate["kept_column_sum"] < 300 * 40
        assert not zero[targets].any() and (exact[1] != 0).any(1).all()
        assert (grads[1] - exact[1]).norm() <= (certificate["dropped_mass_max"] * inputs[0].norm(dim=1)).sum() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [False, True])
def test_half_precision_and_masked_rows(small_tiles, request, dtype, half):
    """Ignored rows and rows without gradient shift the rows against their blocks; each must find its own bound."""
    if half:
        request.getfixturevalue("half_operands")
    n, grad_tol = 40, 2.0**-8
    hidden, weight, targets = make_peaked(n, 600, 8.0)
    inputs = [*leaves((hidden, weight), dtype), None]
    targets[::7] = -100
    upstream = torch.randn(2, n) * (torch.arange(n) % 3 > 0) / 64
    upstream[1] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
        patch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
        patch.setattr(_torch, "BOUND_ROWS", 8)
        for run, given_rows in ((logprob_grads, upstream), (loss_grads, upstream[0])):
            exact, _ = run(inputs, targets, given_rows, 0.0)
            found, certificate = run(inputs, targets, given_rows, grad_tol)
            assert certificate["kept_column_sum"] < 600 * certificate["grad_row_count"]
            assert certificate["grad_row_count"] == ((targets != -100) & (upstream[0] != 0)).sum()
            bound = upstream[0].abs() * grad_tol * weight.norm(dim=1).max()
            rounding = 4 * torch.finfo(dtype).eps * upstream[0].abs().max() * weight.norm(dim=1).max()
            assert ((found[0] - exact[0]).float().norm(dim=1) <= bound + rounding).all()
            assert found[0].dtype == found[1].dtype == dtype
            assert (found[0][targets == -100] == 0).all()


@pytest.mark.parametrize("grad_tol", [2.0**-4, 2.0**-9])
@pytest.mark.parametrize("cuts", [(0, 300, 900), (0, 2, 500, 900)])
def test_parts_of_the_vocabulary_add_up_within_the_bounds(grad_tol, cuts):
    """What ranks that hold the parts do: each drops up to grad_tol of each row's mass, of its own mass only."""
    n = 40
    hidden, weight, targets = (
        t.double() if t.is_floating_point() else t for t in make_peaked(n, 900, 8.0, flat_rows=2)
    )
    lse = torch.logsumexp(hidden @ weight.T, 1)
    upstream = torch.randn(2, n, dtype=torch.float64)
    head = {"bias": None, "temperature": 1.0, "softcap": None}
    total, weight_parts, r = torch.zeros_like(hidden), [], torch.zeros(n, dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part, local = weight[start:stop], targets - start
        bounds = _torch.new_bounds(n, part)
        own = _torch.partials(hidden, part, local, entropy=False, bounds=bounds, **head)
        mass = (own.max + own.sum.log() - lse).exp()
        torch.testing.assert_close(mass, (hidden @ part.T - lse.unsqueeze(1)).exp().sum(1))
        (grad_hidden, grad_weight, _), certificate = _torch_compact.backward(
            hidden, part, local, lse, *upstream, needs=Needs(True, True, False), grad_tol=grad_tol, bounds=bounds,
            blocks=torch.zeros(n, dtype=torch.int64), mass=mass, **head,
        )  # fmt: skip
        assert certificate["dropped_mass_max"] <= grad_tol * (1 + 1e-6)
        assert certificate["dropped_mass_max"] <= mass.max()
        total += grad_hidden
        weight_parts.append(grad_weight)
        r += certificate["dropped_mass_max"] * (1 + 1e-6)
    exact = _torch.backward(hidden, weight, targets, lse, None, *upstream, None, need_hidden=True, need_weight=True,
                            need_bias=False, **head)  # fmt: skip
    c = (upstream[1] - upstream[0]).abs()
    assert ((total - exact[0]).norm(dim=1) <= c * r * weight.norm(dim=1).max() + 1e-12).all()
    assert (torch.cat(weight_parts) - exact[1]).norm() <= (c * r * hidden.norm(dim=1)).sum() + 1e-12
    assert grad_tol < 2.0**-4 or (torch.cat(weight_parts) == 0).all(1).sum() > 200


def test_a_part_without_mass_and_targets_costs_nothing():
    hidden, weight, targets = make_peaked(10, 900, 20.0)
    part = 5 * weight[:50] - 100 * hidden.mean(0)
    lse = torch.logsumexp(hidden @ weight.T, 1)
    own = _torch.partials(hidden, part, targets - 5000, bias=None, temperature=1.0, softcap=None, entropy=False)
    (grad_hidden, grad_weight, _), certificate = _torch_compact.backward(
        hidden, part, targets - 5000, lse, torch.ones(10), None, bias=None, temperature=1.0, softcap=None,
        needs=Needs(True, True, False), grad_tol=2.0**-8, bounds=_torch.new_bounds(10, part) + 1.0,
        blocks=torch.zeros(10, dtype=torch.int64), mass=(own.max + own.sum.log() - lse).exp(),
    )  # fmt: skip
    assert (grad_hidden == 0).all() and (grad_weight == 0).all()
    assert certificate["kept_column_sum"] == 0 and certificate["dense_row_count"] == 0
    assert certificate["grad_row_count"] == 10


def test_flat_rows_are_dense_and_equal_the_exact_gradient():
    hidden, weight, bias, targets = make_problem(20, 500, 8)
    inputs = leaves((hidden * 0.1, weight, bias), torch.float32)
    upstream = torch.stack([torch.randn(20), torch.zeros(20)])
    exact, _ = logprob_grads(inputs, targets, upstream, 0.0)
    found, certificate = logprob_grads(inputs, targets, upstream, 2.0**-8)
    assert certificate["dense_row_count"] == 20 and certificate["kept_column_sum"] == 20 * 500
    torch.testing.assert_close(found, exact)


def test_gradient_of_the_entropy_makes_the_backward_exact():
    hidden, weight, targets = make_peaked(30, 600, 8.0)
    inputs = leaves((hidden, weight), torch.float32)
    results = []
    for grad_tol in (0.0, 0.5):
        certificate = {}
        out = linear_logprob(
            *inputs, targets, entropy=True, grad_tol=grad_tol, backend="torch", certificate=certificate
        )
        results.append(torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), inputs))
        assert certificate["dense_row_count"] == 30 and certificate["dropped_mass_max"] == 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_tolerance_above_one_still_keeps_the_targets():
    hidden, weight, targets = make_peaked(30, 600, 8.0)
    inputs = [*leaves((hidden, weight), torch.float32), None]
    (_, grad), certificate = loss_grads(inputs, targets, torch.ones(30), 8.0)
    assert certificate["dense_row_count"] == 0
    assert (grad[targets] != 0).any(1).all() and certificate["kept_column_sum"] / 30 == len(targets.unique())


def test_nan_is_not_dropped():
    hidden, weight, targets = make_peaked(6, 600, 8.0)
    hidden[2] = float("nan")
    inputs = [*leaves((hidden, weight), torch.float32), None]
    upstream = torch.stack([torch.ones(6), torch.zeros(6)])
    grads, certificate = logprob_grads(inputs, targets, upstream, 2.0**-8)
    assert certificate["dense_row_count"] >= 1
    assert grads[0][2].isnan().all() and grads[0][:2].isfinite().all() and grads[1].isnan().any()


def test_runs_and_second_backward_are_bitwise_equal():
    hidden, weight, targets = make_peaked(50, 800, 8.0, flat_rows=2)
    inputs = leaves((hidden, weight), torch.float32)
    results = []
    for _ in range(2):
        out = linear_logprob(*inputs, targets, grad_tol=2.0**-8, backend="torch")
        results += [torch.autograd.grad(out.logprob.sum(), inputs, retain_graph=True) for _ in range(2)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_certificate_merges_and_exists_for_every_backend():
    hidden, weight, targets = make_peaked(30, 600, 8.0, flat_rows=2)
    inputs = [*leaves((hidden, weight), torch.float32), None]
    parts = [loss_grads([inputs[0][rows], inputs[1], None], targets[rows], torch.ones(15), 2.0**-8)[1]
             for rows in (slice(0, 15), slice(15, 30))]  # fmt: skip
    merged = merge_metrics(parts)
    assert merged["grad_row_count"] == 30 and merged["dense_row_count"] >= 2
    assert merged["dropped_mass_max"] == max(part["dropped_mass_max"] for part in parts)
    assert merged["dropped_mass_sum"] == sum(part["dropped_mass_sum"] for part in parts)
    call = {"advantage": torch.ones(30), "weights": torch.ones(30)}
    for backend in ("torch", "reference"):
        plain = linear_tcopd_loss(*inputs[:2], targets, backend=backend, **call)[1]
        with_report = linear_tcopd_loss(*inputs[:2], targets, backend=backend, grad_tol=0.01, **call)[1]
        assert with_report.keys() - plain.keys() == KEYS and KEYS.isdisjoint(plain)
        assert with_report["grad_row_count"] == 30
    with torch.no_grad():
        metrics = linear_tcopd_loss(*inputs[:2], targets, grad_tol=0.01, backend="torch", **call)[1]
    assert metrics["grad_row_count"] == 0


@pytest.mark.parametrize("flat", [0, 60])
def test_memory_stays_bounded(monkeypatch, flat):
    """Kept probabilities are a share of a block's, whatever the distribution."""
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch, "BOUND_ROWS", 16)
    monkeypatch.setattr(_torch_compact, "BOUND_ROWS", 16)
    n, vocab = 60, 2000
    hidden, weight, targets = make_peaked(n, vocab, 8.0, flat_rows=flat)
    inputs = [hidden.requires_grad_(), weight, None]
    with Allocations() as seen:
        out = linear_logprob(hidden, weight, targets, grad_tol=2.0**-8, backend="torch")
        out.logprob.sum().backward()
        linear_tcopd_loss(
            hidden, weight, targets, advantage=torch.ones(n), weights=torch.ones(n), grad_tol=2.0**-8, backend="torch"
        )[0].backward()
    assert inputs[0].grad is not None and max(seen.sizes) <= 20_000 < n * vocab
