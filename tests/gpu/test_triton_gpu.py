"""The compiled Triton kernels: bf16, fp16 and fp32, ragged shapes, both load paths, large offsets."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from gpu_mode import DEVICE, DTYPES, GRAD_LIMIT, HALF, HALVES, sized
from tcopd_kernels import linear_logprob, reference

SHAPES_NVD = sized(
    [(1, 5, 8), (13, 1000, 96), (64, 4099, 72), (200, 50257, 768), (515, 32003, 136), (333, 2048, 101)],
    [(1, 5, 8), (13, 100, 40), (37, 131, 29)],
)
OPTIONS: dict[str, dict] = {
    "plain": {},
    "all": {"bias": True, "temperature": 0.7, "softcap": 10.0, "entropy": True},
    "entropy": {"entropy": True},
}


def make_inputs(N, V, D, dtype, bias=False):
    gen = torch.Generator(DEVICE).manual_seed(N + V + D)
    hidden = torch.randn(N, D, generator=gen, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, generator=gen, device=DEVICE) * 2 / D**0.5).to(dtype)
    targets = torch.randint(0, V, (N,), generator=gen, device=DEVICE)
    return hidden, weight, targets, torch.randn(V, generator=gen, device=DEVICE).to(dtype) if bias else None


def outputs_and_grads(function, hidden, weight, targets, bias, **options):
    """Outputs, and the gradients of a fixed random weighting of them, by name."""
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    out = function(leaves["hidden"], leaves["weight"], targets, bias=leaves.get("bias"), **options)
    outputs = {name: value for name, value in out._asdict().items() if value is not None}
    gen = torch.Generator(DEVICE).manual_seed(1)
    upstream = [torch.randn(len(targets), generator=gen, device=DEVICE) for _ in outputs]
    loss = sum((value * grad).sum() for value, grad in zip(outputs.values(), upstream, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {name: value.detach() for name, value in outputs.items()} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def run_triton(*inputs, **options):
    return outputs_and_grads(lambda *a, **k: linear_logprob(*a, backend="triton", **k), *inputs, **options)


def run_wide(hidden, weight, targets, bias, **options):
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    return outputs_and_grads(reference.linear_logprob, wide[0], wide[1], targets, wide[2], **options)


def relative_error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def assert_accurate(found, exact, dtype):
    """Outputs to fp32 accuracy; gradients to twice the rounding of the input dtype."""
    for name, value in exact.items():
        limit = GRAD_LIMIT[dtype] if name.startswith("grad_") else 5e-6
        error = relative_error(found[name], value)
        assert error <= limit, f"{name}: relative error {error:.3g}, limit {limit:.3g}"  # false for NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_NVD, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_float64(shape, options, dtype):
    options = dict(options)
    inputs = make_inputs(*shape, dtype, bias=options.pop("bias", False))
    assert_accurate(run_triton(*inputs, **options), run_wide(*inputs, **options), dtype)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_unaligned_base_and_strided_rows(dtype):
    """A base one element off a 16-byte boundary takes the pointer path; a padded row stride keeps TMA."""
    N, _, D = shape = sized((200, 3001, 128), (20, 131, 32))
    hidden, weight, targets, _ = make_inputs(*shape, dtype)
    exact = run_wide(hidden, weight, targets, None, entropy=True)
    for offset, padding in ((1, 7), (0, 64)):
        store = torch.full((N, D + padding + offset), float("nan"), dtype=dtype, device=DEVICE)
        view = store[:, offset : offset + D]
        view.copy_(hidden)
        with torch.no_grad():
            out = linear_logprob(view, weight, targets, entropy=True, backend="triton")
        found = {name: value for name, value in out._asdict().items()}
        assert_accurate(found, {name: exact[name] for name in found}, dtype)


@pytest.mark.parametrize("compact", [False, True])
def test_every_tile_agrees(monkeypatch, compact):
    """The timed candidates, flattened and specialised ones among them, differ only in the order of their sums."""
    from tcopd_kernels import _triton_backward, _triton_forward, _triton_tiles

    inputs = make_inputs(*sized((515, 5003, 264), (35, 300, 40)), HALF)
    exact = run_wide(*inputs, entropy=not compact)
    arch, _, shared = sized(_triton_tiles.device_limits(inputs[0].device), (90, 132, 227 << 10))
    families = (_triton_tiles.forward_tiles, _triton_tiles.dlogits_tiles)
    tiles = {t for family in families for N in (16, 64, 8192) for t in family(arch, 2, N, True, compact)}
    tested = 0
    for tile in tiles:
        if tile.shared_bytes(2) > shared - 4096:
            continue
        for module in (_triton_forward, _triton_backward):
            monkeypatch.setattr(module, "pick_tile", lambda *args, tile=tile, **kwargs: tile)
        # A tolerance that no row of this flat problem meets: bounds and row masses are computed, the result is exact.
        found = run_triton(*inputs, entropy=not compact, grad_tol=2.0**-8 if compact else 0.0)
        assert_accurate(found, exact, HALF)
        tested += 1
    assert tested >= 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bitwise_repeatable(dtype):
    inputs = make_inputs(*sized((515, 32003, 264), (35, 131, 40)), dtype, bias=True)
    run_triton(*inputs, entropy=True)  # the tile is chosen here
    first = run_triton(*inputs, entropy=True)
    second = run_triton(*inputs, entropy=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_over_several_chunks_stays_in_its_workspace(monkeypatch):
    from tcopd_kernels import _triton_backward

    N, V, _ = shape = sized((515, 32003, 264), (20, 1100, 16))
    inputs = make_inputs(*shape, HALF, bias=True)
    whole = run_triton(*inputs)
    monkeypatch.setattr(_triton_backward, "WORKSPACE_BYTES", sized(1 << 21, 1))
    monkeypatch.setattr(_triton_backward, "MIN_CHUNK", sized(_triton_backward.MIN_CHUNK, 128))
    chunk = _triton_backward.chunk_columns(N, V, 2)
    assert chunk < V / 8
    chunked = run_triton(*inputs)
    for name in whole:
        assert relative_error(chunked[name], whole[name]) < 1e-3, name


def test_memory_is_far_below_the_logits():
    N, V, D = sized((4096, 131072, 512), (20, 131, 32))
    hidden, weight, targets, _ = make_inputs(N, V, D, HALF)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, targets, backend="triton").logprob.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets, backend="triton").logprob.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (256 << 20) + 4 * N * D * 4 + (8 << 20)
    assert extra < N * V * 2 / 3


@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-6])
def test_weight_with_more_than_two_to_the_31_elements(bounds_in_proportion, grad_tol):
    """Offsets of the last rows do not fit 32 bits, in the weight and its gradient. The pointer path is forced by an odd
    hidden size.

    With a tolerance the last columns hold nearly all mass, and compaction keeps only some of them.
    """
    D = sized(4097, 33)
    V = sized((1 << 31) // D + 1000, 1300)
    if torch.cuda.mem_get_info()[0] < 2.5 * V * D * 2:
        pytest.skip("needs about 11 GB of free GPU memory")
    weight = torch.zeros(V, D, dtype=HALF, device=DEVICE)
    tail = sized(512, 128)
    gen = torch.Generator(DEVICE).manual_seed(0)
    weight[-tail:] = torch.randn(tail, D, generator=gen, device=DEVICE) / (sized(4, 0.4) if grad_tol else 16)
    hidden = torch.randn(33, D, generator=gen, device=DEVICE).to(HALF)
    targets = torch.arange(V - 33, V, device=DEVICE)
    leaves, certificate = (hidden.clone().requires_grad_(), weight.requires_grad_()), {}
    out = linear_logprob(*leaves, targets, backend="triton", grad_tol=grad_tol, certificate=certificate)
    grad_hidden, grad_weight = torch.autograd.grad(out.logprob.sum(), leaves)
    weight.requires_grad_(False)

    h = hidden.double().requires_grad_()
    z = h @ weight[-tail:].double().T
    zeros = torch.zeros(33, 1, dtype=torch.float64, device=DEVICE)
    count = torch.log(torch.tensor(float(V - tail), dtype=torch.float64))
    lse = torch.logsumexp(torch.cat([z, zeros + count.to(DEVICE)], dim=1), dim=1)
    logprob = z[:, -33:].diagonal() - lse
    logprob.sum().backward()
    assert relative_error(out.logprob.detach(), logprob.detach()) < 5e-6
    dropped = certificate["dropped_mass_max"].item()
    allowed = dropped * weight[-tail:].double().norm(dim=1).max()
    error = (grad_hidden.double() - h.grad).norm(dim=1)
    assert (error <= allowed + 2.0**-7 * h.grad.norm(dim=1)).all()

    h, z, lse = h.detach(), z.detach(), lse.detach()
    dz = -torch.exp(z - lse[:, None])
    dz[:, -33:] += torch.eye(33, device=DEVICE)
    true_tail, true_other = dz.T @ h, -(torch.exp(-lse) @ h)  # all rows that are zero have one gradient
    allowed = dropped * h.norm(dim=1).sum()
    assert (grad_weight[-tail:].double() - true_tail).norm() <= allowed + 2.0**-7 * true_tail.norm()
    for part in grad_weight[:-tail].split(8192):
        size = true_other.norm() * len(part) ** 0.5
        assert (part.double() - true_other).norm() <= (allowed + size if grad_tol else 2.0**-6 * size)
    if grad_tol:
        assert certificate["dense_row_count"] < 33 and certificate["kept_column_sum"] < 33 * V / 4


def test_outputs_on_a_device_that_is_not_current():
    if sized(torch.cuda.device_count(), 2) < 2:
        pytest.skip("needs two GPUs")
    inputs = [None if x is None else x.to(sized("cuda:1", "cpu")) for x in make_inputs(33, 515, 64, HALF)]
    with sized(torch.cuda.device(0), nullcontext()):
        found = linear_logprob(inputs[0], inputs[1], inputs[2], backend="triton").logprob
    exact = reference.linear_logprob(inputs[0].double(), inputs[1].double(), inputs[2]).logprob
    assert relative_error(found, exact) < 5e-6
