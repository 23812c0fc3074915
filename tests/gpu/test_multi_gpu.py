"""The compiled kernels for several models: dtypes, ragged sizes, both load paths, both launches, large offsets."""

from __future__ import annotations

import pytest
import torch
from gpu_mode import DEVICE, DTYPES, HALF, sized
from tcopd_kernels import linear_tcopd_step, multi_linear_logprob, reference

# N, and V and D of each model: decode-sized and large problems, ragged vocabularies, widths that TMA cannot load.
PROBLEMS = {
    "one row": (1, sized([(1000, 96), (1000, 64)], [(100, 24), (100, 16)])),
    "small": (13, sized([(50257, 768), (50304, 1024), (50257, 512)], [(131, 40), (140, 64), (131, 24)])),
    "medium": sized((64, [(4099, 72), (4100, 136), (4099, 8)]), (24, [(99, 24), (100, 40), (99, 8)])),
    "large": sized((515, [(32003, 136), (32003, 256)]), (35, [(131, 40), (131, 64)])),
    "unaligned": sized((333, [(2048, 101), (2050, 96)]), (21, [(64, 29), (66, 32)])),
}
LAUNCHES = ["joint", "separate"]


def make_heads(N, sizes, dtype):
    gen = torch.Generator(DEVICE).manual_seed(N)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=gen, device=DEVICE)).to(dtype)

    hiddens = [normal(N, D) for _, D in sizes]
    weights = [normal(V, D, scale=2 / D**0.5) for V, D in sizes]
    biases = [normal(V) if m % 2 else None for m, (V, _) in enumerate(sizes)]
    targets = torch.randint(0, min(V for V, _ in sizes), (N,), generator=gen, device=DEVICE)
    return hiddens, weights, targets, {"biases": biases, "softcaps": [None, 10.0, None][: len(sizes)]}


def exact_logprobs(hiddens, weights, targets, options, temperature=1.0):
    return reference.multi_linear_logprob(
        [h.double() for h in hiddens], [w.double() for w in weights], targets, temperature=temperature,
        biases=[None if b is None else b.double() for b in options["biases"]], softcaps=options["softcaps"],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_matches_float64(launch, problem, dtype):
    *heads, options = make_heads(*problem, dtype)
    found = multi_linear_logprob(*heads, backend="triton", launch=launch, temperature=0.7, **options)
    exact = exact_logprobs(*heads, options, temperature=0.7)
    torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=2e-5)


def test_descriptors_and_pointers_agree(monkeypatch):
    from tcopd_kernels import _triton_multi

    *heads, options = make_heads(*PROBLEMS["large"], HALF)
    own = multi_linear_logprob(*heads, backend="triton", launch="joint", **options)
    monkeypatch.setattr(_triton_multi, "tma_usable", lambda *matrices: False)
    pointers = multi_linear_logprob(*heads, backend="triton", launch="joint", **options)
    torch.testing.assert_close(own, pointers, rtol=1e-6, atol=1e-5)


def test_joint_and_separate_launches_agree_and_repeat_bitwise():
    *heads, options = make_heads(*PROBLEMS["small"], HALF)
    joint, again, separate = (
        multi_linear_logprob(*heads, backend="triton", launch=launch, **options)
        for launch in ("joint", "joint", "separate")
    )
    assert torch.equal(joint, again)
    torch.testing.assert_close(joint, separate, rtol=1e-6, atol=1e-5)


def test_offsets_beyond_two_to_the_thirty_one():
    """A row stride of 2^24 elements: row 200 of the weight lies past 2^31."""
    V, D, stride = 200, 64, sized(2**24, 2**8)
    storage = torch.empty(V * stride, dtype=HALF, device=DEVICE)
    weight = storage.view(V, stride)[:, :D]
    hiddens, (small, other), targets, options = make_heads(17, [(V, D), (V, 32)], HALF)
    weight.copy_(small)
    found = multi_linear_logprob(hiddens, [weight, other], targets, backend="triton", launch="joint", **options)
    exact = exact_logprobs(hiddens, [small, other], targets, options)
    torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=2e-5)


def step_results(backend, launch, dtype, wide=None, **options):
    """loss, gradients and per-token results of one step; all inputs in `wide`, if given."""
    N, V = sized((300, 4099), (37, 99))
    hiddens, weights, targets, _ = make_heads(
        N, sized([(V, 96), (V, 64), (V + 1, 128), (V, 40)], [(V, 32), (V, 24), (V + 1, 40), (V, 16)]), dtype
    )
    gen = torch.Generator(DEVICE).manual_seed(1)
    hiddens, weights = ([t.to(wide or dtype) for t in tensors] for tensors in (hiddens, weights))
    inputs = [hiddens[0].requires_grad_(), weights[0].requires_grad_()]
    logprob = reference.linear_logprob(*(t.detach().double() for t in inputs), targets).logprob
    drift, engine = 0.3 * torch.randn(2, N, generator=gen, device=DEVICE)
    old_logprob = (logprob + drift).float()
    lambdas = torch.randn(2, N, generator=gen, device=DEVICE)
    lambdas[1, sized(128, 16) :] = 0.0
    token_weights = torch.rand(N, generator=gen, device=DEVICE) / N
    token_weights[::9] = 0.0
    loss, metrics, tokens = linear_tcopd_step(
        *inputs, targets, hiddens[1], weights[1], hiddens[2:], weights[2:], lambdas,
        weights=token_weights, old_logprob=old_logprob, rollout_logprob=old_logprob + engine,
        ref_kl_coef=0.1, backend=backend, launch=launch, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, inputs)
    return [loss.detach(), *grads], metrics, tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_step_matches_float64(launch, dtype):
    found, metrics, tokens = step_results("triton", launch, dtype)
    exact, exact_metrics, exact_tokens = step_results("reference", "auto", dtype, torch.float64)
    limit = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for value, true in zip(found, exact, strict=True):
        assert (value.double() - true).norm() <= limit * true.norm()
    for name, value in exact_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for name in ("logprob", "ref_logprob", "teacher_logprobs", "reward", "advantage"):
        torch.testing.assert_close(
            getattr(tokens, name).double(), getattr(exact_tokens, name).double(), rtol=1e-5, atol=5e-5, msg=name
        )


def test_step_with_compaction_and_entropy():
    exact, *_ = step_results("triton", "joint", HALF)
    found, metrics, tokens = step_results("triton", "joint", HALF, grad_tol=2.0**-8, entropy=True)
    assert metrics["dropped_mass_max"] <= 2.0**-8
    assert tokens.entropy.min() >= 0
    for value, true in zip(found, exact, strict=True):
        assert (value - true).norm() <= 0.05 * true.norm()


def test_step_repeats_bitwise():
    first, second = (step_results("triton", "joint", HALF)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
