from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem
from tcopd_kernels import _torch, _torch_loss, full_vocab_tcopd_loss, topk_tcopd_loss

N, VOCAB, M = 17, 203, 9
DIVERGENCES = ("reverse_kl", "forward_kl")


def make_models(n=N, vocab=VOCAB, dtype=torch.float64):
    """(hidden, weight, bias) of a student, a reference and two teachers."""
    models = [make_problem(n, vocab, dim, seed)[:3] for seed, dim in enumerate((12, 7, 9, 16))]
    return [tuple(t.to(dtype) for t in model) for model in models]


def log_policies(models):
    return [torch.log_softmax(hidden.double() @ weight.double().T, -1) for hidden, weight, _ in models]


def make_case(n=N, vocab=VOCAB, m=M, dtype=torch.float64, padded=True):
    """Student head, ids [n, m] that mix likely and random tokens, reference [n, m] and teachers [2, n, m]."""
    models = make_models(n, vocab, dtype)
    policies = log_policies(models)
    generator = torch.Generator().manual_seed(5)
    order = policies[2] + torch.rand(n, vocab, generator=generator).double() * 4
    ids = order.topk(m, 1).indices
    known = torch.stack([policy.gather(1, ids) for policy in policies[1:]])
    if padded:
        ids[1] = -1
        ids[2, 3:] = -1
        ids[3, 0] = -1
        known[:, ids < 0] = float("nan")
    return models[0], ids, known[0].to(dtype), known[1:].to(dtype)


def run(function, head, weights):
    inputs = leaves(head, head[0].dtype)
    out = function(*inputs)
    loss = out[0] if isinstance(out, tuple) else out
    return [loss.detach(), *torch.autograd.grad(loss, inputs)], out


def dense_definition(head, ids, ref, teachers, coefficients, divergence, floor=1e-6, **head_options):
    """[N] losses from the definition, with the tail summed token by token."""
    z = torch.nn.functional.linear(*head)
    z = z if z.dtype == torch.float64 else z.float()
    softcap, temperature = head_options.get("softcap"), head_options.get("temperature", 1.0)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = torch.log_softmax(z, -1)
    losses = []
    for n in range(len(z)):
        s = ids[n][ids[n] >= 0]
        outside = torch.ones(z.shape[1], dtype=torch.bool).index_fill_(0, s, False)
        tail = log_p[n][outside].exp().sum().clamp(min=floor)
        log_p_coarse = torch.cat([log_p[n][s], tail.log().view(1)])
        t = 0
        for a, model in zip(coefficients, (ref, *teachers), strict=True):
            known = model[n][ids[n] >= 0].to(z.dtype)
            t = t + a * torch.cat([known, (1 - known.exp().sum()).clamp(min=floor).log().view(1)])
        if divergence == "reverse_kl":
            losses.append((log_p_coarse.exp() * (log_p_coarse - t)).sum())
        else:
            log_q = torch.log_softmax(t, 0)
            losses.append((log_q.exp() * (log_q - log_p_coarse)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=["plain", "softcap"])
def test_matches_the_definition(small_tiles, backend, divergence, options):
    head, ids, ref, teachers = make_case()
    weights = torch.rand(N, dtype=torch.float64) / N

    def ours(hidden, weight, bias):
        return topk_tcopd_loss(
            hidden, weight, ids, ref, teachers, [1.5, -0.5], weights=weights, bias=bias, divergence=divergence,
            backend=backend, **options,
        )  # fmt: skip

    def definition(*head):
        return (weights * dense_definition(head, ids, ref, teachers, [0.5, 0.75, -0.25], divergence, **options)).sum()

    found, (_, metrics) = run(ours, head, weights)
    expected, _ = run(definition, head, weights)
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value, true)
    losses = dense_definition(head, ids, ref, teachers, [0.5, 0.75, -0.25], divergence, **options)
    torch.testing.assert_close(metrics["token_loss_sum"], losses.sum().float())
    assert metrics["token_count"] == N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_error_is_at_most_twice_that_of_torch(small_tiles, dtype, divergence):
    head, ids, ref, teachers = make_case(dtype=dtype)
    ref, teachers = ref.float(), teachers.float()
    weights = torch.rand(N) / N

    def ours(hidden, weight, bias):
        return topk_tcopd_loss(
            hidden, weight, ids, ref, teachers, [1.5, -0.5], weights=weights, bias=bias, divergence=divergence
        )[0]

    def plain(*head):
        losses = dense_definition(head, ids, ref, teachers, [0.5, 0.75, -0.25], divergence)
        return (weights.to(losses.dtype) * losses).sum()

    wide = [t.double() for t in head]
    values = zip(*(run(f, h, weights)[0] for f, h in ((ours, head), (plain, head), (plain, wide))), strict=True)
    for name, (value, torch_value, true) in zip(("loss", "hidden", "weight", "bias"), values, strict=True):
        assert_no_worse_than_torch(value, torch_value, true, name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("lambdas", [[1.0, 0.0], [1.5, -0.5]])
def test_all_tokens_give_the_full_form(small_tiles, divergence, lambdas):
    """With S = V the tail is empty."""
    models = make_models(n=6, vocab=50)
    everything = torch.stack(log_policies(models))[1:]
    ids = torch.stack([torch.randperm(50) for _ in range(6)])
    known = everything.gather(2, ids.expand(3, -1, -1))
    weights = torch.rand(6, dtype=torch.float64)

    def coarse(hidden, weight):
        return topk_tcopd_loss(
            hidden, weight, ids, known[0], known[1:], lambdas, weights=weights, divergence=divergence,
            tail_floor=1e-14,
        )  # fmt: skip

    def full(hidden, weight):
        ref, *teachers = models[1:]
        return full_vocab_tcopd_loss(
            hidden, weight, ref[0], ref[1], [t[0] for t in teachers], [t[1] for t in teachers], lambdas,
            weights=weights, divergence=divergence,
        )  # fmt: skip

    found, (_, metrics) = run(coarse, models[0][:2], weights)
    for value, true in zip(found, run(full, models[0][:2], weights)[0], strict=True):
        torch.testing.assert_close(value, true, rtol=1e-6, atol=1e-10)
    assert metrics["tail_mass_max"] < 1e-6


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_one_teacher_bounds_the_full_divergence_from_below(m, seed):
    """Data processing; and one more token never lowers the bound."""
    generator = torch.Generator().manual_seed(seed)
    log_p, log_t = (torch.log_softmax(torch.randn(3, 41, generator=generator).double() * 3, -1) for _ in range(2))
    ids = log_t.argsort(1, descending=True)
    identity, logits = torch.eye(41, dtype=torch.float64), log_p
    ones = torch.ones(3, dtype=torch.float64)
    for divergence in DIVERGENCES:
        bounds = []
        for size in (m, m + 1):
            known = log_t.gather(1, ids[:, :size]).unsqueeze(0)
            loss, _ = topk_tcopd_loss(
                logits, identity, ids[:, :size], None, known, [1.0], weights=ones, divergence=divergence,
                tail_floor=1e-14,
            )  # fmt: skip
            bounds.append(loss.item())
        a, b = (log_p, log_t) if divergence == "reverse_kl" else (log_t, log_p)
        full = (a.exp() * (a - b)).sum().item()
        assert -1e-9 <= bounds[0] <= bounds[1] + 1e-9 <= full + 2e-9


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_and_models_that_take_no_part_cannot_poison(backend):
    head, ids, ref, teachers = make_case(padded=False)
    weights = torch.rand(N, dtype=torch.float64)
    weights[4] = 0
    lambdas = torch.tensor([[1.5], [-0.5]], dtype=torch.float64).repeat(1, N)
    lambdas[1, ::3] = 0

    def call(head, ref, teachers):
        return lambda hidden, weight, bias: topk_tcopd_loss(
            hidden, weight, ids, ref, teachers, lambdas, weights=weights, bias=bias, backend=backend
        )

    expected, _ = run(call(head, ref, teachers), head, weights)
    hidden, bad_ref, bad_teachers = head[0].clone(), ref.clone(), teachers.clone()
    for tensor in (hidden, bad_ref, *bad_teachers):
        tensor[4] = float("nan")
    bad_teachers[1, ::3] = float("nan")
    found, (_, metrics) = run(call(head, bad_ref, bad_teachers), (hidden, *head[1:]), weights)
    assert metrics["token_count"] == N - 1
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value, true)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
def test_extreme_logits(divergence, shift):
    """Finite and near float64 when all logits are far from 0 and when one token holds all the mass."""
    head, ids, ref, teachers = make_case(dtype=torch.float32, padded=False)
    hidden, weight, _ = head
    hidden = hidden.clone()
    hidden[0] *= 300
    bias = torch.full((VOCAB,), shift)
    weights = torch.ones(N)

    def call(hidden, weight):
        return topk_tcopd_loss(
            hidden, weight, ids, ref.to(hidden.dtype), teachers.to(hidden.dtype), [1.5, -0.5],
            weights=weights, bias=bias.to(hidden.dtype), divergence=divergence,
        )  # fmt: skip

    found, _ = run(call, (hidden, weight), weights)
    true, _ = run(call, (hidden.double(), weight.double()), weights)
    for value, exact in zip(found, true, strict=True):
        assert torch.isfinite(value).all()
        assert (value.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_second_backward_repeats_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
    head, ids, ref, teachers = make_case(n=60, vocab=2000, dtype=torch.float32)
    hidden = head[0].requires_grad_()

    def call():
        return topk_tcopd_loss(hidden, head[1], ids, ref, teachers, [1.5, -0.5], weights=torch.full((60,), 1 / 60))[0]

    with Allocations() as seen:
        loss = call()
        first = torch.autograd.grad(3.0 * loss, hidden, retain_graph=True)[0]
    assert max(seen.sizes) <= 2000 * 12 < 60 * 2000
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0] * 3.0, first)
    again = call()
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(3.0 * again, hidden)[0], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.zeros(N, M)}, "topk_ids must be an int32 or int64 tensor"),
        ({"topk_ids": torch.zeros(3, M).long()}, r"topk_ids must have shape \[17, M\]"),
        ({"topk_ids": torch.zeros(N, M).long()}, "topk_ids repeats a token in row 0"),
        ({"topk_ids": torch.arange(M).repeat(N, 1) + 200}, r"topk_ids holds 208, expected a token id in \[0, 203\)"),
        ({"topk_ids": torch.arange(M).repeat(N, 1) - 2}, "topk_ids holds -2"),
        ({"ref_logprobs": None}, "ref_logprobs is None, but the reference has a non-zero coefficient"),
        ({"teacher_logprobs": torch.zeros(N, M)}, r"teacher_logprobs must be a tensor \[K, 17, 9\]"),
        ({"teacher_logprobs": torch.zeros(2, N, 3)}, r"teacher_logprobs must have shape \[2, 17, 9\]"),
        ({"divergence": "jsd"}, "divergence must be one of reverse_kl, forward_kl"),
        ({"tail_floor": 0.0}, "tail_floor must be in"),
        ({"weights": torch.ones(3)}, r"weights must have shape \[17\]"),
        ({"backend": "triton"}, "this function has no Triton kernel"),
    ],
)
def test_bad_arguments_are_named(change, message):
    head, ids, ref, teachers = make_case(dtype=torch.float32, padded=False)
    call = {"topk_ids": ids, "ref_logprobs": ref, "teacher_logprobs": teachers, "lambdas": [1.5, -0.5],
            "weights": torch.ones(N), **change}  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        topk_tcopd_loss(head[0], head[1], **call)
