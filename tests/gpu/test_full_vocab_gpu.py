"""The full-vocabulary loss on a GPU: compiled mixture kernels and the torch backend with half-precision products."""

from __future__ import annotations

import pytest
import torch
from gpu_mode import DEVICE, DTYPES, GRAD_LIMIT, HALF, sized
from tcopd_kernels import full_vocab_tcopd_loss, topk_tcopd_loss

# N, V, and D of the student, the teachers and the reference
SHAPES = sized(
    [(1, 5, (8, 8, 8)), (13, 1000, (96, 72)), (200, 32003, (256, 136, 101, 64)), (515, 4099, (72, 64, 64, 8, 24))],
    [(1, 5, (8, 8, 8)), (13, 100, (40, 24)), (20, 131, (48, 29, 16, 8)), (35, 70, (24, 16, 16, 8, 24))],
)
HEADS: dict[str, dict] = {"plain": {}, "all": {"temperature": 0.7, "softcaps": (10.0, None, 8.0, 12.0, None)}}


def make_models(n, vocab, dims, dtype):
    """(hidden, weight, bias) of the student, the teachers and the reference."""
    gen = torch.Generator(DEVICE).manual_seed(n + vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, device=DEVICE)

    return [
        tuple(t.to(dtype) for t in (normal(n, dim), normal(vocab, dim) * 2 / dim**0.5, normal(vocab))) for dim in dims
    ]


def run(models, weights, backend, softcaps=(None,) * 5, **options):
    """[loss, gradients of hidden, weight, bias], metrics; λ = 1.4, −0.6, 0.3, without −0.6 in every third row."""
    student, *teachers, ref = models
    lambdas = torch.tensor([1.4, -0.6, 0.3], device=DEVICE)[: len(teachers)].unsqueeze(1).repeat(1, len(weights))
    lambdas[1:2, ::3] = 0
    inputs = [t.clone().requires_grad_() for t in student]
    loss, metrics = full_vocab_tcopd_loss(
        *inputs[:2], ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], lambdas,
        weights=weights, normalizer="none", bias=inputs[2], softcap=softcaps[0], ref_bias=ref[2],
        ref_softcap=softcaps[len(models) - 1], teacher_biases=[t[2] for t in teachers],
        teacher_softcaps=softcaps[1 : len(models) - 1], backend=backend, **options,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, inputs)], metrics


def assert_accurate(found, exact, dtype):
    """Loss to fp32 accuracy, gradients to twice the rounding of the input dtype."""
    for name, value, true in zip(("loss", "hidden", "weight", "bias"), found, exact, strict=True):
        error = ((value.double() - true).norm() / true.norm().clamp_min(1e-30)).item()
        limit = 1e-5 if name == "loss" else GRAD_LIMIT[dtype]
        assert error <= limit, f"{name}: relative error {error:.3g}"  # false for NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_matches_float64(shape, head, dtype, backend):
    models = make_models(*shape, dtype)
    weights = torch.rand(shape[0], device=DEVICE) / shape[0]
    wide = [tuple(t.double() for t in model) for model in models]
    exact, true_metrics = run(wide, weights.double(), "reference", **head)
    found, metrics = run(models, weights, backend, **head)
    assert_accurate(found, exact, dtype)
    for name, value in true_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_other_divergences_take_the_torch_backend(divergence):
    N, *_ = shape = sized((200, 4099, (72, 64, 40)), (20, 131, (24, 16, 8)))
    models = make_models(*shape, HALF)
    weights = torch.rand(N, device=DEVICE) / N
    wide = [tuple(t.double() for t in model) for model in models]
    exact, _ = run(wide, weights.double(), "reference", divergence=divergence)
    found, _ = run(models, weights, "auto", divergence=divergence)
    assert_accurate(found, exact, HALF)


def peaked_models(n, vocab, dim, dtype):
    student = make_models(n, vocab, (dim,), dtype)[0]
    bias = -3.0 * torch.arange(1, vocab + 1, device=DEVICE).log()
    gen = torch.Generator(DEVICE).manual_seed(0)

    def near(tensor):
        return (tensor + 0.05 * torch.randn(tensor.shape, generator=gen, device=DEVICE)).to(dtype)

    return [(near(student[0]), near(student[1]), near(bias)) for _ in range(3)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("hinted", [False, True])
def test_compaction_is_within_its_bound(bounds_in_proportion, backend, hinted):
    N, V, D = sized((700, 32003, 128), (20, 500, 16))
    models = peaked_models(N, V, D, HALF)
    weights = torch.rand(N, device=DEVICE)
    likely = (models[0][0].float() @ models[0][1].float().T + models[0][2].float()).argmax(1) if hinted else None
    exact, _ = run(models, weights, backend)
    found, metrics = run(models, weights, backend, grad_tol=1e-2, likely_tokens=likely)
    assert torch.equal(found[0], exact[0])
    assert metrics["dropped_grad_max"] <= 1e-2
    assert metrics["kept_column_sum"] < 0.5 * N * V
    error = (found[1].double() - exact[1].double()).norm(dim=1)
    bound = weights.double() * 1e-2 * models[0][1].double().norm(dim=1).max()
    assert (error <= bound + 2.0**-7 * exact[1].double().norm(dim=1)).all()


def test_repeats_are_bitwise_equal_and_masked_rows_cannot_poison():
    N, *_ = shape = sized((515, 4099, (72, 64, 40)), (35, 131, (24, 16, 8)))
    models = make_models(*shape, HALF)
    weights = torch.rand(N, device=DEVICE)
    weights[7] = 0
    for grad_tol in (0.0, 0.1):
        first, _ = run(models, weights, "triton", grad_tol=grad_tol)
        poisoned = [(hidden.clone(), weight, bias) for hidden, weight, bias in models]
        for hidden, _, _ in poisoned:
            hidden[7] = float("nan")
        again, _ = run(poisoned, weights, "triton", grad_tol=grad_tol)
        for value, repeated in zip(first, again, strict=True):
            assert torch.equal(value, repeated)


def test_no_logits_in_memory():
    """The kernels stay far below one [N, V] buffer in fp32; gradients and a workspace are all that is new."""
    n, vocab, dim = sized((2048, 65536, 256), (20, 131, 24))
    models = [(h, w, b) for h, w, b in make_models(n, vocab, (dim, dim, dim), HALF)]
    weights = torch.ones(n, device=DEVICE)
    run(models, weights, "triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(models, weights, "triton")
    used = torch.cuda.max_memory_allocated() - before
    workspace, gradients = 256 << 20, 4 * vocab * dim * 2 + 12 * n * dim
    assert used <= workspace + gradients + (32 << 20) < sized(4 * n * vocab, 1 << 30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(dtype):
    N, *_ = shape = sized((200, 4099, (72, 64, 40)), (20, 131, (24, 16, 8)))
    models = make_models(*shape, dtype)
    log_p = [torch.log_softmax(torch.nn.functional.linear(*(t.double() for t in m)), -1) for m in models]
    ids = log_p[1].topk(20, 1).indices
    teacher, ref = (log_p[k].gather(1, ids) for k in (1, 2))
    weights = torch.rand(N, device=DEVICE) / N

    def call(dtype, backend):
        inputs = [t.to(dtype).requires_grad_() for t in models[0]]
        loss, _ = topk_tcopd_loss(
            *inputs[:2], ids, ref, teacher.unsqueeze(0), [1.5], weights=weights, bias=inputs[2], backend=backend
        )
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    assert_accurate(call(dtype, "auto"), call(torch.float64, "reference"), dtype)
