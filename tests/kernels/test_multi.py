"""The Triton kernels for several models under Triton's interpreter, against float64 and the torch composition.

The interpreter must be chosen before Triton is imported, so `test_in_own_process` runs this file again in a process
with TRITON_INTERPRET=1; only there are the other tests collected. bfloat16 is left out: the interpreter multiplies it
wrongly.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_torch, plain_logprob
from tcopd_kernels import contrastive_advantage, multi_linear_logprob, tcopd_policy_loss
from tcopd_kernels._step_models import Model
from tcopd_kernels.policy_loss import MAX_LOG_RATIO
from test_multi_plan import run_benchmark

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
N = 37
# V, D, bias, softcap of four models: no size is a multiple of a block, V differs by padding.
HEADS = [(41, 24, False, None), (47, 13, True, None), (41, 16, False, 3.0), (53, 20, True, 5.0)]
ALIGNED_HEADS = [(41, 24, False, None), (47, 16, True, 3.0)]  # rows of a multiple of 16 bytes, as TMA needs


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def make_models(dtypes=(torch.float32,), scale=1.0, n=N, heads=HEADS):
    """Models as arguments of multi_linear_logprob (hiddens, weights, keywords), and targets [n]."""
    gen = torch.Generator().manual_seed(0)
    hiddens, weights, biases = [], [], []
    for m, (V, D, has_bias, _) in enumerate(heads):
        dtype = dtypes[m % len(dtypes)]
        hiddens.append(torch.randn(n, D, generator=gen).to(dtype))
        weights.append((torch.randn(V, D, generator=gen) * scale * 2 / D**0.5).to(dtype))
        biases.append(torch.randn(V, generator=gen).to(dtype) if has_bias else None)
    targets = torch.randint(0, min(V for V, *_ in heads), (n,), generator=gen)
    return hiddens, weights, {"biases": biases, "softcaps": [softcap for *_, softcap in heads]}, targets


def run_triton(hiddens, weights, options, targets, launch="joint", **more):
    return multi_linear_logprob(hiddens, weights, targets, launch=launch, backend="triton", **options, **more)


def assert_accurate(found, hiddens, weights, options, targets, temperature=1.0):
    valid = targets >= 0
    for m, (hidden, weight) in enumerate(zip(hiddens, weights, strict=True)):
        head = (hidden, weight, targets.clamp_min(0), options["biases"][m])
        exact, plain = (
            plain_logprob(
                *(None if t is None else t.to(dtype) if t.is_floating_point() else t for t in head),
                temperature, options["softcaps"][m],
            )[0]
            for dtype in (torch.float64, hidden.dtype)
        )  # fmt: skip
        assert_no_worse_than_torch(found[m][valid], plain[valid], exact[valid], f"model {m}")
        assert not found[m][~valid].any()


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


# numpy warns about the logarithms of rows that are not there.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16,), (torch.float16, torch.float32)], ids=str)
    @pytest.mark.parametrize("launch", ["joint", "separate"])
    def test_matches_float64(self, dtypes, launch):
        """Different widths, vocabularies, biases, soft-caps and dtypes, and tokens that are ignored."""
        *models, targets = make_models(dtypes)
        targets[::5] = -100
        found = run_triton(*models, targets, launch=launch, temperature=0.7)
        assert_accurate(found, *models, targets, temperature=0.7)

    @pytest.mark.parametrize("n", [1, 16, 33])
    def test_row_counts(self, n):
        *models, targets = make_models(n=n)
        assert_accurate(run_triton(*models, targets), *models, targets)

    def test_no_tokens_and_one_model(self):
        *models, targets = make_models(heads=HEADS[1:2])
        assert_accurate(run_triton(*models, targets), *models, targets)
        ignored = run_triton(*models, torch.full_like(targets, -100))
        assert ignored.shape == (1, N) and not ignored.any()

    @pytest.mark.parametrize("tiles", [1, 2, 100])
    def test_any_cut_of_the_vocabulary(self, monkeypatch, tiles):
        """A split per tile of 16 columns, ragged splits of two, and one split."""
        from tcopd_kernels import _triton_multi
        from tcopd_kernels._launch_plan import Plan

        def plan(works, row_blocks, multiprocessors):
            return Plan(tuple(min(tiles, w.tiles) for w in works), 1.0)

        *models, targets = make_models()
        monkeypatch.setattr(_triton_multi, "plan", plan)
        assert_accurate(run_triton(*models, targets), *models, targets)

    def test_logits_of_plus_and_minus_ten_thousand(self):
        heads = [(V, D, bias, None) for V, D, bias, _ in HEADS]
        *models, targets = make_models(scale=2500.0, heads=heads)
        assert max((h @ w.T).abs().max() for h, w in zip(*models[:2])) > 1e4
        assert_accurate(run_triton(*models, targets), *models, targets)

    @pytest.mark.parametrize("offset", [-1e3, -2e4, 1e4])
    def test_all_logits_far_from_zero(self, offset):
        heads = [(V, D, True, None) for V, D, *_ in HEADS]
        hiddens, weights, options, targets = make_models(heads=heads)
        options["biases"] = [bias + offset for bias in options["biases"]]
        assert_accurate(run_triton(hiddens, weights, options, targets), hiddens, weights, options, targets)

    @pytest.mark.parametrize("launch", ["joint", "separate"])
    def test_every_element_is_written_and_runs_agree_bitwise(self, monkeypatch, launch):
        *models, targets = make_models()
        clean = run_triton(*models, targets, launch=launch)
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
        assert torch.empty(3).isnan().all()
        assert torch.equal(clean, run_triton(*models, targets, launch=launch))

    def test_descriptor_path_equals_pointer_path(self, monkeypatch):
        from tcopd_kernels import _triton_multi

        *models, targets = make_models((torch.float16,), heads=ALIGNED_HEADS)
        pointer = run_triton(*models, targets)
        monkeypatch.setattr(_triton_multi, "tma_usable", lambda *matrices: True)
        assert torch.equal(pointer, run_triton(*models, targets))

    def test_a_callers_allocator_stays_in_force(self, monkeypatch):
        import triton
        from tcopd_kernels import _triton_multi
        from triton.runtime import _allocation

        def own(size, alignment, stream):
            raise AssertionError("not for this kernel")

        *models, targets = make_models(heads=ALIGNED_HEADS)
        monkeypatch.setattr(_triton_multi, "tma_usable", lambda *matrices: True)
        triton.set_allocator(own)
        run_triton(*models, targets)
        assert _allocation._allocator.get() is own

    def test_strided_inputs(self):
        hiddens, weights, options, targets = make_models()
        expected = run_triton(hiddens, weights, options, targets)
        wide = [torch.full((N, 2 * h.shape[1] + 5), float("nan"))[:, 3 : 3 + h.shape[1]].copy_(h) for h in hiddens]
        tall = [torch.full((w.shape[1], w.shape[0]), float("nan")).T.copy_(w) for w in weights]
        options["biases"] = [None if b is None else b.repeat_interleave(3)[::3] for b in options["biases"]]
        found = run_triton(wide, tall, options, targets.repeat_interleave(2)[::2])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("launch", ["joint", "separate"])
    def test_tokens_without_lambda_are_not_read(self, launch):
        """Three row blocks of 16: the middle one is left out, and NaN there goes nowhere."""
        from tcopd_kernels._triton_finalize import merge_logprobs
        from tcopd_kernels._triton_multi import model_partials

        (h, *_), (w, *_), _, targets = make_models(heads=HEADS[:1])
        lambdas = torch.randn(N)
        lambdas[16:32] = 0
        clean = merge_logprobs(model_partials([Model(h, w)] * 2, targets, 1.0, launch))
        h = h.index_fill(0, torch.arange(16, 32), float("nan"))
        found = merge_logprobs(model_partials([Model(h, w, lambdas=lambdas)] * 2, targets, 1.0, launch))
        assert torch.equal(found[:, lambdas != 0], clean[:, lambdas != 0])
        assert clean.isfinite().all()

    def test_the_benchmark_runs_on_triton(self, monkeypatch, tmp_path):
        report = run_benchmark(monkeypatch, tmp_path)
        assert report["backend"] == "triton" and len(report["rows"]) == 4
        assert all(row["largest_difference"] < 1e-4 for row in report["rows"])

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_finalize_equals_the_torch_composition(self, data):
        finalize_case(data)


def random_partials(logprobs, gen):
    """Splits (m, s) and target logits whose merged log-probabilities are `logprobs` [M, N] float64."""
    from tcopd_kernels._triton_multi import SplitPartials

    maxima, sums, targets, splits = [], [], [], []
    for logprob in logprobs:
        count = int(torch.randint(1, 40, (1,), generator=gen))
        top = 5 * torch.randn(count, len(logprob), generator=gen, dtype=torch.float64)
        total = torch.rand(count, len(logprob), generator=gen, dtype=torch.float64) + 0.5
        if count > 1:
            top[0], total[0] = -torch.inf, 0.0  # a split of nothing but masked columns
        splits.append((sum(len(m) for m in maxima), sum(len(m) for m in maxima) + count))
        maxima.append(top.float())
        sums.append(total.float())
        lse = torch.logsumexp(maxima[-1].double() + sums[-1].double().log(), 0)
        targets.append((logprob + lse).float())
    partials = SplitPartials(torch.cat(maxima), torch.cat(sums), torch.stack(targets), tuple(splits))
    merged = [
        partials.target_logit[m].double()
        - torch.logsumexp(partials.max[a:b].double() + partials.sum[a:b].double().log(), 0)
        for m, (a, b) in enumerate(splits)
    ]
    return partials, torch.stack(merged)


def finalize_case(data):
    from tcopd_kernels._triton_finalize import finalize

    def optional(low, high):
        return data.draw(st.one_of(st.none(), st.floats(low, high)))

    n, n_teachers = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3))
    has_ref, own_bases = data.draw(st.booleans()), data.draw(st.booleans())
    own_bases = own_bases and has_ref
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    n_models = 1 + has_ref + n_teachers * (1 + own_bases)
    logprobs = -6 * torch.rand(n_models, n, generator=gen, dtype=torch.float64)
    logprobs[:, 0] *= 6  # one token beyond the limit of 20 nats
    partials, exact = random_partials(logprobs, gen)
    teachers = [1 + has_ref + k for k in range(n_teachers)]
    bases = [n_models - n_teachers + k if own_bases else int(has_ref) for k in range(n_teachers)]

    def vector(scale):
        return scale * torch.randn(n, generator=gen)

    student = exact[0].float()
    old = student + vector(0.5) if data.draw(st.booleans()) else None
    rollout = student + vector(0.8) if data.draw(st.booleans()) else None
    weights = torch.where(torch.rand(n, generator=gen) < 0.2, 0.0, vector(1.0))
    per_token = data.draw(st.booleans())
    lambdas = torch.randn(n_teachers, n if per_token else 1, generator=gen)
    lambdas[torch.rand(lambdas.shape, generator=gen) < 0.3] = 0.0
    lambdas = lambdas.expand(n_teachers, n)
    roles = [(0, 0) if not lambdas[k].any() else (teachers[k], bases[k]) for k in range(n_teachers)]
    clamps = {"logratio_clamp": optional(0.5, 5.0), "advantage_clamp": optional(0.5, 5.0)}
    clips = {
        "clip_low": optional(0.0, 0.5), "clip_high": optional(0.0, 0.5), "dual_clip": optional(1.5, 4.0),
        "is_cap": optional(0.8, 3.0),
    }  # fmt: skip
    ref_kl_coef = data.draw(st.sampled_from([0.0, 0.3])) if has_ref else 0.0
    normalizer = data.draw(st.sampled_from(["active", "count", "none"]))
    # NaN where no teacher counts: it must not be read.
    for k, place in enumerate(teachers):
        partials.target_logit[place, lambdas[k] == 0] = float("nan")
    found = finalize(
        partials, roles, lambdas, weights, old, rollout,
        has_ref=has_ref, normalizer=normalizer, ref_kl_coef=ref_kl_coef, clips=clips, **clamps,
    )  # fmt: skip

    wide = {name: None if t is None else t.double() for name, t in (("old", old), ("rollout", rollout))}
    ref = exact[1] if has_ref else torch.zeros(n, dtype=torch.float64)
    teacher_exact = exact[teachers]
    advantage, reward = contrastive_advantage(
        exact[0] if old is None else wide["old"], exact[bases] if own_bases else ref, teacher_exact, lambdas.double(),
        normalizer=normalizer, student_ref_logprob=ref, **clamps,
    )  # fmt: skip
    variable = exact[0].clone().requires_grad_()
    loss, metrics = tcopd_policy_loss(
        variable, advantage, old_logprob=wide["old"], rollout_logprob=wide["rollout"], weights=weights.double(), **clips
    )
    if has_ref:
        difference = torch.where(weights != 0, ref - variable, 0.0).clamp(max=MAX_LOG_RATIO)
        k3 = difference.exp() - difference - 1
        loss, metrics["ref_kl_sum"] = loss + ref_kl_coef * (weights * k3).sum(), k3.detach().sum().float()
    (gradient,) = torch.autograd.grad(loss, variable)

    def close(value, exact_value, label):
        size = max(1.0, exact_value.abs().max().item()) if exact_value.numel() else 1.0
        torch.testing.assert_close(value.double(), exact_value.double(), rtol=0, atol=2e-4 * size, msg=label)

    close(found.logprob, exact[0], "logprob")
    close(found.reward, reward, "reward")
    close(found.advantage, advantage, "advantage")
    close(found.teacher_logprobs, torch.where(lambdas != 0, teacher_exact, 0.0), "teachers")
    # Per token: a token at e^20 must not excuse the others.
    scale = gradient.abs() + 1e-2
    torch.testing.assert_close(found.dlogprob.double() / scale, gradient / scale, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.loss.double(), loss.detach(), rtol=2e-4, atol=2e-4)
    assert found.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=2e-4, atol=2e-4, msg=name)
