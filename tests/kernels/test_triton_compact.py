"""Certified vocabulary compaction on Triton, under Triton's interpreter: bounds, certificate, shards, determinism.

As in test_triton_interpreter.py the tests run in a process of their own, where Triton is interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import leaves, make_problem, plain_logprob
from tcopd_kernels import linear_logprob
from tcopd_kernels._backend import load_backend
from tcopd_kernels._torch_grads import Needs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = load_backend("triton")
ALL = Needs(True, True, True)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, blocks of 16 rows (the interpreter's tile), pieces of few columns."""
    from tcopd_kernels import _triton_compact, _triton_forward

    monkeypatch.setattr(_triton_forward, "BOUND_ROWS", 16)
    # One program per row block: with so few columns a split would hold too little to bound a flat row by.
    monkeypatch.setattr(_triton_forward, "vocab_splits", lambda row_blocks, tiles, processors: (1, tiles))
    for name, value in {"MOST_ROWS": 24, "LEAST_ROWS": 1, "LEAST_COLUMNS": 40, "WORKSPACE_BYTES": 1 << 14}.items():
        monkeypatch.setattr(_triton_compact, name, value)


def make_peaked(n, vocab, dim=32, sharpness=10.0, flat_rows=0, seed=0):
    """Rows with a Zipf-like prior over token ids and `sharpness` nats more for the target; the last ones are flat."""
    generator = torch.Generator().manual_seed(seed)
    prior = torch.arange(1, vocab + 1).log()
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    weight[:, 0] = -prior / 4
    targets = torch.multinomial((-1.5 * prior).exp(), n, replacement=True, generator=generator)
    hidden = 0.05 * torch.randn(n, dim, generator=generator) + sharpness * weight[targets]
    hidden[:, 0] = 8.0
    if flat_rows:
        hidden[-flat_rows:] *= 0.01
    return hidden, weight, targets, 0.1 * torch.randn(vocab, generator=generator)


def compact(hidden, weight, targets, upstream, grad_tol, *, bias=None, temperature=1.0, softcap=None, needs=ALL):
    """(gradients, certificate) of Σ upstream[0]·logprob + upstream[1]·lse, through the backend's own functions."""
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    bounds = TRITON.new_bounds(len(hidden), weight)
    _, lse, _ = TRITON.forward(hidden, weight, targets, entropy=False, bounds=bounds, **head)
    return TRITON.compact_backward(
        hidden, weight, targets, lse, *upstream, needs=needs, grad_tol=grad_tol, bounds=bounds,
        blocks=torch.arange(len(hidden)) // TRITON.BOUND_ROWS, **head,
    )  # fmt: skip


def exact64(hidden, weight, targets, upstream, *, bias=None, temperature=1.0, softcap=None):
    """Gradients in float64 of what `compact` differentiates, and the probabilities [n, vocab]."""
    inputs = leaves((hidden, weight, bias), torch.float64)
    logprob, lse, _ = plain_logprob(inputs[0], inputs[1], targets, inputs[2], temperature, softcap)
    value = (upstream[0].double() * logprob + upstream[1].double() * lse).sum()
    z = inputs[0] @ inputs[1].T if inputs[2] is None else torch.nn.functional.linear(*inputs)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = torch.softmax(z.detach() / temperature, 1)
    return torch.autograd.grad(value, [t for t in inputs if t is not None]), p


def assert_within_certificate(found, exact, hidden, weight, upstream, certificate, grad_tol, temperature=1.0):
    """True error ≤ certified bound, plus the rounding of the dtype."""
    r = certificate["dropped_mass_max"].item()
    assert 0 <= r <= grad_tol
    c = (upstream[1] - upstream[0]).abs().double() / temperature
    longest, lengths = weight.double().norm(dim=1).max(), hidden.double().norm(dim=1)
    eps = torch.finfo(hidden.dtype).eps
    r = r + 4e-6 + 2 * eps
    error = [(a.double() - b).abs() for a, b in zip(found, exact, strict=False)]
    assert (error[0].norm(dim=1) <= c * r * longest + eps * exact[0].norm(dim=1)).all()
    assert error[1].norm() <= (c * r * lengths).sum() + eps * exact[1].norm()
    if len(exact) > 2:
        assert error[2].sum() <= (c * r).sum() + 4 * eps * exact[2].abs().sum()


def upstream_of(n, size=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(2, n, generator=generator)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("block", [16, 32])
    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.6, "bias": True}, {"softcap": 5.0}, {"level": -1e3, "bias": True}],
        ids=["plain", "temperature", "softcap", "low"],
    )
    def test_bounds_are_above_every_probability_and_no_vacuous_ones(self, monkeypatch, block, options):
        from tcopd_kernels import _triton_forward

        monkeypatch.setattr(_triton_forward, "BOUND_ROWS", block)
        monkeypatch.setattr(torch, "empty", _poisoned_empty)
        hidden, weight, targets, bias = make_peaked(41, 131)
        targets[5], targets[20] = -3, 131  # of other shards
        bias = bias + options.get("level", 0.0) if options.get("bias") else None
        head = {"temperature": options.get("temperature", 1.0), "softcap": options.get("softcap")}
        bounds = TRITON.new_bounds(41, weight)
        plain = TRITON.forward(hidden, weight, targets, bias=bias, entropy=False, **head)
        found = TRITON.forward(hidden, weight, targets, bias=bias, entropy=False, bounds=bounds, **head)
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], found[:2], strict=True))
        zeros = torch.zeros(2, 41)
        _, p = exact64(hidden, weight, targets.clamp(0, 130), zeros, bias=bias, **head)
        blocks = list(p.split(block))
        assert bounds.shape == (len(blocks), 131)
        for bound, block_p in zip(bounds, blocks, strict=True):
            assert (bound >= block_p.amax(0) * (1 - 1e-4)).all() and (bound <= 1.001).all()
        assert bounds.double().mean() < 0.3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "head",
        [{}, {"bias": True, "temperature": 0.7}, {"bias": True, "softcap": 14.0, "temperature": 0.9}],
        ids=["plain", "bias", "softcap"],
    )
    def test_error_is_within_the_certificate(self, small_chunks, dtype, head):
        head = dict(head)
        hidden, weight, targets, bias = make_peaked(45, 601, flat_rows=3)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        head["bias"] = bias.to(dtype) if head.pop("bias", False) else None
        upstream = upstream_of(45)
        exact, _ = exact64(hidden, weight, targets, upstream, **head)
        for grad_tol in (2.0**-3, 2.0**-5) if dtype == torch.float32 else (2.0**-5,):
            found, certificate = compact(hidden, weight, targets, upstream, grad_tol, **head)
            assert 3 <= certificate["dense_row_count"] < 45 == certificate["grad_row_count"]
            assert certificate["kept_column_sum"] < 45 * 601 / 2
            assert certificate["dropped_mass_max"] > 0
            temperature = head.get("temperature", 1.0)
            assert_within_certificate(found, exact, hidden, weight, upstream, certificate, grad_tol, temperature)
            assert all(g is None or g.dtype == dtype for g in found)

    def test_mass_and_gradients_are_those_of_the_kept_columns(self, small_chunks, monkeypatch):
        """One chunk and one band: all rows keep the same columns, and some are over the tolerance all the same."""
        from tcopd_kernels import _triton_compact as module

        n, vocab, grad_tol = 24, 601, 0.03
        hidden, weight, targets, bias = make_peaked(n, vocab)
        upstream, kept = upstream_of(n), torch.zeros(vocab, dtype=torch.bool)
        add = module.ColumnGradients.add

        def spy(self, piece, h, within):
            assert not kept[piece.columns].any()
            kept[piece.columns] = True
            add(self, piece, h, within)

        monkeypatch.setattr(module, "BAND_THRESHOLDS", (2.0**-3,))
        monkeypatch.setattr(module.ColumnGradients, "add", spy)
        found, certificate = compact(hidden, weight, targets, upstream, grad_tol, bias=bias)
        _, p = exact64(hidden, weight, targets, upstream, bias=bias)
        r = p[:, ~kept].sum(1)
        within = r <= grad_tol
        assert kept[targets].all() and kept.sum() < vocab / 4
        assert 2 <= certificate["dense_row_count"] == n - within.sum() < n / 2
        assert certificate["kept_column_sum"] == kept.sum() * within.sum() + vocab * (~within).sum()
        torch.testing.assert_close(certificate["dropped_mass_sum"], r[within].sum().float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(certificate["dropped_mass_max"], r[within].max().float(), rtol=1e-4, atol=1e-6)
        dz = p * (upstream[1] - upstream[0]).double()[:, None]
        dz.scatter_add_(1, targets[:, None], upstream[0].double()[:, None])
        dz[within] *= kept
        for grad, expected in zip(found, (dz @ weight.double(), dz.T @ hidden.double(), dz.sum(0)), strict=True):
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)

    def test_dropped_columns_have_exactly_zero_weight_gradient(self, small_chunks):
        hidden, weight, targets, _ = make_peaked(20, 601)
        found, certificate = compact(hidden, weight, targets, upstream_of(20), 0.06)
        zero = (found[1] == 0).all(1)
        assert certificate["dense_row_count"] == 0 and 300 < zero.sum() < 601 and not zero[targets].any()

    def test_rows_over_the_tolerance_are_exact(self, small_chunks):
        hidden, weight, targets, bias = make_peaked(20, 301, flat_rows=20)
        upstream = upstream_of(20)
        found, certificate = compact(hidden, weight, targets, upstream, 2.0**-8, bias=bias)
        assert certificate["dense_row_count"] == 20 and certificate["kept_column_sum"] == 20 * 301
        _, lse, _ = TRITON.forward(hidden, weight, targets, bias=bias, temperature=1.0, softcap=None, entropy=False)
        exact = TRITON.backward(
            hidden, weight, targets, lse, None, *upstream, None, bias=bias, temperature=1.0, softcap=None,
            need_hidden=True, need_weight=True, need_bias=True,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))

    def test_tolerance_above_one_still_keeps_the_targets(self, small_chunks):
        hidden, weight, targets, _ = make_peaked(30, 601)
        found, certificate = compact(hidden, weight, targets, upstream_of(30), 8.0)
        assert certificate["dense_row_count"] == 0 and (found[1][targets] != 0).any(1).all()
        assert certificate["kept_column_sum"] < 30 * 601 / 8

    def test_only_the_needed_gradients(self, small_chunks):
        hidden, weight, targets, bias = make_peaked(30, 301, flat_rows=2)
        upstream = upstream_of(30)
        every, _ = compact(hidden, weight, targets, upstream, 2.0**-6, bias=bias)
        for needs in (Needs(True, False, False), Needs(False, True, False), Needs(False, False, True)):
            found, _ = compact(hidden, weight, targets, upstream, 2.0**-6, bias=bias, needs=needs)
            for grad, whole, need in zip(found, every, needs, strict=True):
                assert torch.equal(grad, whole) if need else grad is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_stale_memory_is_never_read_and_runs_agree_bitwise(self, small_chunks, monkeypatch, dtype):
        hidden, weight, targets, bias = make_peaked(30, 401, flat_rows=2)
        inputs = (hidden.to(dtype), weight.to(dtype), targets, upstream_of(30), 2.0**-6)
        clean, report = compact(*inputs, bias=bias.to(dtype))
        monkeypatch.setattr(torch, "empty", _poisoned_empty)
        stained, stained_report = compact(*inputs, bias=bias.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(clean, stained, strict=True))
        assert all(torch.equal(report[name], stained_report[name]) for name in report)

    @pytest.mark.parametrize("size", [1e-8, 1.0])
    def test_float16_upstream_of_any_size(self, small_chunks, size):
        hidden, weight, targets, _ = make_peaked(40, 401, flat_rows=2)
        hidden, weight = hidden.half(), weight.half()
        upstream = upstream_of(40, size)
        found, certificate = compact(hidden * 64, weight / 64, targets, upstream, 2.0**-6)
        exact, _ = exact64(hidden * 64, weight / 64, targets, upstream)
        assert certificate["dense_row_count"] < 40
        assert (found[1] - exact[1]).norm() <= 0.02 * exact[1].norm()

    def test_extreme_logits(self, small_chunks):
        hidden, weight, targets, bias = make_peaked(24, 301)
        upstream = upstream_of(24)
        for level, scale in ((-1e4, 1.0), (1e4, 1.0), (0.0, 1e3)):
            head = {"bias": bias + level}
            exact, _ = exact64(hidden * scale, weight, targets, upstream, **head)
            found, certificate = compact(hidden * scale, weight, targets, upstream, 2.0**-5, **head)
            # lse carries the rounding of 1e4, and p with it.
            certificate["dropped_mass_max"] += 1e-3
            assert_within_certificate(found, exact, hidden * scale, weight, upstream, certificate, 2.0**-4)

    def test_columns_with_minus_infinite_bias(self, small_chunks):
        hidden, weight, targets, bias = make_peaked(20, 601)
        bias[300:] = float("-inf")
        found, _ = compact(hidden, weight, targets, upstream_of(20), 2.0**-7, bias=bias)
        rest, _ = exact64(hidden, weight[:300], targets, upstream_of(20), bias=bias[:300])
        assert not found[1][300:].any() and not found[2][300:].any()
        assert (found[0] - rest[0]).norm() < 0.01 * rest[0].norm()

    def test_nan_is_not_dropped(self, small_chunks):
        hidden, weight, targets, _ = make_peaked(20, 301)
        hidden[3] = float("nan")
        found, certificate = compact(hidden, weight, targets, upstream_of(20), 2.0**-6)
        assert certificate["dense_row_count"] >= 1
        assert found[0][3].isnan().all() and found[0][:3].isfinite().all() and found[1].isnan().any()

    def test_shards_add_up(self, small_chunks):
        """Each shard leaves out at most its tolerance of the whole row, and the parts of dH add up."""
        hidden, weight, targets, _ = make_peaked(40, 301, flat_rows=2)
        upstream = upstream_of(40)
        exact, p = exact64(hidden, weight, targets, upstream)
        lse = torch.logsumexp(hidden @ weight.T, 1)
        total, grad_tol = torch.zeros(40, 32, dtype=torch.float64), 2.0**-6
        for start, stop in ((0, 60), (60, 250), (250, 301)):
            part, local = weight[start:stop], targets - start
            bounds = TRITON.new_bounds(40, part)
            partials = TRITON.partials(
                hidden, part, local, bias=None, temperature=1.0, softcap=None, entropy=False, bounds=bounds
            )
            outside = (local < 0) | (local >= stop - start)
            assert (partials.target_logit[outside] == 0).all() and not (partials.target_logit[~outside] == 0).any()
            mass = torch.exp(partials.max - lse) * partials.sum
            torch.testing.assert_close(mass.double(), p[:, start:stop].sum(1), rtol=1e-5, atol=1e-6)
            kept_mass = mass.clone()
            found, certificate = TRITON.compact_backward(
                hidden, part, local, lse, *upstream, bias=None, temperature=1.0, softcap=None, needs=ALL,
                grad_tol=grad_tol / 3, bounds=bounds, blocks=torch.arange(40) // TRITON.BOUND_ROWS, mass=mass,
            )  # fmt: skip
            assert torch.equal(mass, kept_mass), "the caller's mass was overwritten"
            assert 0 <= certificate["dropped_mass_max"] <= grad_tol / 3
            total += found[0]
            error = (found[1] - exact[1][start:stop]).norm()
            c = (upstream[1] - upstream[0]).abs()
            assert error <= (c * grad_tol / 3 * hidden.norm(dim=1)).sum() + 1e-4
        bound = c * grad_tol * weight.norm(dim=1).max()
        assert ((total - exact[0]).norm(dim=1) <= bound + 1e-5).all()

    def test_rows_without_gradient_keep_their_own_block(self, small_chunks):
        """Through the public function: ignored rows and rows without gradient shift the others against their blocks."""
        hidden, weight, targets, _ = make_peaked(50, 601)
        targets[::7] = -100
        upstream = upstream_of(50)[0] * (torch.arange(50) % 3 > 0)
        results = []
        for backend, grad_tol in (("triton", 2.0**-7), ("torch", 0.0)):
            inputs, certificate = leaves((hidden, weight), torch.float32), {}
            out = linear_logprob(*inputs, targets, grad_tol=grad_tol, backend=backend, certificate=certificate)
            results.append(torch.autograd.grad((upstream * out.logprob).sum(), inputs))
            assert certificate["grad_row_count"] == ((targets != -100) & (upstream != 0)).sum()
        bound = upstream.abs() * 2.0**-7 * weight.norm(dim=1).max()
        assert ((results[0][0] - results[1][0]).norm(dim=1) <= bound + 1e-5).all()
        assert not torch.equal(results[0][1], results[1][1])

    def test_no_rows(self):
        _, weight, _, bias = make_problem(0, 50, 8)
        found, certificate = compact(
            torch.zeros(0, 8), weight, torch.zeros(0).long(), torch.zeros(2, 0), 0.1, bias=bias
        )
        assert found[0].shape == (0, 8) and not found[1].any() and not found[2].any()
        assert certificate["grad_row_count"] == 0

    @pytest.mark.parametrize("V, itemsize", [(50, 4), (50257, 2), (151936, 2), (262144, 4)])
    def test_chunks_fit_their_workspace(self, V, itemsize):
        from tcopd_kernels import _triton_compact as c

        rows = c.chunk_rows(V, itemsize)
        assert c.LEAST_ROWS <= rows <= c.MOST_ROWS
        columns = int(c.GIVE_UP_SHARE * V)
        assert rows * columns * itemsize <= max(c.WORKSPACE_BYTES, c.LEAST_ROWS * columns * itemsize)


_empty = torch.empty


def _poisoned_empty(*args, **kwargs):
    tensor = _empty(*args, **kwargs)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor
