"""The mixture kernels under Triton's interpreter, against float64 on materialised logits.

As in test_triton_interpreter.py the tests run in a process of their own, without bfloat16.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem
from tcopd_kernels import full_vocab_tcopd_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# N, V, and D of the student and of each frozen model
SHAPES = [(1, 5, (3, 2)), (17, 83, (16, 29, 7)), (33, 70, (20, 16, 8, 3)), (16, 48, (9, 9, 9, 9, 9))]
HEADS: dict[str, dict] = {
    "plain": {},
    "all": {"bias": True, "temperature": 0.7, "softcaps": (4.0, None, 3.0, 5.0, None)},
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def make_models(n, vocab, dims, dtype=torch.float32):
    """(hidden, weight, bias) of the student and of each frozen model, the reference last."""
    return [tuple(t.to(dtype) for t in make_problem(n, vocab, dim, seed)[:3]) for seed, dim in enumerate(dims)]


def lambdas_for(n_frozen, n):
    """[K, n] for K = n_frozen − 1 teachers: some rows without the second teacher, some without the reference."""
    lambdas = torch.tensor([1.4, -0.6, 0.3, 0.8])[: n_frozen - 1].unsqueeze(1).repeat(1, n)
    if n_frozen > 2:
        lambdas[1, ::3] = 0
    if n_frozen > 1:
        lambdas[:, 1::4] = 0
        lambdas[0, 1::4] = 1
    return lambdas


def run(models, weights, lambdas, *, bias=False, temperature=1.0, softcaps=(None,) * 5, **options):
    """[loss, gradients of hidden, weight, bias], metrics."""
    student, *teachers, ref = models
    inputs = leaves(student if bias else student[:2], student[0].dtype)
    biases = [model[2] if bias else None for model in models]
    loss, metrics = full_vocab_tcopd_loss(
        *inputs[:2], ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], lambdas,
        weights=weights, normalizer="none", temperature=temperature, bias=inputs[2] if bias else None,
        softcap=softcaps[0], ref_bias=biases[-1], ref_softcap=softcaps[len(models) - 1], teacher_biases=biases[1:-1],
        teacher_softcaps=softcaps[1 : len(models) - 1], **options,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, inputs)], metrics


def plain_torch(models, weights, lambdas, *, bias=False, temperature=1.0, softcaps=(None,) * 5):
    """What a user writes: heads in the input dtype, log_softmax in fp32 (or float64)."""
    inputs = leaves(models[0] if bias else models[0][:2], models[0][0].dtype)
    log_p = []
    for (hidden, weight, b), softcap in zip([(*inputs, None)[:3], *models[1:]], softcaps[: len(models)], strict=True):
        z = torch.nn.functional.linear(hidden, weight, b if bias else None)
        z = z if z.dtype == torch.float64 else z.float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p.append(torch.log_softmax(z / temperature, -1))
    a = lambdas.to(log_p[0].dtype)
    target = sum(a[k].unsqueeze(1) * log_p[1 + k] for k in range(len(a))) + (1 - a.sum(0)).unsqueeze(1) * log_p[-1]
    loss = (weights.to(a.dtype) * (log_p[0].exp() * (log_p[0] - target)).sum(1)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def widened(models):
    return [tuple(t.double() for t in model) for model in models]


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


# numpy warns about the products with infinity that the kernels select away.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def small_workspace(self, monkeypatch):
        """Chunks and splits of a few tiles each, and workspaces that hold NaN until they are written."""
        from tcopd_kernels import _triton_full_vocab

        monkeypatch.setattr(_triton_full_vocab, "WORKSPACE_BYTES", 0)
        monkeypatch.setattr(_triton_full_vocab, "MIN_CHUNK", 48)
        monkeypatch.setattr(_triton_full_vocab, "device_limits", lambda device: (80, 1, 1 << 30))  # few splits
        monkeypatch.setattr(torch, "empty", poisoned(torch.empty))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
    def test_error_is_at_most_twice_that_of_torch(self, shape, head, dtype):
        n, vocab, dims = shape
        models = make_models(n, vocab, dims, dtype)
        lambdas = lambdas_for(len(dims) - 1, n)
        weights = torch.rand(n) / n
        found, metrics = run(models, weights, lambdas, backend="triton", **head)
        same = plain_torch(models, weights, lambdas, **head)
        true = plain_torch(widened(models), weights, lambdas, **head)
        names = ("loss", "hidden", "weight", "bias")
        for name, value, torch_value, exact in zip(names, found, same, true, strict=False):
            assert_no_worse_than_torch(value, torch_value, exact, name)
        reference = run(widened(models), weights.double(), lambdas, backend="reference", **head)[1]
        for name, value in reference.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-4)

    def test_masked_rows_and_models_not_run_cannot_poison(self):
        models = make_models(19, 83, (12, 7, 9, 16))
        lambdas = lambdas_for(3, 19)
        weights = torch.rand(19)
        weights[4] = 0
        expected, _ = run(models, weights, lambdas, backend="triton")
        for hidden, _, _ in models:
            hidden[4] = float("nan")
        models[2][0][::3] = float("inf")  # the second teacher, where its λ is 0
        models[3][0][1::4] = float("nan")  # the reference, where it drops out
        found, metrics = run(models, weights, lambdas, backend="triton")
        assert metrics["token_count"] == 18
        for value, clean in zip(found, expected, strict=True):
            assert torch.equal(value, clean)

    @pytest.mark.parametrize("shift", [-1e3, 1e4])
    def test_far_logits(self, shift):
        """All logits moved by a bias, and one row that is one-hot."""
        models = make_models(19, 83, (12, 7, 9, 16))
        models[0][0][0] *= 200
        lambdas, weights = lambdas_for(3, 19), torch.ones(19)
        moved = [(h, w, torch.full_like(b, shift)) for h, w, b in models]
        found, _ = run(moved, weights, lambdas, bias=True, backend="triton")
        same = plain_torch(moved, weights, lambdas, bias=True)
        true = plain_torch(widened(moved), weights, lambdas, bias=True)
        names = ("loss", "hidden", "weight", "bias")
        for name, value, torch_value, exact in zip(names, found, same, true, strict=True):
            assert_no_worse_than_torch(value, torch_value, exact, name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("hinted", [False, True])
    @pytest.mark.parametrize("grad_tol", [0.02, 0.3])
    def test_compaction_is_within_its_bound(self, dtype, hinted, grad_tol):
        from test_full_vocab_grad_tol import assert_within_bounds, peaked_models

        models = peaked_models(n=18, vocab=150, dim=8, dtype=dtype)
        models = [models[0], models[2], models[3], models[1]]
        lambdas, weights = lambdas_for(3, 18), torch.rand(18) / 18
        weights[5] = 0
        exact, _ = run(models, weights, lambdas, bias=True, backend="triton")
        likely = (models[0][0].float() @ models[0][1].float().T + models[0][2].float()).argmax(1) if hinted else None
        if likely is not None:
            likely[3] = -100
        found, metrics = run(
            models, weights, lambdas, bias=True, backend="triton", grad_tol=grad_tol, likely_tokens=likely
        )
        assert torch.equal(found[0], exact[0])
        rounding = 2e-6 if dtype == torch.float32 else 2e-3
        assert_within_bounds(models, weights, exact[1:], found[1:], grad_tol, rounding)
        assert metrics["grad_row_count"] == 17
        assert metrics["dropped_grad_max"] <= grad_tol
        if grad_tol > 0.1:
            assert metrics["dense_row_count"] < 9
            assert metrics["kept_column_sum"] < 0.7 * 17 * 150

    def test_certificate_bounds_what_was_dropped(self):
        from test_full_vocab_grad_tol import peaked_models

        models = peaked_models(n=1, vocab=300, dim=8)
        lambdas, ones = lambdas_for(3, 1), torch.ones(1)
        exact, _ = run(models, ones, lambdas, bias=True, backend="triton")
        found, metrics = run(models, ones, lambdas, bias=True, backend="triton", grad_tol=0.3)
        dropped = found[3] == 0  # the bias gradient of one row is dL/dx
        assert 0 < dropped.sum() == 300 - metrics["kept_column_sum"]
        p = torch.softmax(models[0][0] @ models[0][1].T + models[0][2], 1)[0]
        torch.testing.assert_close(metrics["dropped_mass_sum"], p[dropped].sum(), rtol=1e-3, atol=1e-6)
        assert exact[3][dropped].abs().sum() <= metrics["dropped_grad_sum"] * (1 + 1e-4)

    def test_only_the_needed_gradients(self):
        models = make_models(9, 60, (12, 7, 9, 16))
        lambdas, weights = lambdas_for(3, 9), torch.rand(9)
        every, _ = run(models, weights, lambdas, backend="triton")
        for index, chosen in enumerate(("hidden", "weight")):
            inputs = [t.clone().requires_grad_(name == chosen) for name, t in zip(("hidden", "weight"), models[0][:2])]
            ref, teachers = models[3], models[1:3]
            for grad_tol in (0.0, 1e-3):
                loss, _ = full_vocab_tcopd_loss(
                    *inputs, ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], lambdas,
                    weights=weights, normalizer="none", backend="triton", grad_tol=grad_tol,
                )  # fmt: skip
                (grad,) = torch.autograd.grad(loss, inputs[index])
                torch.testing.assert_close(grad, every[1 + index], rtol=0, atol=0 if grad_tol == 0 else 1e-2)

    def test_row_terms(self):
        """What the backward and the certificate build on: mean and variance of log π_θ − Σ_j a_j log π_j."""
        from tcopd_kernels._torch_full_vocab import Head
        from tcopd_kernels._triton_full_vocab import Models, forward

        models = make_models(19, 150, (12, 7, 9, 16))
        lambdas = lambdas_for(3, 19)
        a = torch.cat([lambdas, 1 - lambdas.sum(0, keepdim=True)])
        terms, bounds = forward(
            Models([Head(h, w, None, None) for h, w, _ in models], a, 0.6), torch.full((19,), float("-inf"))
        )
        log_p, *others = (torch.log_softmax(h @ w.T / 0.6, 1) for h, w, _ in widened(models))
        d = log_p - sum(row.double().unsqueeze(1) * other for row, other in zip(a, others, strict=True))
        mean = (log_p.exp() * d).sum(1)
        torch.testing.assert_close(terms.loss.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            terms.variance.double(), (log_p.exp() * (d - mean.unsqueeze(1)).square()).sum(1), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(terms.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)
        largest = torch.stack([part.amax(0) for part in log_p.exp().split(16)])
        assert (bounds >= largest * (1 - 1e-5)).all()

    def test_repeats_are_bitwise_equal_and_no_logits_exist(self):
        models = make_models(64, 256, (6, 6, 6))
        lambdas, weights = lambdas_for(2, 64), torch.rand(64)
        with Allocations() as seen:
            first, _ = run(models, weights, lambdas, backend="triton")
        # The interpreter copies its operands, the workspace [64, 48] among them, as bytes.
        assert max(seen.sizes) <= 4 * 64 * 48 < 64 * 256
        again, _ = run(models, weights, lambdas, backend="triton")
        for value, repeated in zip(first, again, strict=True):
            assert torch.equal(value, repeated)

    def test_strided_operands(self):
        models = make_models(19, 83, (12, 7, 9, 16))
        lambdas, weights = lambdas_for(3, 19), torch.rand(19)
        expected, _ = run(models, weights, lambdas, backend="triton")
        strided = [
            (torch.cat([h, h], 1)[:, : h.shape[1]], w.T.contiguous().T, b.repeat(2)[::2].copy_(b)) for h, w, b in models
        ]
        found, _ = run(strided, weights, lambdas, backend="triton")
        for value, true in zip(found, expected, strict=True):
            assert torch.equal(value, true)

    def test_too_many_models_and_mixed_dtypes(self):
        models = make_models(5, 20, (4,) * 6)
        lambdas, weights = torch.ones(4, 5), torch.ones(5)
        expected, _ = run(models, weights, lambdas, backend="torch", softcaps=(None,) * 6)
        with pytest.raises(ValueError, match="its kernel takes at most 4 frozen models, got 5"):
            run(models, weights, lambdas, backend="triton", softcaps=(None,) * 6)
        found, _ = run(models, weights, lambdas, backend="auto", softcaps=(None,) * 6)
        assert torch.equal(found[0], expected[0])
        mixed = [models[0], tuple(t.half() for t in models[1]), models[2]]
        with pytest.raises(ValueError, match=r"all models in one dtype, got torch.float16, torch.float32"):
            run(mixed, weights, torch.full((1, 5), 0.5), backend="triton")

    def test_no_rows(self):
        models = make_models(5, 20, (4, 4, 4))
        for grad_tol in (0.0, 0.1):
            found, metrics = run(models, torch.zeros(5), torch.full((1, 5), 0.5), backend="triton", grad_tol=grad_tol)
            assert all((value == 0).all() for value in found)
            assert metrics["token_count"] == 0
