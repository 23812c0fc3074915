from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem, plain_logprob
from tcopd_kernels import _torch, _torch_loss, linear_logprob, linear_tcopd_loss, reference, tcopd_policy_loss

N, VOCAB, DIM = 37, 1003, 24


def make_tokens(n, seed=5):
    generator = torch.Generator().manual_seed(seed)
    advantage, drift, engine = torch.randn(3, n, generator=generator)
    weights = torch.rand(n, generator=generator) / n
    return advantage, 0.3 * drift, 0.1 * engine, weights


def make_call(targets, hidden, weight, bias, off_policy):
    """Per-token arguments near the policy of this head, so that ratios fall on both sides of the clip range."""
    advantage, drift, engine, weights = make_tokens(len(targets))
    logprob = plain_logprob(hidden.double(), weight.double(), targets, bias.double())[0].float()
    call = {"advantage": advantage, "weights": weights, "bias": bias}
    if off_policy:
        call |= {"old_logprob": logprob + drift, "rollout_logprob": logprob + drift + engine}
        call |= {"ref_logprob": logprob - 0.5, "ref_kl_coef": 0.1}
    return call


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("off_policy", [False, True])
def test_error_is_at_most_twice_that_of_torch(small_tiles, backend, dtype, off_policy):
    *head, targets = make_problem(N, VOCAB, DIM)
    head = [t.to(dtype) for t in head]
    call = make_call(targets, *head, off_policy)

    def run(function, dtype):
        inputs = leaves(head, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = {k: v.to(wide) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        loss = function(inputs[0], inputs[1], **{**tokens, "bias": inputs[2]})
        return [loss, *torch.autograd.grad(loss, inputs)]

    def plain(hidden, weight, *, bias, advantage, ref_logprob=None, ref_kl_coef=0.0, **policy):
        logprob = plain_logprob(hidden, weight, targets, bias)[0]
        loss, _ = tcopd_policy_loss(logprob, advantage, **policy)
        if ref_kl_coef:
            loss = loss + ref_kl_coef * (policy["weights"] * reference.k3(logprob, ref_logprob)).sum()
        return loss

    def ours(hidden, weight, **call):
        return linear_tcopd_loss(hidden, weight, targets, backend=backend, **call)[0]

    truth, torch_values, values = run(plain, torch.float64), run(plain, dtype), run(ours, dtype)
    for name, value, torch_value, true in zip(
        ("loss", "hidden.grad", "weight.grad", "bias.grad"), values, torch_values, truth, strict=True
    ):
        assert_no_worse_than_torch(value.detach(), torch_value.detach(), true.detach(), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_keep_the_error_bound(small_tiles, half_operands, dtype):
    """The GPU form, whose dlogits are rounded to the operand dtype before the gradient GEMMs."""
    test_error_is_at_most_twice_that_of_torch(None, "torch", dtype, True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("from_reward", [False, True])
def test_equals_reference_in_float64(small_tiles, softcap, from_reward):
    """Every option at once, against plain autograd on materialised logits."""
    hidden, weight, bias, targets = make_problem(N, VOCAB, DIM)
    advantage, drift, engine, weights = (t.double() for t in make_tokens(N))
    base = reference.linear_logprob(hidden.double(), weight.double(), targets).logprob
    call = {"ref_logprob": base - 0.4, "ref_kl_coef": 0.2, "rollout_logprob": base + engine, "weights": weights}
    call |= {"reward": advantage} if from_reward else {"advantage": advantage, "old_logprob": base + drift}
    head = {"temperature": 0.8, "softcap": softcap}
    inputs = leaves((hidden, weight, bias), torch.float64)
    loss, metrics, stats = linear_tcopd_loss(
        *inputs[:2], targets, bias=inputs[2], entropy=True, backend="torch", **call, **head
    )
    grads = torch.autograd.grad(loss, inputs)
    expected = reference.linear_tcopd_loss(*inputs[:2], targets, bias=inputs[2], **call, **head)
    true_grads = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(loss, expected)
    for grad, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true)
    expected_stats = reference.linear_logprob(*inputs[:2], targets, bias=inputs[2], entropy=True, **head)
    torch.testing.assert_close(tuple(stats), tuple(t.detach() for t in expected_stats))
    assert not any(t.requires_grad for t in stats)
    other_loss, other_metrics, _ = linear_tcopd_loss(
        *inputs[:2], targets, bias=inputs[2], backend="reference", **call, **head
    )
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_metrics, metrics)


def test_reward_form_is_the_advantage_form_on_policy():
    hidden, weight, _, targets = make_problem(N, VOCAB, DIM)
    reward, _, _, weights = make_tokens(N)
    logprob = linear_logprob(hidden, weight, targets, backend="torch").logprob
    ref = logprob + 0.7
    clamped = (reward - (logprob - ref)).clamp(-1.0, 1.0)
    results = []
    for call in ({"reward": reward, "ref_logprob": ref, "advantage_clamp": 1.0}, {"advantage": clamped}):
        inputs = leaves((hidden, weight), torch.float32)
        loss, _, _ = linear_tcopd_loss(*inputs, targets, weights=weights, backend="torch", **call)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_float64_gradcheck(small_tiles):
    hidden, weight, bias, targets = make_problem(5, 13, 3)
    advantage, drift, _, weights = (t.double() for t in make_tokens(5))
    old = reference.linear_logprob(hidden.double(), weight.double(), targets).logprob + drift
    inputs = leaves((hidden, weight, bias), torch.float64)

    def function(hidden, weight, bias):
        return linear_tcopd_loss(
            hidden, weight, targets, bias=bias, advantage=advantage, old_logprob=old, weights=weights,
            ref_logprob=old - 0.3, ref_kl_coef=0.5, softcap=2.0, temperature=0.7, backend="torch",
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_masked_rows_cannot_poison(small_tiles, backend):
    hidden, weight, _, targets = make_problem(N, VOCAB, DIM)
    advantage, drift, _, weights = make_tokens(N)
    ignored, weightless = torch.arange(N) % 5 == 0, torch.arange(N) % 7 == 1
    clean = {"advantage": advantage, "old_logprob": drift - 3.0, "ref_logprob": drift - 2.0}
    dirty = {name: torch.where(ignored | weightless, float("nan"), value) for name, value in clean.items()}
    masked_targets = torch.where(ignored, -100, targets)
    masked_weights = torch.where(weightless, 0.0, weights)
    kept = ~(ignored | weightless)
    inputs = leaves((hidden, weight), torch.float32)
    loss, metrics, stats = linear_tcopd_loss(
        *inputs, masked_targets, weights=masked_weights, ref_kl_coef=0.1, backend=backend, **dirty
    )
    grads = torch.autograd.grad(loss, inputs)
    alone = leaves((hidden[kept], weight), torch.float32)
    expected, expected_metrics, _ = linear_tcopd_loss(
        *alone, targets[kept], weights=weights[kept], ref_kl_coef=0.1, backend="reference",
        **{name: value[kept] for name, value in clean.items()},
    )  # fmt: skip
    true_grads = torch.autograd.grad(expected, alone)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    torch.testing.assert_close(grads[0][kept], true_grads[0])
    assert (grads[0][~kept] == 0).all()
    torch.testing.assert_close(grads[1], true_grads[1])
    assert (stats.logprob[ignored] == 0).all() and (stats.logprob[weightless & ~ignored] < 0).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_counted_tokens(rows):
    hidden, weight, _, _ = make_problem(rows, 50, 4)
    inputs = leaves((hidden, weight), torch.float32)
    loss, metrics, stats = linear_tcopd_loss(
        *inputs, torch.full((rows,), -100), advantage=torch.ones(rows), weights=torch.ones(rows), entropy=True
    )
    grads = torch.autograd.grad(loss, inputs)
    assert loss == 0 and metrics["token_count"] == 0 and stats.entropy.shape == (rows,)
    assert all((g == 0).all() for g in grads)


def test_frozen_head_costs_no_weight_gradient_and_logits_stay_bounded(monkeypatch):
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    monkeypatch.setattr(_torch_loss, "CPU_CHUNK_BYTES", 4 * 20_000)
    n, vocab, dim = 300, 2000, 64
    hidden, weight, _, targets = make_problem(n, vocab, dim)
    call = {"advantage": torch.randn(n), "weights": torch.full((n,), 1 / n), "backend": "torch"}
    hidden.requires_grad_()
    with Allocations() as frozen:
        linear_tcopd_loss(hidden, weight, targets, **call)[0].backward()
    assert hidden.grad is not None and weight.grad is None
    assert max(frozen.sizes) <= 20_000 < min(n * vocab, vocab * dim)
    weight.requires_grad_()
    with Allocations() as trained:
        linear_tcopd_loss(hidden, weight, targets, **call)[0].backward()
    assert max(trained.sizes) == vocab * dim < n * vocab
    with Allocations() as evaluated, torch.no_grad():
        linear_tcopd_loss(hidden, weight, targets, **call)
    assert max(evaluated.sizes) <= 20_000


PEAK_MEMORY = """
import torch
from tcopd_kernels import linear_tcopd_loss

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

def run(n, vocab, dim):
    hidden, weight = torch.randn(n, dim).requires_grad_(), torch.randn(vocab, dim).requires_grad_()
    targets, advantage, weights = torch.randint(0, vocab, (n,)), torch.randn(n), torch.full((n,), 1 / n)
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident("VmRSS")
    linear_tcopd_loss(hidden, weight, targets, advantage=advantage, weights=weights, backend="torch")[0].backward()
    return resident("VmHWM") - before - 4 * (hidden.numel() + weight.numel())

torch.set_num_threads(1)
run(8, 50, 4)
n, vocab = 1024, 151936
print(run(n, vocab, 16) / (4 * n * vocab))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak of the resident memory")
def test_peak_memory_is_a_twentieth_of_the_logits_on_a_cpu():
    """Beside the gradients of hidden and of an fp32 head, which are made once and handed on without a copy."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", PEAK_MEMORY], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0.01 < float(result.stdout) < 0.05


@pytest.mark.parametrize("n", [1, 3, 40, 255, 1023, 1024, 5000])
def test_chunks_of_a_cpu_are_even_and_bounded(n):
    vocab = 151936
    rows, cols = _torch_loss.chunk_shape(torch.empty(n, 8), vocab, buffers=1)
    assert 1 <= rows <= n and 1 <= cols <= vocab
    assert rows * vocab * 4 <= _torch_loss.CPU_CHUNK_BYTES
    assert n < 1024 or rows <= n / 25
    assert n <= rows or n / rows > -(-n // rows) - 1


def test_rows_without_gradient_leave_the_gradient_gemms(monkeypatch):
    hidden, weight, _, targets = make_problem(40, 100, 8)
    inputs = leaves((hidden, weight), torch.float32)
    rows = []
    original = _torch_loss.HeadGradients.add
    monkeypatch.setattr(
        _torch_loss.HeadGradients,
        "add",
        lambda self, where, h, tiles: rows.append(len(h)) or original(self, where, h, tiles),
    )
    advantage = torch.where(torch.arange(40) % 4 == 0, 1.0, 0.0)
    linear_tcopd_loss(*inputs, targets, advantage=advantage, weights=torch.ones(40), backend="torch")
    assert rows == [10]


def test_loss_is_independent_of_the_split_into_micro_batches():
    """With the token count of the whole batch in the weights, losses, gradients and metrics add up."""
    hidden, weight, _, targets = make_problem(N, VOCAB, DIM)
    advantage, drift, _, _ = make_tokens(N)
    call = {"advantage": advantage, "old_logprob": drift - 5.0, "weights": torch.full((N,), 1 / N)}
    inputs = leaves((hidden, weight), torch.float64)
    whole, metrics, _ = linear_tcopd_loss(*inputs, targets, backend="torch", **call)
    grads = torch.autograd.grad(whole, inputs)
    parts = [slice(0, 11), slice(11, 12), slice(12, N)]
    split = [
        linear_tcopd_loss(
            inputs[0][part], inputs[1], targets[part], backend="torch", **{k: v[part] for k, v in call.items()}
        )
        for part in parts
    ]
    total = sum(result[0] for result in split)
    torch.testing.assert_close(total, whole)
    for grad, true in zip(torch.autograd.grad(total, inputs), grads, strict=True):
        torch.testing.assert_close(grad, true)
    assert sum(result[1]["token_count"] for result in split) == metrics["token_count"] == N


@pytest.mark.parametrize("weight_scale", [1.0, 1e-7])
def test_fp16_gradients_survive_a_loss_scale(small_tiles, half_operands, weight_scale):
    """A token weight under the smallest fp16 number must come through when the loss is scaled up afterwards."""
    hidden, weight, _, targets = make_problem(16, 300, 8)
    inputs = leaves((hidden, weight), torch.float16)
    weights = torch.full((16,), weight_scale)
    loss, _, _ = linear_tcopd_loss(*inputs, targets, advantage=torch.ones(16), weights=weights, backend="torch")
    grads = torch.autograd.grad(loss / weight_scale, inputs)
    logprob = linear_logprob(*inputs, targets, backend="reference").logprob
    for grad, true in zip(grads, torch.autograd.grad(-logprob.sum(), inputs), strict=True):
        torch.testing.assert_close(grad.float(), true.float(), rtol=4e-3, atol=4e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": None}, "exactly one of advantage and reward"),
        ({"reward": torch.zeros(3)}, "exactly one of advantage and reward"),
        ({"advantage": None, "reward": torch.zeros(3)}, "ref_logprob is required with reward"),
        ({"ref_kl_coef": 0.1}, "ref_logprob is required with ref_kl_coef=0.1"),
        ({"ref_kl_coef": -0.1}, "ref_kl_coef must be in"),
        ({"weights": None}, "weights must be a torch.Tensor"),
        ({"old_logprob": torch.zeros(4)}, r"old_logprob must have shape \[3\]"),
        ({"advantage_clamp": 0.0}, "advantage_clamp must be in"),
        ({"dual_clip": 0.5}, "dual_clip must be in"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    call = {"advantage": torch.zeros(3), "weights": torch.ones(3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        linear_tcopd_loss(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 1, 2]), **call)
