"""The Triton kernels under Triton's interpreter, against float64 on materialised logits.

The interpreter must be chosen before Triton is imported, so `test_in_own_process` runs this file and
test_triton_faults.py in a process with TRITON_INTERPRET=1; only there are the other tests collected. bfloat16 is
left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tcopd_kernels import linear_logprob, reference
from tcopd_kernels._backend import load_backend
from tcopd_kernels.types import Partials, TokenLogprobs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UPSTREAMS = ("logprob", "lse", "entropy")
SHAPES_NVD = [(1, 5, 3), (16, 16, 16), (1, 83, 16), (37, 83, 29), (33, 130, 40), (5, 40, 7)]
OPTIONS: dict[str, dict] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "temperature": 1.6, "softcap": 3.0},
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    files = [__file__, str(Path(__file__).with_name("test_triton_faults.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def make_inputs(N, V, D, dtype=torch.float32, *, bias=False, scale=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=gen).to(dtype)
    weight = (torch.randn(V, D, generator=gen) * scale * 2 / D**0.5).to(dtype)
    targets = torch.randint(0, V, (N,), generator=gen)
    return hidden, weight, targets, torch.randn(V, generator=gen).to(dtype) if bias else None


def make_upstream(N, names=UPSTREAMS, size=1.0):
    gen = torch.Generator().manual_seed(1)
    grads = {name: size * torch.randn(N, generator=gen) for name in UPSTREAMS}
    return {name: grads[name] for name in names}


def outputs_and_grads(function, hidden, weight, targets, bias, upstream, **options):
    """{name: tensor} of the three outputs and of the gradients of Σ upstream·output."""
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    out = function(leaves["hidden"], leaves["weight"], targets, bias=leaves.get("bias"), **options)
    loss = sum((getattr(out, name) * grad.to(out.lse.dtype)).sum() for name, grad in upstream.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {name: value.detach() for name, value in out._asdict().items() if value is not None} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def run_triton(hidden, weight, targets, bias, upstream, **options):
    def function(*args, **kwargs):
        return linear_logprob(*args, backend="triton", **kwargs)

    return outputs_and_grads(function, hidden, weight, targets, bias, upstream, **options)


def run_float64(hidden, weight, targets, bias, upstream, **options):
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    return outputs_and_grads(reference.linear_logprob, wide[0], wide[1], targets, wide[2], upstream, **options)


def plain_torch(hidden, weight, targets, *, bias, temperature=1.0, softcap=None, entropy=False):
    """What a user writes: the head in the input dtype, the softmax in fp32."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    H = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)
    logprob = log_p.gather(1, targets[:, None]).squeeze(1)
    return TokenLogprobs(logprob, torch.logsumexp(z / temperature, dim=-1), H if entropy else None)


def assert_as_good_as_torch(hidden, weight, targets, bias, upstream, grad_floor=None, **options):
    """The largest error is at most twice that of torch, plus a few roundings of the largest element.

    Outputs are held against torch in fp32, gradients against torch in the input dtype.
    """
    if grad_floor is None:
        grad_floor = 2e-6 if hidden.dtype == torch.float32 else 1e-3
    oracle = run_float64(hidden, weight, targets, bias, upstream, **options)
    ours = run_triton(hidden, weight, targets, bias, upstream, **options)
    wide = outputs_and_grads(reference.linear_logprob, hidden, weight, targets, bias, upstream, **options)
    same = outputs_and_grads(plain_torch, hidden, weight, targets, bias, upstream, **options)
    assert ours.keys() == oracle.keys()
    for name, exact in oracle.items():
        is_grad = name.startswith("grad_")
        theirs = same[name] if is_grad else wide[name]
        limit = 2 * (theirs - exact).abs().max() + (grad_floor if is_grad else 2e-6) * exact.abs().max() + 1e-7
        error = (ours[name] - exact).abs().max()
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"  # false for NaN
        assert ours[name].dtype == (hidden.dtype if is_grad else torch.float32)


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


# numpy warns about the products with infinity that the kernels select away.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES_NVD, ids=str)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_matches_float64(self, shape, options, dtype):
        options = dict(options)
        inputs = make_inputs(*shape, dtype, bias=options.pop("bias", False))
        assert_as_good_as_torch(*inputs, make_upstream(shape[0]), entropy=True, **options)
        assert_as_good_as_torch(*inputs, make_upstream(shape[0], ["logprob"]), entropy=False, **options)

    @pytest.mark.parametrize("count", [1, 2])
    def test_upstream_gradients_alone_and_in_pairs(self, count):
        inputs = make_inputs(19, 50, 24, bias=True)
        for names in itertools.combinations(UPSTREAMS, count):
            upstream = make_upstream(19, names)
            assert_as_good_as_torch(*inputs, upstream, entropy=True, temperature=0.8, softcap=4.0)

    def test_only_the_needed_gradients(self):
        hidden, weight, targets, bias = make_inputs(19, 50, 24, bias=True)
        every = run_triton(hidden, weight, targets, bias, make_upstream(19, ["logprob"]))
        for name in ("hidden", "weight", "bias"):
            leaves = {"hidden": hidden, "weight": weight, "bias": bias}
            leaves[name] = leaves[name].clone().requires_grad_()
            out = linear_logprob(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], backend="triton")
            (out.logprob * make_upstream(19)["logprob"]).sum().backward()
            assert torch.equal(leaves[name].grad, every[f"grad_{name}"])

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_logits_of_plus_and_minus_ten_thousand(self, temperature):
        hidden, weight, targets, _ = make_inputs(17, 45, 16, scale=2500.0)
        assert (hidden @ weight.T).abs().max() > 1e4
        # p = exp(z − lse) carries the rounding of an lse near 2e4: 1e-3.
        upstream = make_upstream(17)
        assert_as_good_as_torch(
            hidden, weight, targets, None, upstream, grad_floor=2e-3, entropy=True, temperature=temperature
        )

    @pytest.mark.parametrize("offset", [-1e3, -2e4, 1e4])
    def test_all_logits_far_from_zero(self, offset):
        hidden, weight, targets, bias = make_inputs(17, 45, 16, bias=True)
        upstream = make_upstream(17)
        assert_as_good_as_torch(hidden, weight, targets, bias + offset, upstream, grad_floor=2e-3, entropy=True)

    def test_columns_with_minus_infinite_bias_have_no_probability(self):
        hidden, weight, targets, bias = make_inputs(17, 45, 16, bias=True)
        bias[:20] = float("-inf")
        targets = targets.clamp_min(20)
        found = run_triton(hidden, weight, targets, bias, make_upstream(17), entropy=True)
        rest = run_float64(hidden, weight[20:], targets - 20, bias[20:], make_upstream(17), entropy=True)
        for name, exact in rest.items():
            cut = found[name][20:] if name in ("grad_weight", "grad_bias") else found[name]
            torch.testing.assert_close(cut, exact.float(), rtol=1e-5, atol=1e-5)
        assert not found["grad_weight"][:20].any() and not found["grad_bias"][:20].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_every_element_is_written_and_runs_agree_bitwise(self, monkeypatch, dtype):
        inputs = make_inputs(37, 83, 29, dtype, bias=True)
        options = {"entropy": True, "softcap": 4.0}
        clean = run_triton(*inputs, make_upstream(37), **options)
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
        assert torch.empty(3).isnan().all()
        stained = run_triton(*inputs, make_upstream(37), **options)
        assert all(torch.equal(clean[name], stained[name]) for name in clean)

    def test_second_backward_gives_the_same(self):
        hidden, weight, targets, _ = make_inputs(19, 50, 24)
        hidden.requires_grad_()
        logprob = linear_logprob(hidden, weight, targets, backend="triton").logprob
        first = torch.autograd.grad(logprob.sum(), hidden, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(logprob.sum(), hidden)[0])

    def test_strided_inputs(self):
        N, V, D = 19, 50, 24
        hidden, weight, targets, bias = make_inputs(N, V, D, bias=True)
        wide_hidden = torch.full((N, 2 * D), float("nan"))
        tall_weight = torch.full((2 * V, D + 3), float("nan"))
        views = {
            "column slice": (wide_hidden[:, 3 : 3 + D], tall_weight[::2, 1 : 1 + D]),
            "every second column": (wide_hidden[:, ::2], torch.full((D, V), float("nan")).T),
        }
        strided_targets = targets.repeat_interleave(2)[::2]
        strided_bias = bias.repeat_interleave(3)[::3]
        expected = run_triton(hidden, weight, targets, bias, make_upstream(N), entropy=True)
        for name, (hidden_view, weight_view) in views.items():
            hidden_view.copy_(hidden)
            weight_view.copy_(weight)
            upstream = {k: g.repeat_interleave(2)[::2] for k, g in make_upstream(N).items()}
            found = run_triton(hidden_view, weight_view, strided_targets, strided_bias, upstream, entropy=True)
            assert all(torch.allclose(found[k], expected[k], rtol=1e-5, atol=1e-6) for k in expected), name

    def test_ignored_rows_and_rows_without_gradient(self):
        hidden, weight, targets, _ = make_inputs(19, 50, 24)
        targets[::3] = -100
        upstream = make_upstream(19, ["logprob", "lse"])
        for gradient in upstream.values():
            gradient[1::3] = 0.0
        found = run_triton(hidden, weight, targets, None, upstream)
        exact = run_float64(hidden, weight, targets, None, upstream)
        for name in exact:
            torch.testing.assert_close(found[name], exact[name].float(), rtol=1e-5, atol=1e-5)
        assert not found["logprob"][::3].any()
        assert not found["grad_hidden"][::3].any() and not found["grad_hidden"][1::3].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_descriptor_path_equals_pointer_path(self, monkeypatch, dtype):
        from tcopd_kernels import _triton_backward, _triton_forward

        inputs = make_inputs(35, 83, 40, dtype, bias=True)
        pointer = run_triton(*inputs, make_upstream(35), entropy=True)
        for module in (_triton_forward, _triton_backward):
            monkeypatch.setattr(module, "tma_usable", lambda *matrices: True)
        descriptor = run_triton(*inputs, make_upstream(35), entropy=True)
        assert all(torch.equal(pointer[name], descriptor[name]) for name in pointer)

    def test_backward_in_several_chunks(self, monkeypatch):
        from tcopd_kernels import _triton_backward

        inputs = make_inputs(19, 300, 24, bias=True)
        whole = run_triton(*inputs, make_upstream(19), entropy=True)
        monkeypatch.setattr(_triton_backward, "MIN_CHUNK", 128)
        monkeypatch.setattr(_triton_backward, "WORKSPACE_BYTES", 1)
        assert _triton_backward.chunk_columns(19, 300, 4) == 128
        chunked = run_triton(*inputs, make_upstream(19), entropy=True)
        assert all(torch.allclose(whole[name], chunked[name], rtol=1e-5, atol=1e-6) for name in whole)

    def test_small_float16_gradients_do_not_underflow(self):
        hidden, weight, targets, _ = make_inputs(37, 83, 16, torch.float16)
        hidden, weight = hidden * 128, weight / 128
        upstream = make_upstream(37, ["logprob"], size=1e-5)
        exact = run_float64(hidden, weight, targets, None, upstream)["grad_weight"]
        dlogits_quantum = 2.0**-24  # the smallest float16 subnormal, above most of 1e-5·p
        assert upstream["logprob"].abs().mean() / 83 < 4 * dlogits_quantum
        found = run_triton(hidden, weight, targets, None, upstream)["grad_weight"]
        assert (found - exact).norm() <= 2e-3 * exact.norm()

    @pytest.mark.parametrize("size", [1e-12, 1e4, float("inf"), float("nan")])
    def test_float16_scale_of_any_upstream_size(self, size):
        hidden, weight, targets, _ = make_inputs(7, 33, 16, torch.float16)
        upstream = {"logprob": torch.full((7,), size)}
        found = run_triton(hidden, weight, targets, None, upstream)["grad_hidden"]
        exact = run_float64(hidden, weight, targets, None, upstream)["grad_hidden"].to(torch.float16)
        if size < 1e5:
            torch.testing.assert_close(found, exact, rtol=5e-3, atol=1e-3 * size)
        else:
            assert not found.isfinite().any()

    def test_no_rows(self):
        hidden, weight, targets, bias = make_inputs(0, 50, 24, bias=True)
        found = run_triton(hidden, weight, targets, bias, make_upstream(0), entropy=True)
        assert found["logprob"].shape == found["entropy"].shape == (0,)
        assert found["grad_hidden"].shape == (0, 24)
        assert not found["grad_weight"].any() and not found["grad_bias"].any()

    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_shards_of_the_vocabulary(self, softcap):
        """Statistics of parts merge to those of the whole; a target outside of a part counts nowhere in it."""
        hidden, weight, targets, bias = make_inputs(21, 90, 24, bias=True)
        triton = load_backend("triton")
        options = {"temperature": 0.8, "softcap": softcap}
        logprob, lse, entropy = triton.forward(hidden, weight, targets, bias=bias, entropy=True, **options)
        upstream = list(make_upstream(21).values())
        needs = {"need_hidden": True, "need_weight": True, "need_bias": True}
        whole = triton.backward(hidden, weight, targets, lse, entropy, *upstream, bias=bias, **options, **needs)
        parts, grads = [], []
        for start, stop in ((0, 33), (33, 34), (34, 90)):
            head = (weight[start:stop], targets - start)
            parts.append(triton.partials(hidden, *head, bias=bias[start:stop], entropy=True, **options))
            grads.append(
                triton.backward(hidden, *head, lse, entropy, *upstream, bias=bias[start:stop], **options, **needs)
            )
            here = (targets >= start) & (targets < stop)
            assert torch.equal(parts[-1].target_logit != 0, here)
        top = torch.stack([part.max for part in parts]).amax(0)
        shift = [part.max - top for part in parts]
        total = sum(part.sum * s.exp() for part, s in zip(parts, shift, strict=True))
        dot = sum(s.exp() * (part.dot + s * part.sum) for part, s in zip(parts, shift, strict=True))
        merged = triton.finish(Partials(top, total, dot, sum(part.target_logit for part in parts)))
        for found, exact in zip(merged, (logprob, lse, entropy), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sum(g[0] for g in grads), whole[0], rtol=1e-5, atol=1e-6)
        for index in (1, 2):
            torch.testing.assert_close(torch.cat([g[index] for g in grads]), whole[index], rtol=1e-5, atol=1e-6)

    def test_forward_is_finish_of_partials(self):
        hidden, weight, targets, bias = make_inputs(21, 90, 24, bias=True)
        triton = load_backend("triton")
        options = {"bias": bias, "temperature": 0.8, "softcap": 3.0, "entropy": True}
        partials = triton.partials(hidden, weight, targets, **options)
        every = zip(triton.finish(partials), triton.forward(hidden, weight, targets, **options), strict=True)
        assert all(torch.equal(a, b) for a, b in every)
        assert triton.finish(partials._replace(dot=None))[2] is None

    def test_refused_dtypes(self):
        from tcopd_kernels._triton_common import check_operands

        with pytest.raises(TypeError, match=r"float16 and torch\.float32"):
            check_operands(torch.ones(2, 3).half(), torch.ones(4, 3))
        with pytest.raises(TypeError, match="float64"):
            check_operands(torch.ones(2, 3).double(), torch.ones(4, 3).double())
        with pytest.raises(TypeError, match="interpreter"):
            check_operands(torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16())

    @pytest.mark.parametrize("N, V, itemsize", [(1, 5, 4), (8192, 131072, 2), (8192, 50257, 4), (10**6, 262144, 2)])
    def test_chunks_are_even_and_bounded(self, N, V, itemsize):
        from tcopd_kernels._triton_backward import MIN_CHUNK, WORKSPACE_BYTES, chunk_columns

        chunk = chunk_columns(N, V, itemsize)
        assert chunk % 128 == 0
        assert N * chunk * itemsize <= max(WORKSPACE_BYTES, N * MIN_CHUNK * itemsize)
        assert V - (-(-V // chunk) - 1) * chunk > 0
        if N == 8192 and V == 131072:
            assert chunk == 16384

    @pytest.mark.parametrize("row_blocks, tiles, processors", [(64, 1024, 132), (1, 7, 132), (1, 1, 8), (999, 64, 108)])
    def test_splits_cover_the_vocabulary_and_keep_the_gpu_busy(self, row_blocks, tiles, processors):
        from tcopd_kernels._triton_forward import vocab_splits

        splits, per_split = vocab_splits(row_blocks, tiles, processors)
        assert (splits - 1) * per_split < tiles <= splits * per_split
        steps = -(-row_blocks * splits // processors) * per_split
        assert steps <= max(1.25 * row_blocks * tiles / processors, 1)
