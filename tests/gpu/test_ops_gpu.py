"""linear_logprob's operators on a GPU: registration, torch.compile with Triton kernels inside, autocast, shards."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing
from tcopd_kernels import _ops, linear_logprob
from torch.library import opcheck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, DIM = 1003, 72
RANKS, CUT = 2, 400


def make_batch(n, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, DIM, generator=gen, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, generator=gen, device="cuda") * 3 / DIM**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (n,), generator=gen, device="cuda")
    targets[n // 2] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("grad_tol", [0.0, 0.1])
def test_operator_is_registered_soundly(backend, entropy, grad_tol):
    hidden, weight, targets = make_batch(33)
    bias = torch.randn(VOCAB, device="cuda", requires_grad=True)
    options = _ops.HeadOptions(backend, 0.8, 10.0, -100, grad_tol, 0, None, True)
    opcheck(_ops.linear_logprob_op, (hidden, weight, bias, targets, None, entropy, *options))


def objective(hidden, weight, targets, **options):
    out = linear_logprob(torch.tanh(hidden), weight, targets, entropy=True, **options)
    return (out.logprob * 2.0 + out.entropy).sum()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-8])
def test_compiled_training_equals_eager(mode, grad_tol):
    """Also under CUDA graphs, which leave the operator out."""
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, mode=mode)
    for seed, n in enumerate((40, 64, 129, 129)):
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
    for n in (40, 64, 129, 7):
        compiled(*make_batch(n)).backward()
    assert counter.frame_count <= 2


def test_autocast_takes_the_operands_as_linear_does():
    hidden, weight, targets = make_batch(50, torch.float32)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets).logprob
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = linear_logprob(hidden.bfloat16(), weight, targets).logprob
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def run_shard(rank, folder):
    """Two ranks on one device, through gloo: NCCL takes one rank per device."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    hidden, weight, targets = make_batch(65)
    rows = slice(0, CUT) if rank == 0 else slice(CUT, VOCAB)
    part = weight[rows].detach().clone().requires_grad_()
    results = []
    for grad_tol in (0.0, 2.0**-6):
        out = linear_logprob(
            hidden, part, targets, entropy=True, grad_tol=grad_tol,
            vocab_start=rows.start, process_group=dist.group.WORLD,
        )  # fmt: skip
        grads = torch.autograd.grad(out.logprob.sum(), (hidden, part))
        results.append([t.detach().cpu() for t in (*out, *grads)])
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_shards_equal_the_whole_head(tmp_path):
    torch.multiprocessing.spawn(run_shard, (tmp_path,), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    hidden, weight, targets = make_batch(65)
    out = linear_logprob(hidden, weight, targets, entropy=True)
    grads = [g.cpu() for g in torch.autograd.grad(out.logprob.sum(), (hidden, weight))]
    (exact, tolerant), other = ranks[0], ranks[1]
    for value, expected in zip(exact, (*(t.detach().cpu() for t in out), grads[0]), strict=False):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2 * expected.float().abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(exact[:4], other[0][:4], strict=True))
    joined = torch.cat([exact[4], other[0][4]])
    torch.testing.assert_close(joined, grads[1], rtol=2e-2, atol=2e-2 * grads[1].float().abs().max().item())
    bound = 2.0**-6 * weight.float().norm(dim=1).max().item()
    rounding = 2.0**-6 * grads[0].float().norm(dim=1).max()
    assert ((tolerant[3] - exact[3]).float().norm(dim=1) <= bound + rounding).all()
