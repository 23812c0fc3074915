from __future__ import annotations

import pytest
import torch
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem
from tcopd_kernels import _torch, _torch_loss, contrastive_advantage, full_vocab_tcopd_loss

N, VOCAB = 19, 203


def make_models(dtype=torch.float64, n=N, vocab=VOCAB):
    """(hidden, weight, bias) of a student, a reference and two teachers, all of different width."""
    models = [make_problem(n, vocab, dim, seed)[:3] for seed, dim in enumerate((12, 7, 9, 16))]
    return [tuple(t.to(dtype) for t in model) for model in models]


def call_loss(models, lambdas, **options):
    student, ref, *teachers = models
    return full_vocab_tcopd_loss(
        student[0], student[1], ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], lambdas, **options
    )


def log_policy(model, temperature=1.0):
    return torch.log_softmax(model[0] @ model[1].T / temperature, -1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("normalizer", ["active", "count", "none"])
@pytest.mark.parametrize("lambdas", [[1.5, -0.5], [1.5, 0.0], [0.0, 0.0]])
def test_gradient_is_the_expectation_of_the_sampled_one(small_tiles, backend, normalizer, lambdas):
    """∇L = E_{y~π_θ}[−A(y) ∇log π_θ(y)], with A from contrastive_advantage for every token of the vocabulary."""
    models = make_models()
    student, ref, *teachers = models
    inputs = leaves(student[:2], torch.float64)
    weights = torch.rand(N, dtype=torch.float64)
    loss, metrics = call_loss(
        [(*inputs, None), *models[1:]], lambdas, weights=weights, normalizer=normalizer, backend=backend
    )
    grads = torch.autograd.grad(loss, inputs)

    log_p = log_policy((*inputs,))
    everything = [log_policy(m).reshape(-1) for m in (ref, *teachers)]
    advantage, _ = contrastive_advantage(
        log_p.detach().reshape(-1), everything[0], torch.stack(everything[1:]), lambdas, normalizer=normalizer
    )
    advantage = advantage.view(N, VOCAB)
    expected = -(weights.unsqueeze(1) * log_p.detach().exp() * advantage * log_p).sum()
    for grad, true in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(grad, true)
    per_token = -(log_p.exp() * advantage).sum(1)
    torch.testing.assert_close(loss, (weights * per_token).sum())
    torch.testing.assert_close(metrics["token_loss_sum"], per_token.sum().float())
    torch.testing.assert_close(metrics["entropy_sum"], -(log_p.exp() * log_p).sum().float())
    assert metrics["token_count"] == N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(small_tiles, dtype):
    models = make_models(dtype)
    weights = torch.rand(N) / N

    def run(function, dtype):
        cast = [tuple(t.to(dtype) for t in model) for model in models]
        inputs = leaves(cast[0], dtype)
        loss = function(
            [tuple(inputs), *cast[1:]], weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
        )
        return [loss, *torch.autograd.grad(loss, inputs)]

    def plain(cast, weights):
        logits = [torch.nn.functional.linear(*model) for model in cast]
        log_p = [torch.log_softmax(z if z.dtype == torch.float64 else z.float(), -1) for z in logits]
        target = 0.75 * log_p[2] - 0.25 * log_p[3] + 0.5 * log_p[1]
        return (weights * (log_p[0].exp() * (log_p[0] - target)).sum(1)).sum()

    def ours(cast, weights):
        biases = [model[2] for model in cast]
        return call_loss(
            cast, [1.5, -0.5], weights=weights, bias=biases[0], ref_bias=biases[1], teacher_biases=biases[2:]
        )[0]

    values = zip(run(ours, dtype), run(plain, dtype), run(plain, torch.float64), strict=True)
    for name, (value, torch_value, true) in zip(("loss", "hidden", "weight", "bias"), values, strict=True):
        assert_no_worse_than_torch(value.detach(), torch_value.detach(), true.detach(), name)


def test_gradcheck_with_softcaps_and_temperature(small_tiles):
    models = make_models(n=4, vocab=11)
    inputs = leaves(models[0], torch.float64)

    def function(hidden, weight, bias):
        return call_loss(
            [(hidden, weight), *models[1:]], [1.5, -0.5], weights=torch.ones(4, dtype=torch.float64), bias=bias,
            softcap=2.0, ref_softcap=3.0, teacher_softcaps=[None, 1.5], temperature=0.7,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs)
    for backend in ("torch", "reference"):
        loss, _ = call_loss(
            models, [1.5, -0.5], weights=torch.ones(4, dtype=torch.float64), bias=models[0][2],
            softcap=2.0, ref_softcap=3.0, teacher_softcaps=[None, 1.5], temperature=0.7, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, function(*inputs).detach())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_single_teacher_is_the_reverse_kl_and_needs_no_reference(backend):
    student, _, teacher, _ = make_models()
    inputs = leaves(student[:2], torch.float64)
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    loss, _ = full_vocab_tcopd_loss(
        *inputs, None, None, [teacher[0], None], [teacher[1], None], [1.0, 0.0], weights=weights, backend=backend
    )
    log_p, log_t = log_policy(student), log_policy(teacher)
    torch.testing.assert_close(loss.detach(), (log_p.exp() * (log_p - log_t)).sum(1).mean())
    with pytest.raises(ValueError, match="ref_hidden is None, but this model has a non-zero coefficient"):
        full_vocab_tcopd_loss(*inputs, None, None, [teacher[0]], [teacher[1]], [1.5], weights=weights)
    with pytest.raises(ValueError, match=r"teacher_hiddens\[1\] is None"):
        full_vocab_tcopd_loss(*inputs, None, None, [teacher[0], None], [teacher[1], None], [1.5, 0.5], weights=weights)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_loss_vanishes_at_the_target(backend):
    """A student equal to its only teacher has zero loss and zero gradient; a reference of weight 0 changes nothing."""
    student, ref, _, _ = make_models()
    inputs = leaves(student[:2], torch.float64)
    loss, _ = full_vocab_tcopd_loss(
        *inputs, ref[0], ref[1], [student[0]], [student[1]], [1.0], weights=torch.ones(N), backend=backend
    )
    torch.testing.assert_close(loss.item(), 0.0)
    for grad in torch.autograd.grad(loss, inputs):
        torch.testing.assert_close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_masked_rows_and_teachers_not_run_cannot_poison(small_tiles, backend):
    models = make_models()
    student, ref, *teachers = ([t.clone() for t in model] for model in models)
    weights = torch.rand(N, dtype=torch.float64)
    weights[4] = 0
    lambdas = torch.tensor([[1.5], [-0.5]], dtype=torch.float64).repeat(1, N)
    lambdas[1, ::3] = 0
    for model in (student, ref, *teachers):
        model[0][4] = float("nan")
    teachers[1][0][::3] = float("nan")
    inputs = leaves(student[:2], torch.float64)
    loss, metrics = call_loss([inputs, ref, *teachers], lambdas, weights=weights, backend=backend)
    grads = torch.autograd.grad(loss, inputs)
    assert metrics["token_count"] == N - 1
    clean = leaves(models[0][:2], torch.float64)
    expected, _ = call_loss([clean, *models[1:]], lambdas, weights=weights, backend="reference")
    torch.testing.assert_close(loss, expected)
    for grad, true in zip(grads, torch.autograd.grad(expected, clean), strict=True):
        torch.testing.assert_close(grad, true)


def test_padded_vocabularies_need_vocab_size():
    student, ref, teacher, other = make_models()
    padded = (teacher[0], torch.cat([teacher[1], torch.full((5, 9), float("nan"), dtype=torch.float64)]))
    weights = torch.ones(N)
    with pytest.raises(ValueError, match=r"teacher_weights\[0\] has 208 rows, but weight has 203; give vocab_size"):
        call_loss([student, ref, padded, other], [1.5, -0.5], weights=weights)
    loss, _ = call_loss([student, ref, padded, other], [1.5, -0.5], weights=weights, vocab_size=VOCAB)
    torch.testing.assert_close(loss, call_loss([student, ref, teacher, other], [1.5, -0.5], weights=weights)[0])


def test_second_backward_and_bounded_memory(monkeypatch):
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
    models = make_models(torch.float32, n=60, vocab=2000)
    hidden = models[0][0].requires_grad_()
    with Allocations() as seen:
        loss, _ = call_loss(models, [1.5, -0.5], weights=torch.full((60,), 1 / 60))
        first = torch.autograd.grad(3.0 * loss, hidden, retain_graph=True)[0]
    assert max(seen.sizes) <= 20_000 < 2000 * 12
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0] * 3.0, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambdas": [1.0]}, r"lambdas must have shape \[2\]"),
        ({"normalizer": "sum"}, "normalizer must be one of"),
        ({"weights": torch.ones(3)}, r"weights must have shape \[19\]"),
        ({"teacher_weights": []}, "teacher_weights must have 2 entries"),
        ({"teacher_biases": [None]}, "teacher_biases must have 2 entries"),
        ({"teacher_softcaps": [0.0, None]}, r"teacher_softcaps\[0\] must be in"),
        ({"teacher_hiddens": [torch.zeros(3, 9), torch.zeros(3, 16)]}, r"teacher_hiddens\[0\] has 3 rows"),
        ({"backend": "triton"}, "backend='triton' is not possible here: the tensors are on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    student, ref, *teachers = make_models(torch.float32)
    call = {
        "ref_hidden": ref[0], "ref_weight": ref[1], "teacher_hiddens": [t[0] for t in teachers],
        "teacher_weights": [t[1] for t in teachers], "lambdas": [1.5, -0.5], "weights": torch.ones(N), **change,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        full_vocab_tcopd_loss(student[0], student[1], **call)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_autocast_casts_every_model_and_gradients_keep_their_dtype(divergence):
    models = make_models(torch.float32)
    weights = torch.rand(N)
    halves = [tuple(t.bfloat16() for t in model[:2]) for model in models]

    def run(models):
        inputs = leaves(models[0][:2], models[0][0].dtype)
        loss, _ = call_loss([tuple(inputs), *models[1:]], [1.5, -0.5], weights=weights, divergence=divergence)
        return loss.detach(), torch.autograd.grad(loss, inputs)

    loss, grads = run(halves)
    with torch.autocast("cpu", torch.bfloat16):
        found_loss, found_grads = run(models)
    assert torch.equal(found_loss, loss)
    for found, half in zip(found_grads, grads, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, half.float())
