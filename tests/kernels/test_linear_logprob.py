from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem, plain_logprob
from tcopd_kernels import _torch, linear_logprob, multi_linear_logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("with_bias", "temperature", "softcap"), [(False, 1.0, None), (True, 0.7, None), (True, 1.3, 5.0)]
)
def test_error_is_at_most_twice_that_of_torch(small_tiles, backend, dtype, with_bias, temperature, softcap):
    *head, targets = make_problem(37, 1003, 40)
    head = [t.to(dtype) for t in head]
    if not with_bias:
        head[2] = None
    upstream = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))

    def run(function, dtype):
        inputs = leaves(head, dtype)
        outputs = function(*inputs)
        loss = sum((g.to(o.dtype) * o).sum() for g, o in zip(upstream, outputs, strict=True))
        return [*outputs, *torch.autograd.grad(loss, [t for t in inputs if t is not None])]

    def plain(hidden, weight, bias):
        return plain_logprob(hidden, weight, targets, bias, temperature, softcap)

    def ours(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, entropy=True, backend=backend
        )

    names = ("logprob", "lse", "entropy", "hidden.grad", "weight.grad", "bias.grad")
    truth, torch_values, values = run(plain, torch.float64), run(plain, dtype), run(ours, dtype)
    for name, value, torch_value, true in zip(names, values, torch_values, truth, strict=False):
        assert value.dtype == (torch.float32 if "grad" not in name else dtype)
        assert_no_worse_than_torch(value.detach(), torch_value.detach(), true.detach(), name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_gradcheck_through_all_outputs(small_tiles, backend):
    hidden, weight, bias, targets = make_problem(5, 11, 3)
    targets[2] = -100
    inputs = leaves((hidden, weight, bias), torch.float64)

    def function(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, targets, bias=bias, temperature=0.8, softcap=2.0, entropy=True, backend=backend
        )
        assert out.logprob.dtype == torch.float64
        return tuple(out)

    assert torch.autograd.gradcheck(function, inputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 9),
    vocab=st.integers(1, 50),
    dim=st.integers(1, 9),
    workspace=st.integers(1, 600),
    temperature=st.floats(0.3, 3.0),
    softcap=st.one_of(st.none(), st.floats(1.0, 30.0)),
    seed=st.integers(0, 99),
)
def test_chunked_equals_definition_for_any_tiling(n, vocab, dim, workspace, temperature, softcap, seed):
    hidden, weight, bias, targets = make_problem(n, vocab, dim, seed)
    targets[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
    upstream = torch.randn(3, n, dtype=torch.float64)
    results = []
    default, _torch.WORKSPACE_BYTES = _torch.WORKSPACE_BYTES, 8 * workspace
    try:
        for backend in BACKENDS:
            inputs = leaves((hidden, weight, bias), torch.float64)
            out = linear_logprob(
                inputs[0], inputs[1], targets, bias=inputs[2], temperature=temperature, softcap=softcap,
                entropy=True, backend=backend,
            )  # fmt: skip
            loss = sum((g * o).sum() for g, o in zip(upstream, out, strict=True))
            results.append([*out, *torch.autograd.grad(loss, inputs)])
    finally:
        _torch.WORKSPACE_BYTES = default
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_give_zero_and_no_gradient_whatever_they_hold(small_tiles, backend):
    hidden, weight, _, targets = make_problem(9, 101, 6)
    targets[[0, 4, 8]] = -1
    kept = targets != -1
    inputs = leaves((hidden, weight), torch.float32)
    out = linear_logprob(*inputs, targets, ignore_index=-1, entropy=True, backend=backend)
    assert all((t[~kept] == 0).all() for t in out)
    grads = torch.autograd.grad(sum((t * t).sum() for t in out), inputs)
    assert (grads[0][~kept] == 0).all() and (grads[0][kept] != 0).any(1).all()
    alone = leaves((hidden[kept], weight), torch.float32)
    out_alone = linear_logprob(*alone, targets[kept], entropy=True, backend=backend)
    grads_alone = torch.autograd.grad(sum((t * t).sum() for t in out_alone), alone)
    torch.testing.assert_close(out.logprob[kept], out_alone.logprob)
    torch.testing.assert_close(grads[0][kept], grads_alone[0])
    torch.testing.assert_close(grads[1], grads_alone[1])


def test_ignored_nan_rows_do_not_reach_the_weight_gradient():
    hidden, weight, _, targets = make_problem(6, 50, 4)
    hidden[2], targets[2] = float("nan"), -100
    inputs = leaves((hidden, weight), torch.float32)
    out = linear_logprob(*inputs, targets, backend="torch")
    grads = torch.autograd.grad(out.logprob.sum(), inputs)
    assert all(torch.isfinite(g).all() for g in (out.logprob, *grads))


@pytest.mark.parametrize("rows", [0, 5])
def test_no_counted_rows(rows):
    hidden, weight, _, _ = make_problem(rows, 50, 4)
    inputs = leaves((hidden, weight), torch.float32)
    out = linear_logprob(*inputs, torch.full((rows,), -100), entropy=True, backend="torch")
    grads = torch.autograd.grad(sum(t.sum() for t in out), inputs)
    assert out.logprob.shape == (rows,) and all((g == 0).all() for g in (*out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [1e4, -1e4, -1e3])
def test_extreme_logits(small_tiles, backend, level):
    """A constant added to all logits must change the normaliser alone."""
    hidden, weight, bias, targets = make_problem(7, 503, 8)
    inputs = leaves((hidden, weight), torch.float64)
    truth = linear_logprob(*inputs, targets, bias=bias.double(), entropy=True, backend="reference")
    true_grads = torch.autograd.grad(truth.logprob.sum() + truth.entropy.sum(), inputs)
    inputs = leaves((hidden, weight), torch.float32)
    out = linear_logprob(*inputs, targets, bias=bias + level, entropy=True, backend=backend)
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), inputs)
    # fp32 logits near 1e4 are spaced 1e-3 apart.
    tolerance = {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(out.logprob.double(), truth.logprob, **tolerance)
    torch.testing.assert_close(out.entropy.double(), truth.entropy, **tolerance)
    torch.testing.assert_close((out.lse.double() - level), truth.lse, **tolerance)
    for grad, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spread_of_twenty_thousand(small_tiles, backend):
    """One-hot distributions: logits from −1e4 to 1e4 in one row."""
    weight = torch.linspace(-1e4, 1e4, 401).unsqueeze(1).requires_grad_()
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    out = linear_logprob(hidden, weight, torch.tensor([400, 0, 0]), entropy=True, backend=backend)
    torch.testing.assert_close(out.logprob, torch.tensor([0.0, 0.0, -2e4]))
    torch.testing.assert_close(out.entropy, torch.zeros(3))
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), (hidden, weight))
    torch.testing.assert_close(grads[0], torch.tensor([[0.0], [0.0], [-2e4]]))
    assert torch.isfinite(grads[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("removed", [slice(50, 90), slice(0, 40)], ids=["last", "first"])
def test_minus_infinity_in_the_bias_removes_tokens(small_tiles, monkeypatch, backend, removed):
    """Whole tiles of removed tokens, before or after the others, and gradients of the entropy of any size."""
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 100)
    hidden, weight, bias, targets = make_problem(6, 90, 8)
    rest = torch.ones(90, dtype=torch.bool)
    rest[removed] = False
    kept = rest.nonzero().squeeze(1)
    local = targets % len(kept)
    inputs = leaves((hidden, weight), torch.float32)
    with_removed = bias.masked_fill(~rest, -float("inf"))
    out = linear_logprob(*inputs, kept[local], bias=with_removed, entropy=True, backend=backend)
    factor = 1.0 if backend == "reference" else 1e3
    grads = torch.autograd.grad(factor * (out.logprob.sum() - out.entropy.sum()), inputs)
    short = leaves((hidden, weight[kept]), torch.float32)
    expected = linear_logprob(*short, local, bias=bias[kept], entropy=True, backend="reference")
    true_grads = torch.autograd.grad(factor * (expected.logprob.sum() - expected.entropy.sum()), short)
    torch.testing.assert_close(tuple(out), tuple(expected))
    torch.testing.assert_close(grads[0], true_grads[0], rtol=1e-5, atol=1e-5 * factor)
    torch.testing.assert_close(grads[1][kept], true_grads[1], rtol=1e-5, atol=1e-5 * factor)
    assert (grads[1][removed] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocab_size_drops_padding_rows(small_tiles, backend):
    hidden, weight, bias, targets = make_problem(6, 64, 8)
    targets = targets % 50
    weight[50:] = float("nan")
    inputs = leaves((hidden, weight, bias), torch.float32)
    out = linear_logprob(inputs[0], inputs[1], targets, bias=inputs[2], vocab_size=50, backend=backend)
    grads = torch.autograd.grad(out.logprob.sum(), inputs)
    expected = linear_logprob(hidden, weight[:50], targets, bias=bias[:50], backend="reference")
    torch.testing.assert_close(out.logprob, expected.logprob)
    assert torch.isfinite(grads[0]).all() and (grads[1][:50] != 0).any() and (grads[1][50:] == 0).all()


def test_only_the_needed_gradients_are_computed_and_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(_torch, "WORKSPACE_BYTES", 4 * 20_000)
    n, vocab, dim = 300, 2000, 64
    hidden, weight, _, targets = make_problem(n, vocab, dim)
    hidden.requires_grad_()
    with Allocations() as frozen:
        linear_logprob(hidden, weight, targets, entropy=True, backend="torch").logprob.sum().backward()
    assert hidden.grad is not None
    assert max(frozen.sizes) <= 20_000 < min(n * vocab, vocab * dim)
    weight.requires_grad_()
    with Allocations() as trained:
        linear_logprob(hidden, weight, targets, backend="torch").logprob.sum().backward()
    assert max(trained.sizes) == vocab * dim < n * vocab


def test_rows_without_upstream_gradient_leave_the_backward(monkeypatch):
    hidden, weight, _, targets = make_problem(40, 100, 8)
    inputs = leaves((hidden, weight), torch.float32)
    seen = []
    original = _torch.backward
    monkeypatch.setattr(_torch, "backward", lambda h, *a, **k: seen.append(len(h)) or original(h, *a, **k))
    rows = torch.arange(40)

    def objective(backend):
        """Row 0, 4, … matter through the logprob, row 1, 5, … through the entropy, the others not at all."""
        out = linear_logprob(*inputs, targets, entropy=True, backend=backend)
        return (out.logprob * (rows % 4 == 0)).sum() + (out.entropy * (rows % 4 == 1)).sum()

    grads = torch.autograd.grad(objective("torch"), inputs)
    assert seen == [20]
    for grad, true in zip(grads, torch.autograd.grad(objective("reference"), inputs), strict=True):
        torch.testing.assert_close(grad, true)


def test_fp16_gradients_survive_a_tiny_upstream(small_tiles, half_operands):
    """1/token_count times a probability underflows fp16, so dlogits must be scaled before they become operands."""
    hidden, weight, _, targets = make_problem(16, 300, 8)
    inputs = leaves((hidden, weight), torch.float16)
    out = linear_logprob(*inputs, targets, entropy=True, backend="torch")
    objective = out.logprob.sum() + out.entropy.sum()
    small = torch.autograd.grad(objective * 2.0**-12, inputs, retain_graph=True)
    large = torch.autograd.grad(objective, inputs)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a.float() * 2.0**12, b.float(), rtol=1e-3, atol=2.0**-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_keep_the_error_bound(small_tiles, half_operands, dtype):
    """The GPU form, whose dlogits are rounded to the operand dtype before the gradient GEMMs."""
    test_error_is_at_most_twice_that_of_torch(None, "torch", dtype, True, 1.3, 5.0)


def test_multi_linear_logprob_matches_single_models():
    targets = torch.randint(0, 90, (12,))
    targets[5] = -100
    models = [make_problem(12, vocab, dim, seed)[:3] for seed, (vocab, dim) in enumerate([(90, 8), (96, 5), (128, 16)])]
    hiddens, weights, biases = (list(column) for column in zip(*models, strict=True))
    biases[1] = None
    for backend in BACKENDS:
        out = multi_linear_logprob(
            hiddens, weights, targets, biases=biases, softcaps=[None, 4.0, None], temperature=0.9,
            vocab_size=90, backend=backend,
        )  # fmt: skip
        assert out.shape == (3, 12) and out.dtype == torch.float32 and not out.requires_grad
        assert (out[:, 5] == 0).all()
        for m in range(3):
            expected = linear_logprob(
                hiddens[m], weights[m], targets, bias=biases[m], softcap=[None, 4.0, None][m], temperature=0.9,
                vocab_size=90, backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(out[m], expected.logprob)
    with pytest.raises(ValueError, match=r"targets holds 95, expected a token id in \[0, 90\)"):
        multi_linear_logprob(hiddens, weights, torch.full((12,), 95), biases=biases)
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape"):
        multi_linear_logprob(hiddens, [weights[0], weights[2], weights[2]], targets)


def test_partials_of_a_part_of_the_vocabulary(small_tiles):
    """Targets elsewhere have no logit here; max, sum and dot are those of the part."""
    hidden, weight, bias, targets = (t.double() if t.is_floating_point() else t for t in make_problem(20, 90, 8))
    part = slice(30, 71)
    own = _torch.partials(
        hidden, weight[part], targets - part.start, bias=bias[part], temperature=0.8, softcap=None, entropy=True
    )
    z = (hidden @ weight[part].T + bias[part]) / 0.8
    here = (targets >= part.start) & (targets < part.stop)
    assert 0 < here.sum() < 20
    step = z - z.amax(1, keepdim=True)
    expected = (z.amax(1), step.exp().sum(1), (step.exp() * step).sum(1))
    torch.testing.assert_close(tuple(own[:3]), expected)
    at_target = z.gather(1, (targets - part.start).clamp(0, 40).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(own.target_logit, torch.where(here, at_target, 0.0))


BAD_CALLS = {
    "hidden must be a torch.Tensor": {"hidden": [1.0]},
    "hidden must have shape": {"hidden": torch.zeros(2, 3, 4)},
    "hidden must be float16": {"hidden": torch.zeros(3, 4, dtype=torch.int64)},
    "weight must have shape": {"weight": torch.zeros(7, 5)},
    "weight is torch.bfloat16 but hidden is torch.float32": {"weight": torch.zeros(7, 4, dtype=torch.bfloat16)},
    "pass its weight. Of a head with an adapter": {"weight": torch.nn.Linear(4, 7)},
    "weight has shape \\[0\\]: it is a partitioned ZeRO-3 parameter": {"weight": torch.zeros(0)},
    "weight is on meta": {"weight": torch.zeros(7, 4, device="meta")},
    "bias must have shape": {"bias": torch.zeros(6)},
    "targets must have shape": {"targets": torch.zeros(4, dtype=torch.int64)},
    "targets must be int32 or int64": {"targets": torch.zeros(3)},
    "targets holds 7": {"targets": torch.tensor([0, 7, -100])},
    "targets holds -1": {"targets": torch.tensor([0, -1, 3])},
    "temperature must be in": {"temperature": 0.0},
    "temperature must be a number": {"temperature": "1"},
    "softcap must be in": {"softcap": -1.0},
    "grad_tol must be in": {"grad_tol": -0.1},
    "ignore_index must be an int": {"ignore_index": None},
    "vocab_size must be in": {"vocab_size": 8},
    "backend must be one of auto, triton, torch, reference, got 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    call = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 1, 2])}
    call.update(BAD_CALLS[message])
    with pytest.raises((TypeError, ValueError), match=message.split("(")[0]):
        linear_logprob(call.pop("hidden"), call.pop("weight"), call.pop("targets"), **call)


def test_triton_on_a_cpu_tensor_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, _, targets = make_problem(3, 7, 4)
    with pytest.raises(ValueError, match="backend='triton' is not possible here: the tensors are on cpu"):
        linear_logprob(hidden, weight, targets, backend="triton")
    assert linear_logprob(hidden, weight, targets, backend="auto").logprob.shape == (3,)


def test_import_needs_torch_alone():
    """The kernels are usable without the trainer and without loading any of its heavy dependencies."""
    import tcopd_kernels

    code = (
        "import sys, tcopd_kernels, torch\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "tcopd_kernels.linear_logprob(h, torch.randn(9, 4), torch.tensor([1, 2, 3])).logprob.sum().backward()\n"
        "print([m for m in ('transformers', 'deepspeed', 'triton', 'tcopd_fast') if m in sys.modules])"
    )
    root = Path(tcopd_kernels.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert result.stdout.strip() == "[]", result.stderr
    assert not (root / "__init__.py").exists()
