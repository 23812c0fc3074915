"""linear_logprob's operators on a GPU: registration, torch.compile with Triton kernels inside, autocast, shards."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing
from gpu_mode import DEVICE, HALF, sized
from tcopd_kernels import _ops, linear_logprob, linear_tcopd_loss
from torch.library import opcheck

VOCAB, DIM = sized((1003, 72), (103, 24))
RANKS = 2
# N, V, D, and the first row of the second rank's shard
SHARDED = {
    "small": sized((65, 1003, 72, 400), (33, 103, 24, 40)),
    "full size": sized((32768, 262144, 64, 100_000), (21, 131, 16, 50)),
}
BACKEND = sized("auto", "triton")


def make_batch(n, dtype=HALF, seed=0, vocab=VOCAB, dim=DIM):
    gen = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(n, dim, generator=gen, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=gen, device=DEVICE) * 3 / dim**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=gen, device=DEVICE)
    targets[n // 2] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("grad_tol", [0.0, 0.1])
def test_operator_is_registered_soundly(backend, entropy, grad_tol):
    hidden, weight, targets = make_batch(33)
    bias = torch.randn(VOCAB, device=DEVICE, requires_grad=True)
    options = _ops.HeadOptions(backend, 0.8, 10.0, -100, grad_tol, 0, None, True)
    opcheck(_ops.linear_logprob_op, (hidden, weight, bias, targets, None, entropy, *options))


def objective(hidden, weight, targets, **options):
    out = linear_logprob(torch.tanh(hidden), weight, targets, entropy=True, backend=BACKEND, **options)
    return (out.logprob * 2.0 + out.entropy).sum()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-8])
def test_compiled_training_equals_eager(mode, grad_tol):
    """Also under CUDA graphs, which leave the operator out."""
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, mode=mode)
    for seed, n in enumerate(sized((40, 64, 129, 129), (9, 12, 17, 17))):
        hidden, weight, targets = make_batch(n, torch.float16, seed)
        expected = objective(hidden, weight, targets, grad_tol=grad_tol)
        loss = compiled(hidden, weight, targets, grad_tol=grad_tol)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        found = torch.autograd.grad(loss, (hidden, weight))
        for a, b in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
            scale = b.float().abs().max().item()
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * scale)


def test_batch_sizes_share_one_compiled_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for n in sized((40, 64, 129, 7), (9, 12, 17, 3)):
        compiled(*make_batch(n)).backward()
    assert counter.frame_count <= 2


def test_autocast_takes_the_operands_as_linear_does():
    hidden, weight, targets = make_batch(50, torch.float32)
    expected = linear_logprob(hidden.to(HALF), weight.to(HALF), targets, backend=BACKEND).logprob
    with torch.autocast(DEVICE, dtype=HALF):
        out = linear_logprob(hidden.to(HALF), weight, targets, backend=BACKEND).logprob
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def results(hidden, weight, targets, grad_tol=0.0, **shard):
    """[logprob, lse, entropy, gradients of hidden and weight] of linear_logprob, [loss, the two] of the fused loss."""
    options = {"grad_tol": grad_tol, "backend": BACKEND, **shard}
    out = linear_logprob(hidden, weight, targets, entropy=True, **options)
    advantage, weights = torch.linspace(-1, 1, 2 * len(targets), device=DEVICE).view(2, -1)
    loss = linear_tcopd_loss(hidden, weight, targets, advantage=advantage, weights=weights, **options)[0]
    values = [*out, *torch.autograd.grad(out.logprob.sum(), (hidden, weight))]
    values += [loss, *torch.autograd.grad(loss, (hidden, weight))]
    return [t.detach().cpu() for t in values]


def run_shard(rank, folder):
    """Two ranks on one device, through gloo: NCCL takes one rank per device."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    found = {}
    for name, (n, vocab, dim, cut) in SHARDED.items():
        hidden, weight, targets = make_batch(n, vocab=vocab, dim=dim)
        rows = slice(0, cut) if rank == 0 else slice(cut, vocab)
        part = weight[rows].detach().clone().requires_grad_()
        shard = {"vocab_start": rows.start, "process_group": dist.group.WORLD}
        found[name] = [results(hidden, part, targets, grad_tol, **shard) for grad_tol in (0.0, 2.0**-6)]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_shards_equal_the_whole_head(tmp_path):
    torch.multiprocessing.spawn(run_shard, (tmp_path,), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name, (n, vocab, dim, _) in SHARDED.items():
        hidden, weight, targets = make_batch(n, vocab=vocab, dim=dim)
        (exact, tolerant), (other, _) = (found[name] for found in ranks)
        shared = [0, 1, 2, 3, 5, 6]  # what both ranks get; the others are the gradients of their own rows
        assert all(torch.equal(exact[i], other[i]) for i in shared)
        joined = [exact[i] if i in shared else torch.cat([exact[i], other[i]]) for i in range(len(exact))]
        whole = results(hidden, weight, targets)
        for value, expected in zip(joined, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2 * expected.float().abs().max().item())
        bound = 2.0**-6 * weight.detach().float().norm(dim=1).max().item()
        rounding = 2.0**-6 * whole[3].float().norm(dim=1).max()
        assert ((tolerant[3] - exact[3]).float().norm(dim=1) <= bound + rounding).all()
