"""linear_logprob as torch operators: their registration, torch.compile, autocast, copies of the package."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from oracle import leaves, make_problem
from tcopd_kernels import _ops, linear_logprob
from torch.library import opcheck

N, VOCAB, DIM = 7, 31, 5
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)
SAMPLES = {
    "plain": {},
    "all outputs": {"with_bias": True, "entropy": True, "softcap": 3.0, "temperature": 0.7},
    "bfloat16": {"dtype": torch.bfloat16, "with_bias": True, "entropy": True},
    "float64": {"dtype": torch.float64, "entropy": True},
    "tolerance": {"grad_tol": 0.2, "with_bias": True},
    "certificate": {"grad_tol": 0.2, "certificate": torch.zeros(5)},
    "frozen head": {"frozen": True},
    "no rows": {"n": 0, "entropy": True},
    "strided": {"strided": True, "with_bias": True},
}


def op_arguments(
    dtype=torch.float32, with_bias=False, entropy=False, softcap=None, temperature=1.0, grad_tol=0.0, certificate=None,
    frozen=False, n=N, strided=False,
):  # fmt: skip
    hidden, weight, bias, targets = make_problem(n, VOCAB, DIM)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if strided:
        hidden, weight = hidden.repeat(1, 2)[:, ::2], weight.T.contiguous().T
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    targets[1:2] = -100
    options = _ops.HeadOptions("torch", temperature, softcap, -100, grad_tol, 0, None, True)
    return hidden, weight, bias if with_bias else None, targets, certificate, entropy, *options


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_is_registered_soundly(name):
    opcheck(_ops.linear_logprob_op, op_arguments(**SAMPLES[name]), test_utils=CHECKS)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "no rows"])
def test_backward_operator_is_registered_soundly(name):
    sample = SAMPLES[name]
    hidden, weight, bias, targets, certificate, entropy, *options = op_arguments(**sample)
    _, lse, token_entropy, bounds, _ = (
        t.detach() for t in _ops.linear_logprob_op(hidden, weight, bias, targets, certificate, entropy, *options)
    )
    upstream = torch.randn(3, N, dtype=lse.dtype)
    arguments = (
        *(None if t is None else t.detach() for t in (hidden, weight, bias)), targets, lse,
        token_entropy if entropy else None, bounds if sample.get("grad_tol") else None, None,
        upstream[0], None, upstream[2] if entropy else None,
        [True, not sample.get("frozen"), bias is not None], certificate is not None, *options,
    )  # fmt: skip
    opcheck(_ops.linear_logprob_backward_op, arguments, test_utils=CHECKS)


def objective(hidden, weight, targets, **options):
    out = linear_logprob(torch.tanh(hidden), weight, targets, entropy=True, backend="torch", **options)
    return (out.logprob * 2.0 - out.lse.square() + out.entropy).sum()


def batch(n, seed):
    hidden, weight, _, targets = make_problem(n, VOCAB, DIM, seed)
    targets[seed % n] = -100
    return *leaves((hidden, weight), torch.float32), targets


def assert_compiled_training_equals_eager(backend, sizes, **options):
    """Returns how often it was compiled for batches of different `sizes`."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for seed, n in enumerate(sizes):
        hidden, weight, targets = batch(n, seed)
        expected = objective(hidden, weight, targets, **options)
        loss = compiled(hidden, weight, targets, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
        )
    return counter.frame_count


@pytest.mark.parametrize("options", [{}, {"grad_tol": 0.3, "softcap": 4.0}], ids=["plain", "tolerance"])
def test_compiles_whole_and_once_for_all_batch_sizes(options):
    torch._dynamo.reset()
    assert assert_compiled_training_equals_eager("aot_eager", (6, 9, 17, 5, 33), **options) <= 2


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    assert assert_compiled_training_equals_eager("inductor", (6, 9, 17)) <= 2


@torch._functorch.config.patch(donated_buffer=False)
def test_second_backward_through_a_compiled_call():
    torch._dynamo.reset()
    hidden, weight, targets = batch(9, 0)
    loss = torch.compile(objective, fullgraph=True, backend="aot_eager")(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_export_keeps_the_operator():
    class Head(torch.nn.Module):
        def forward(self, hidden, weight, targets):
            return linear_logprob(hidden, weight, targets, backend="torch").logprob

    hidden, weight, targets = (t.detach() for t in batch(9, 0))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(
        Head(), (hidden, weight, targets), dynamic_shapes=({0: tokens}, None, {0: tokens}), strict=True
    )
    assert any("linear_logprob" in str(node.target) for node in program.graph.nodes)
    expected = linear_logprob(hidden[:4], weight, targets[:4], backend="torch").logprob
    torch.testing.assert_close(program.module()(hidden[:4], weight, targets[:4]), expected)


def test_targets_are_checked_inside_compiled_code():
    torch._dynamo.reset()
    hidden, weight, targets = batch(9, 0)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"targets holds 131, expected a token id in \[0, 31\)"):
        compiled(hidden, weight, torch.full_like(targets, 131))


def test_certificate_is_for_eager_code():
    torch._dynamo.reset()
    hidden, weight, targets = batch(9, 0)

    def call(hidden, weight, targets):
        return linear_logprob(hidden, weight, targets, backend="torch", certificate={}).logprob

    with pytest.raises(Exception, match="certificate is filled by the backward"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, weight, targets)
    certificate = {}
    out = linear_logprob(hidden, weight, targets, backend="torch", certificate=certificate)
    assert set(certificate) == set(_ops.CERTIFICATE) and all(t.isnan() for t in certificate.values())
    out.logprob.sum().backward()
    assert certificate["grad_row_count"] == 8 and certificate["kept_column_sum"] == 8 * VOCAB


def test_second_derivatives_are_refused():
    hidden, weight, targets = batch(9, 0)
    loss = linear_logprob(hidden, weight, targets, backend="torch").logprob.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; call backward without"):
        (grad.square().sum() + hidden.sum()).backward()


def autocast_problem(device="cpu"):
    hidden, weight, bias, targets = (t.to(device) for t in make_problem(12, 90, 8))
    return *leaves((hidden, weight, bias), torch.float32), targets


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_takes_the_operands_as_linear_does(hidden_dtype, backend):
    """The result of explicit casts, and gradients in the dtypes of the parameters."""
    hidden, weight, bias, targets = autocast_problem()
    half, half_weight = hidden.bfloat16(), weight.bfloat16()
    expected = linear_logprob(half, half_weight, targets, bias=bias, entropy=True, backend=backend)
    given = hidden.to(hidden_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob(given, weight, targets, bias=bias, entropy=True, backend=backend)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(out, expected, strict=True))
    inputs = (hidden, weight, bias)
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.logprob.sum() + expected.entropy.sum(), inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        whole = linear_logprob(hidden, weight, targets, bias=bias, backend=backend).logprob
    assert torch.equal(whole, linear_logprob(hidden, weight, targets, bias=bias, backend=backend).logprob)


def test_autocast_leaves_float64_alone_and_compiles():
    torch._dynamo.reset()
    hidden, weight, _, targets = autocast_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logprob(hidden.double(), weight.double(), targets).logprob.dtype == torch.float64
        eager = linear_logprob(hidden, weight, targets, backend="torch").logprob
        compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, weight, targets, backend="torch").logprob, eager)


@pytest.fixture
def vendored(tmp_path, monkeypatch):
    """A copy of the package under another name, as a project that vendors it would make it."""
    source = Path(_ops.__file__).parent
    target = tmp_path / "vendored_kernels"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*.py"):
        file.write_text(file.read_text().replace("tcopd_kernels", "vendored_kernels"))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield importlib.import_module("vendored_kernels")
    for name in set(sys.modules) - before:
        sys.modules.pop(name)


def test_copies_of_the_package_do_not_collide(vendored):
    hidden, weight, targets = batch(9, 0)
    expected = linear_logprob(hidden, weight, targets, backend="torch").logprob
    ops = sys.modules["vendored_kernels._ops"]
    assert ops.NAMESPACE == "vendored_kernels" != _ops.NAMESPACE
    assert str(ops.linear_logprob_op) != str(_ops.linear_logprob_op)
    assert torch.equal(vendored.linear_logprob(hidden, weight, targets, backend="torch").logprob, expected)
    # So does a second import under the same name.
    importlib.reload(ops)
    importlib.reload(sys.modules["vendored_kernels.linear_logprob"])
    again = sys.modules["vendored_kernels.linear_logprob"].linear_logprob(hidden, weight, targets, backend="torch")
    assert torch.equal(again.logprob, expected)
    again.logprob.sum().backward()
    assert hidden.grad is not None
