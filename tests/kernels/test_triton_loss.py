"""The Triton single pass of linear_tcopd_loss under Triton's interpreter, against float64 on materialised logits.

The interpreter must be chosen before Triton is imported, so `test_in_own_process` runs this file again in a process
with TRITON_INTERPRET=1; only there are the other tests collected. bfloat16 is left out: the interpreter multiplies
it wrongly.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import assert_no_worse_than_torch, leaves, make_problem, plain_logprob
from tcopd_kernels import linear_tcopd_loss, tcopd_policy_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16)
SHAPES_NVD = [(1, 5, 3), (16, 16, 16), (37, 83, 29), (33, 130, 40)]
OPTIONS: dict[str, dict] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"temperature": 1.6, "softcap": 3.0, "with_bias": True, "entropy": True},
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def make_case(n, vocab, dim, dtype=torch.float32, *, with_bias=False, off_policy=True, size=1.0, **head):
    """(hidden, weight, bias or None), targets, per-token arguments, head options. Every fifth row has no gradient."""
    hidden, weight, bias, targets = make_problem(n, vocab, dim)
    head_tensors = [t.to(dtype) for t in (hidden, weight)] + [bias.to(dtype) if with_bias else None]
    generator = torch.Generator().manual_seed(3)
    advantage, drift, engine = torch.randn(3, n, generator=generator)
    advantage[4::5] = 0.0
    tokens = {"advantage": advantage, "weights": size * torch.rand(n, generator=generator) / n}
    if off_policy:
        wide = [None if t is None else t.double() for t in head_tensors]
        options = {key: head[key] for key in ("temperature", "softcap") if key in head}
        logprob = plain_logprob(wide[0], wide[1], targets, wide[2], **options)[0].float()
        tokens |= {"old_logprob": logprob + 0.3 * drift, "rollout_logprob": logprob + 0.3 * drift + 0.1 * engine}
    return head_tensors, targets, tokens, head


def plain_loss(hidden, weight, targets, *, bias, advantage, temperature=1.0, softcap=None, entropy=False, **policy):
    logprob = plain_logprob(hidden, weight, targets, bias, temperature, softcap)[0]
    return tcopd_policy_loss(logprob, advantage, **policy)[0]


def loss_and_grads(function, head_tensors, targets, tokens, head, dtype=None):
    """[loss, gradients of hidden, weight and, if there is one, bias]"""
    inputs = leaves(head_tensors, dtype or head_tensors[0].dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = {name: value.to(wide) if isinstance(value, torch.Tensor) else value for name, value in tokens.items()}
    loss = function(*inputs[:2], targets, bias=inputs[2], **tokens, **head)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in inputs if t is not None])]


def triton_loss(*args, **kwargs):
    return linear_tcopd_loss(*args, backend="triton", **kwargs)[0]


def assert_as_good_as_torch(head_tensors, targets, tokens, head):
    case = head_tensors, targets, tokens, head
    truth = loss_and_grads(plain_loss, *case, torch.float64)
    theirs, ours = loss_and_grads(plain_loss, *case), loss_and_grads(triton_loss, *case)
    for name, value, torch_value, true in zip(("loss", "hidden", "weight", "bias"), ours, theirs, truth, strict=False):
        assert_no_worse_than_torch(value, torch_value, true, name)
    return ours


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that the weight gradient adds up over several."""
    from tcopd_kernels import _triton_loss

    monkeypatch.setattr(_triton_loss, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(_triton_loss, "ROW_MULTIPLE", 16)
    monkeypatch.setattr(_triton_loss, "KEPT_BYTES", 1)


# numpy warns about the products with infinity that the kernels select away.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES_NVD, ids=str)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_error_is_at_most_twice_that_of_torch(self, small_chunks, shape, options, dtype):
        assert_as_good_as_torch(*make_case(*shape, dtype, **options))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_one_chunk_and_several_agree(self, request, options, dtype):
        case = make_case(37, 83, 29, dtype, **options)
        whole = assert_as_good_as_torch(*case)
        request.getfixturevalue("small_chunks")
        tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-4}
        torch.testing.assert_close(loss_and_grads(triton_loss, *case), whole, **tolerance)

    def test_every_option_of_the_loss_against_the_reference(self, small_chunks):
        head_tensors, targets, tokens, head = make_case(37, 83, 29, with_bias=True, entropy=True, temperature=0.8)
        base = tokens.pop("old_logprob")
        tokens |= {"reward": tokens.pop("advantage"), "ref_logprob": base - 0.4, "ref_kl_coef": 0.2, "dual_clip": 1.5}
        results = []
        for backend in ("triton", "reference"):
            inputs = leaves(head_tensors, torch.float32)
            loss, metrics, stats = linear_tcopd_loss(
                *inputs[:2], targets, bias=inputs[2], backend=backend, advantage_clamp=1.0, **tokens, **head
            )
            results.append([loss.detach(), metrics, tuple(stats), torch.autograd.grad(loss, inputs)])
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)

    @pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
    def test_only_the_needed_gradients(self, small_chunks, wanted):
        head_tensors, targets, tokens, head = make_case(37, 83, 29, with_bias=True)
        every = loss_and_grads(triton_loss, head_tensors, targets, tokens, head)
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(head_tensors)]
        triton_loss(*inputs[:2], targets, bias=inputs[2], **tokens, **head).backward()
        for i, leaf in enumerate(inputs):
            assert torch.equal(leaf.grad, every[1 + i]) if i in wanted else leaf.grad is None

    @pytest.mark.parametrize("off_policy", [True, False])
    def test_masked_rows_cannot_poison(self, small_chunks, off_policy):
        (hidden, weight, _), targets, tokens, _ = make_case(37, 83, 29, off_policy=off_policy)
        ignored, weightless = torch.arange(37) % 5 == 0, torch.arange(37) % 7 == 1
        kept = ~(ignored | weightless)
        dirty = {name: torch.where(kept, value, float("nan")) for name, value in tokens.items()}
        dirty["weights"] = torch.where(weightless, 0.0, tokens["weights"])
        inputs = leaves((torch.where(ignored[:, None], float("nan"), hidden), weight), torch.float32)
        masked = torch.where(ignored, -100, targets)
        loss, metrics, stats = linear_tcopd_loss(*inputs, masked, backend="triton", **dirty)
        grads = torch.autograd.grad(loss, inputs)
        alone = leaves((hidden[kept], weight), torch.float32)
        expected, expected_metrics, _ = linear_tcopd_loss(
            *alone, targets[kept], backend="reference", **{name: value[kept] for name, value in tokens.items()}
        )
        true = torch.autograd.grad(expected, alone)
        torch.testing.assert_close((loss, metrics), (expected, expected_metrics))
        torch.testing.assert_close((grads[0][kept], grads[1]), true)
        assert not grads[0][~kept].any() and not stats.logprob[ignored].any()

    def test_rows_without_gradient_leave_the_products(self, monkeypatch, small_chunks):
        from tcopd_kernels import _triton_loss

        rows = []
        product = _triton_loss.matmul_fp32
        monkeypatch.setattr(_triton_loss, "matmul_fp32", lambda a, b: rows.append(len(a)) or product(a, b))
        head_tensors, targets, tokens, _ = make_case(40, 100, 8, off_policy=False)
        tokens["advantage"] = torch.where(torch.arange(40) % 4 == 0, 1.0, 0.0)
        tokens["advantage"][16:32] = 0.0
        loss_and_grads(triton_loss, head_tensors, targets, tokens, {})
        assert rows == [4, 2]

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_logits_of_plus_and_minus_ten_thousand(self, small_chunks, temperature):
        head_tensors, targets, tokens, _ = make_case(17, 45, 16, off_policy=False)
        head_tensors[1] = head_tensors[1] * 5000.0
        assert (head_tensors[0] @ head_tensors[1].T).abs().max() > 1e4
        assert_as_good_as_torch(head_tensors, targets, tokens, {"temperature": temperature, "entropy": True})

    @pytest.mark.parametrize("offset", [-1e3, -2e4, 1e4])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_all_logits_far_from_zero(self, small_chunks, offset, dtype):
        head_tensors, targets, tokens, head = make_case(17, 45, 16, dtype, with_bias=True, off_policy=False)
        head_tensors[2] = head_tensors[2] + offset
        assert_as_good_as_torch(head_tensors, targets, tokens, head)

    def test_columns_with_minus_infinite_bias_have_no_probability(self, small_chunks):
        head_tensors, targets, tokens, _ = make_case(17, 45, 16, with_bias=True, off_policy=False)
        head_tensors[2][:20] = float("-inf")
        targets = targets.clamp_min(20)
        found = loss_and_grads(triton_loss, head_tensors, targets, tokens, {"entropy": True})
        rest = [head_tensors[0], head_tensors[1][20:], head_tensors[2][20:]]
        exact = loss_and_grads(plain_loss, rest, targets - 20, tokens, {}, torch.float64)
        for value, true in zip([*found[:2], found[2][20:], found[3][20:]], exact, strict=True):
            torch.testing.assert_close(value, true.float(), rtol=1e-5, atol=1e-7)
        assert not found[2][:20].any() and not found[3][:20].any()

    def test_confident_target_keeps_its_relative_precision(self):
        """1 − p of the target would cancel if it came from a rounded probability."""
        hidden, weight = torch.zeros(3, 16), torch.zeros(40, 16)
        hidden[:, 0], weight[7, 0], weight[:, 1] = torch.tensor([12.0, 10.0, 8.0]), 1.0, torch.linspace(0, 1, 40)
        head_tensors = [hidden.half(), weight.half(), None]
        tokens = {"advantage": torch.ones(3), "weights": torch.ones(3)}
        case = head_tensors, torch.full((3,), 7), tokens, {}
        grads = loss_and_grads(triton_loss, *case)
        exact = loss_and_grads(plain_loss, *case, torch.float64)
        relative = (grads[1][:, 0] / exact[1][:, 0] - 1).abs()
        assert exact[1][:, 0].abs().max() < 0.02 and relative.max() < 2.0**-9

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_elements_kept_in_bfloat16_cost_at_most_twice_torchs_error(self, monkeypatch, small_chunks, options):
        """What bfloat16 inputs give on a GPU: fp32 products, and e and dx rounded to bfloat16."""
        from tcopd_kernels import _triton_loss

        create = _triton_loss.TritonChunks.__init__

        def keep_in_bfloat16(self, *args, **kwargs):
            create(self, *args, **kwargs)
            self.kept = self.kept.bfloat16()

        (hidden, weight, bias), *rest = make_case(37, 83, 29, torch.bfloat16, **options)
        theirs = loss_and_grads(plain_loss, [hidden, weight, bias], *rest)
        exact = loss_and_grads(plain_loss, [hidden, weight, bias], *rest, torch.float64)
        monkeypatch.setattr(_triton_loss.TritonChunks, "__init__", keep_in_bfloat16)
        wide = [None if t is None else t.float() for t in (hidden, weight, bias)]
        ours = [value.to(other.dtype) for value, other in zip(loss_and_grads(triton_loss, wide, *rest), theirs)]
        for value, torch_value, true in zip(ours, theirs, exact, strict=True):
            assert_no_worse_than_torch(value, torch_value, true, "bfloat16")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_element_is_written_and_runs_agree_bitwise(self, monkeypatch, small_chunks, dtype):
        case = make_case(37, 83, 29, dtype, with_bias=True, entropy=True, softcap=4.0)
        clean = loss_and_grads(triton_loss, *case)
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
        assert torch.empty(3).isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(clean, loss_and_grads(triton_loss, *case), strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_descriptor_path_equals_pointer_path(self, monkeypatch, small_chunks, dtype):
        from tcopd_kernels import _triton_loss

        case = make_case(35, 83, 40, dtype, with_bias=True, entropy=True)
        pointer = loss_and_grads(triton_loss, *case)
        monkeypatch.setattr(_triton_loss, "tma_usable", lambda *matrices: True)
        descriptor = loss_and_grads(triton_loss, *case)
        assert all(torch.equal(a, b) for a, b in zip(pointer, descriptor, strict=True))

    def test_strided_inputs(self, small_chunks):
        n, vocab, dim = 19, 50, 24
        (hidden, weight, bias), targets, tokens, head = make_case(n, vocab, dim, with_bias=True)
        expected = loss_and_grads(triton_loss, [hidden, weight, bias], targets, tokens, head)
        wide = torch.full((n, 2 * dim), float("nan"))
        tall = torch.full((2 * vocab, dim + 3), float("nan"))
        for hidden_view, weight_view in (
            (wide[:, 3 : 3 + dim], tall[::2, 1 : 1 + dim]),
            (wide[:, ::2], tall[:vocab, :dim]),
        ):
            hidden_view.copy_(hidden)
            weight_view.copy_(weight)
            views = [t.detach().requires_grad_() for t in (hidden_view, weight_view, bias.repeat_interleave(3)[::3])]
            strided = {name: value.repeat_interleave(2)[::2] for name, value in tokens.items()}
            loss = triton_loss(*views[:2], targets.repeat_interleave(2)[::2], bias=views[2], **strided, **head)
            torch.testing.assert_close([loss.detach(), *torch.autograd.grad(loss, views)], expected)

    @pytest.mark.parametrize("size", [1e-12, 1e-5, 1e4])
    def test_fp16_gradients_of_any_upstream_size(self, small_chunks, size):
        """Under the smallest fp16 number as well, when the caller scales the loss up afterwards."""
        (hidden, weight, _), targets, tokens, _ = make_case(37, 83, 16, torch.float16, size=size, off_policy=False)
        inputs = leaves((hidden, weight), torch.float16)
        found = torch.autograd.grad(triton_loss(*inputs, targets, **tokens) / size, inputs)
        wide = leaves((hidden, weight), torch.float64)
        loss = plain_loss(*wide, targets, bias=None, **{k: v.double() for k, v in tokens.items()})
        for grad, true in zip(found, torch.autograd.grad(loss / size, wide), strict=True):
            assert (grad - true).norm() <= 2e-3 * true.norm()

    def test_second_backward_gives_the_same(self):
        (hidden, weight, _), targets, tokens, _ = make_case(19, 50, 24)
        inputs = leaves((hidden, weight), torch.float32)
        loss = 3.0 * triton_loss(*inputs, targets, **tokens)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True))

    @pytest.mark.parametrize("rows", [0, 3])
    def test_no_counted_tokens(self, rows):
        hidden, weight, bias, _ = make_problem(rows, 50, 4)
        inputs = leaves((hidden, weight, bias), torch.float32)
        loss, metrics, stats = linear_tcopd_loss(
            *inputs[:2], torch.full((rows,), -100), bias=inputs[2], advantage=torch.ones(rows),
            weights=torch.ones(rows), entropy=True, backend="triton",
        )  # fmt: skip
        assert loss == 0 and metrics["token_count"] == 0 and stats.entropy.shape == (rows,)
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

    def test_nan_reaches_the_loss_and_the_gradients(self):
        (hidden, weight, _), targets, tokens, _ = make_case(19, 50, 24, off_policy=False)
        tokens["advantage"][3] = float("nan")
        loss, grad_hidden, grad_weight = loss_and_grads(triton_loss, [hidden, weight, None], targets, tokens, {})
        assert loss.isnan() and grad_hidden[3].isnan().all() and grad_weight.isnan().all()
        assert not grad_hidden[:3].isnan().any()

    def test_tolerance_takes_the_compact_backward_alone(self, monkeypatch):
        """Within the certified bound of the exact gradient, and nothing is kept."""
        from tcopd_kernels import _triton_loss

        def refuse(*args, **kwargs):
            raise AssertionError("not with a tolerance")

        monkeypatch.setattr(_triton_loss.TritonChunks, "forward", refuse)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(300, 24, generator=generator)
        targets = torch.randint(0, 300, (37,), generator=generator)
        hidden = weight[targets] * 1.2 + 0.1 * torch.randn(37, 24, generator=generator)
        tokens = {"advantage": torch.randn(37, generator=generator), "weights": torch.ones(37) / 37}
        inputs = leaves((hidden, weight), torch.float32)
        loss, metrics, _ = linear_tcopd_loss(*inputs, targets, backend="triton", grad_tol=2.0**-6, **tokens)
        grads = torch.autograd.grad(loss, inputs)
        exact = loss_and_grads(plain_loss, [hidden, weight, None], targets, tokens, {}, torch.float64)
        assert metrics["grad_row_count"] == 37 and 0 < metrics["dropped_mass_max"] <= 2.0**-6
        assert metrics["dense_row_count"] <= 3 and metrics["kept_column_sum"] < 37 * 300 / 3
        coefficient = (tokens["advantage"] * tokens["weights"]).abs()
        error = (grads[0] - exact[1]).norm(dim=1)
        assert (error <= coefficient * metrics["dropped_mass_max"] * weight.norm(dim=1).max() + 1e-6).all()
        weight_bound = (coefficient * hidden.norm(dim=1)).sum() * metrics["dropped_mass_max"]
        assert 0 < (grads[1] - exact[2]).norm() <= weight_bound + 1e-6

    @pytest.mark.parametrize("n, vocab, itemsize", [(1, 5, 4), (8192, 151936, 2), (8192, 262144, 4), (10**6, 50257, 2)])
    def test_chunks_are_even_and_bounded(self, n, vocab, itemsize):
        from tcopd_kernels._triton_loss import KEPT_BYTES, MIN_CHUNK_ROWS, ROW_MULTIPLE, chunk_rows

        rows = chunk_rows(n, vocab, itemsize)
        assert rows % ROW_MULTIPLE == 0
        assert rows <= MIN_CHUNK_ROWS or rows * vocab * itemsize <= KEPT_BYTES
        assert n - (-(-n // rows) - 1) * rows > 0
        if (n, vocab) == (8192, 151936):
            assert rows == 1664
