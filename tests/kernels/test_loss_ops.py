"""linear_tcopd_loss as a torch operator: registration, torch.compile, second backwards, vocabulary shards."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from oracle import Allocations, leaves, make_problem
from ranks import run_ranks
from tcopd_kernels import _loss_ops, linear_tcopd_loss
from tcopd_kernels._ops import HeadOptions
from tcopd_kernels.policy_loss import PolicyOptions, TokenTerms
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
    "every option": {"with_bias": True, "entropy": True, "softcap": 3.0, "temperature": 0.7, "from_reward": True},
    "float16": {"dtype": torch.float16, "with_bias": True, "entropy": True},
    "float64": {"dtype": torch.float64, "from_reward": True},
    "tolerance": {"grad_tol": 0.2, "with_bias": True, "from_reward": True},
    "float64 tokens": {"token_dtype": torch.float64, "from_reward": True},
    "frozen head": {"frozen": True},
    "no rows": {"n": 0, "entropy": True},
}


def op_arguments(
    dtype=torch.float32, with_bias=False, entropy=False, softcap=None, temperature=1.0, grad_tol=0.0,
    from_reward=False, frozen=False, n=N, token_dtype=torch.float32,
):  # fmt: skip
    hidden, weight, bias, targets = make_problem(n, VOCAB, DIM)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)
    bias = bias.requires_grad_(not frozen) if with_bias else None
    targets[1:2] = -100
    signal, base = torch.randn(n), torch.full((n,), -3.0)
    tokens = TokenTerms(signal, None, None, None, None, torch.full((n,), 0.1))
    if from_reward:
        tokens = TokenTerms(None, signal, base, base + 0.3, base + 0.2, torch.full((n,), 0.1))
    tokens = tokens.map(lambda t: t.to(token_dtype))
    policy = PolicyOptions(0.2, 0.2, 3.0, None, None, 0.1 if from_reward else 0.0)
    head = HeadOptions("torch", temperature, softcap, -100, grad_tol, 0, None, True)
    needs = [True, not frozen, with_bias and not frozen]
    return hidden, weight, bias, targets, needs, entropy, *tokens, *policy, *head


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_is_registered_soundly(name):
    opcheck(_loss_ops.linear_tcopd_loss_op, op_arguments(**SAMPLES[name]), test_utils=CHECKS)


def objective(hidden, weight, targets, advantage, **options):
    loss, metrics, tokens = linear_tcopd_loss(
        torch.tanh(hidden), weight, targets, advantage=advantage, weights=torch.full_like(advantage, 0.1),
        backend="torch", **options,
    )  # fmt: skip
    return 2.0 * loss, metrics, tokens.logprob


def batch(n, seed):
    hidden, weight, _, targets = make_problem(n, VOCAB, DIM, seed)
    targets[seed % n] = -100
    return *leaves((hidden, weight), torch.float32), targets, torch.randn(n)


@pytest.mark.parametrize("options", [{}, {"grad_tol": 0.3, "softcap": 4.0}], ids=["plain", "tolerance"])
def test_compiles_whole_and_once_for_all_batch_sizes(options):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for seed, n in enumerate((6, 9, 17, 5)):
        inputs = batch(n, seed)
        expected, found = objective(*inputs, **options), compiled(*inputs, **options)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(out[0], inputs[:2]) for out in (found, expected)]
        torch.testing.assert_close(*grads)
        assert not found[2].requires_grad and not any(m.requires_grad for m in found[1].values())
    assert counter.frame_count <= 2


def test_bad_arguments_are_named_inside_compiled_code():
    torch._dynamo.reset()
    hidden, weight, targets, advantage = batch(9, 0)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, targets, advantage)
    with pytest.raises(ValueError, match=r"targets holds 131, expected a token id in \[0, 31\)"):
        compiled(hidden, weight, torch.full_like(targets, 131), advantage)


def test_a_backward_of_the_plain_loss_copies_no_gradient():
    n, vocab, dim = 40, 500, 30
    hidden, weight, _, targets = make_problem(n, vocab, dim)
    inputs = leaves((hidden, weight), torch.float32)
    loss = linear_tcopd_loss(*inputs, targets, advantage=torch.ones(n), weights=torch.ones(n), backend="torch")[0]
    with Allocations() as plain:
        loss.backward(retain_graph=True)
    kept = [leaf.grad.clone() for leaf in inputs]
    with Allocations() as scaled:
        (3.0 * loss).backward()
    # Retaining the graph makes autograd copy what it would otherwise take.
    assert plain.sizes.count(vocab * dim) == 1 and vocab * dim in scaled.sizes
    for leaf, before in zip(inputs, kept, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * before)
    alone = leaves((hidden, weight), torch.float32)
    loss = linear_tcopd_loss(*alone, targets, advantage=torch.ones(n), weights=torch.ones(n), backend="torch")[0]
    with Allocations() as final:
        loss.backward()
    assert vocab * dim not in final.sizes
    for leaf, before in zip(alone, kept, strict=True):
        assert torch.equal(leaf.grad, before)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_second_backward_is_right_even_if_the_first_results_were_changed(scale):
    inputs = batch(9, 1)
    loss = scale * objective(*inputs)[0] / 2
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in inputs[:2]]
    for leaf in inputs[:2]:
        leaf.grad.mul_(7.0)
        leaf.grad = None
    loss.backward()
    assert all(torch.equal(leaf.grad, before) for leaf, before in zip(inputs[:2], first, strict=True))


def test_second_derivatives_are_refused():
    inputs = batch(9, 1)
    with pytest.raises(RuntimeError, match="no second derivatives; call backward without create_graph=True"):
        torch.autograd.grad(objective(*inputs)[0], inputs[1], create_graph=True)


SHARD_STARTS = [0, 23, 70]
SHARDED = {
    "torch": {"backend": "torch", "temperature": 0.7, "entropy": True},
    "softcap": {"backend": "torch", "softcap": 3.0},
    "triton": {"backend": "triton", "softcap": 3.0, "temperature": 1.2, "entropy": True},
    "triton tolerance": {"backend": "triton", "grad_tol": 0.02},
    "torch tolerance": {"backend": "torch", "grad_tol": 0.02},
}


def sharded_problem():
    hidden, weight, bias, targets = make_problem(21, SHARD_STARTS[-1], 16)
    targets[[3, 20]] = -100
    signal, drift = torch.randn(2, 21, generator=torch.Generator().manual_seed(1))
    tokens = {"reward": signal, "ref_logprob": drift - 5.0, "old_logprob": drift - 4.5, "ref_kl_coef": 0.1}
    return hidden, weight, bias, targets, tokens | {"weights": torch.full((21,), 1 / 19)}


def loss_of_shard(rows, group, **options):
    hidden, weight, bias, targets, tokens = sharded_problem()
    inputs = leaves((hidden, weight[rows], bias[rows]), torch.float32)
    shard = {} if group is None else {"vocab_start": rows.start, "process_group": group}
    loss, metrics, stats = linear_tcopd_loss(*inputs[:2], targets, bias=inputs[2], **tokens, **shard, **options)
    grads = torch.autograd.grad(loss, inputs)
    return loss.detach(), metrics, tuple(stats), grads


def run_shards():
    rows = slice(*SHARD_STARTS[dist.get_rank() :][:2])
    return {name: loss_of_shard(rows, dist.group.WORLD, **options) for name, options in SHARDED.items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return run_ranks(run_shards, 2, tmp_path_factory.mktemp("ranks"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", SHARDED)
def test_vocabulary_shards_give_the_loss_of_the_whole_head(shards, name):
    options = SHARDED[name] | {"backend": "torch", "grad_tol": 0.0}
    loss, metrics, stats, grads = loss_of_shard(slice(0, SHARD_STARTS[-1]), None, **options)
    ranks = [rank[name] for rank in shards]
    tolerance = SHARDED[name].get("grad_tol", 0.0)
    for found_loss, found_metrics, found_stats, found_grads in ranks:
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close({key: found_metrics[key] for key in metrics}, metrics)
        torch.testing.assert_close(found_stats, stats)
        assert torch.equal(found_grads[0], ranks[0][3][0])
        if tolerance:
            assert found_metrics["dropped_mass_max"] <= tolerance / 2
    joined = [ranks[0][3][0], *(torch.cat([rank[3][i] for rank in ranks]) for i in (1, 2))]
    for grad, true in zip(joined, grads, strict=True):
        # The dropped mass is at most `tolerance` of each row, of which the largest norm here is a few units.
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-6 + tolerance * true.abs().max().item())
