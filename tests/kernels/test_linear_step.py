"""linear_tcopd_step against float64 on materialised logits, on every backend.

Triton's interpreter must be chosen before Triton is imported, so `test_in_own_process` runs this file again in a
process with TRITON_INTERPRET=1, where the backend is "triton"; elsewhere it is "torch" and "reference".
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from oracle import assert_no_worse_than_torch, leaves, plain_logprob
from tcopd_kernels import linear_tcopd_loss, linear_tcopd_step, reference
from tcopd_kernels._step_models import Model, needed_models

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [("triton", "joint"), ("triton", "separate")] if INTERPRETED else [("torch", "auto"), ("reference", "auto")]
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
FAST = BACKENDS[0]
# The interpreter is slow. Two or three row blocks of 16, and no size that is a multiple of a block.
N, V = (21, 37) if INTERPRETED else (37, 83)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter's process")
def test_in_own_process():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@dataclass
class Problem:
    """student (hidden, weight, bias), frozen heads (hidden, weight), and the keywords of the step."""

    student: list
    ref: tuple
    teachers: list
    bases: list
    targets: torch.Tensor
    lambdas: torch.Tensor
    tokens: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def run(self, backend, student=None, own_bases=False, **changes):
        hidden, weight, bias = self.student if student is None else student
        own = {"teacher_ref_hiddens": [b[0] for b in self.bases], "teacher_ref_weights": [b[1] for b in self.bases]}
        call = {"bias": bias, **self.tokens, **self.options, **(own if own_bases else {}), **changes}
        heads = call.pop("ref", self.ref), call.pop("teachers", self.teachers)
        lambdas, targets = call.pop("lambdas", self.lambdas), call.pop("targets", self.targets)
        return linear_tcopd_step(
            hidden, weight, targets, *heads[0], [t[0] for t in heads[1]], [t[1] for t in heads[1]], lambdas,
            backend=backend[0], launch=backend[1], **call,
        )  # fmt: skip


def make_problem(dtype=torch.float32, off_policy=True, n=N):
    gen = torch.Generator().manual_seed(3)

    def head(vocab, D):
        hidden, weight = torch.randn(n, D, generator=gen), torch.randn(vocab, D, generator=gen)
        return hidden.to(dtype), (weight * 2 / D**0.5).to(dtype)

    student = [*head(V, 24), torch.randn(V, generator=gen).to(dtype)]
    ref, teachers = head(V, 16), [head(V + 7, 20), head(V, 13), head(V + 2, 8)]
    targets = torch.randint(0, V, (n,), generator=gen)
    logprob = plain_logprob(*(t.double() for t in student[:2]), targets, student[2].double(), 0.8, 6.0)[0].float()
    tokens = {"weights": (torch.rand(n, generator=gen) + 0.1) / n}
    if off_policy:
        drift, engine = 0.3 * torch.randn(2, n, generator=gen)
        tokens |= {"old_logprob": logprob + drift, "rollout_logprob": logprob + drift + engine}
    options = {"temperature": 0.8, "softcap": 6.0, "ref_kl_coef": 0.2, "is_cap": 1.2}
    return Problem(
        student, ref, teachers, [head(V, 12) for _ in teachers], targets, torch.tensor([1.5, -0.7, 0.4]), tokens,
        options,
    )  # fmt: skip


def per_token_lambdas(problem):
    lambdas = problem.lambdas.unsqueeze(1).repeat(1, len(problem.targets))
    lambdas[0, ::3], lambdas[1, 16:32], lambdas[:, 5] = 0.0, 0.0, 0.0
    return lambdas


def plain_step(problem, dtype, own_bases=False, lambdas=None, normalizer="active"):
    """loss, gradients, advantage and reward as a training script computes them, heads in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = leaves(problem.student, dtype)
    options = {name: value for name, value in problem.options.items() if name not in ("temperature", "softcap")}
    frozen = [
        plain_logprob(h.to(dtype), w.to(dtype), problem.targets, None, problem.options["temperature"])[0].to(wide)
        for h, w in (problem.ref, *problem.teachers, *problem.bases)
    ]
    lambdas = (problem.lambdas if lambdas is None else lambdas).to(wide)
    lambdas = lambdas if lambdas.dim() == 2 else lambdas.unsqueeze(1).expand(-1, len(problem.targets))
    student = plain_logprob(*inputs[:2], problem.targets, inputs[2], problem.options["temperature"], 6.0)[0]
    tokens = {name: value.to(wide) for name, value in problem.tokens.items()}
    advantage, reward = reference.contrastive_advantage(
        tokens.get("old_logprob", student.detach()),
        torch.stack(frozen[4:]) if own_bases else frozen[0],
        torch.stack(frozen[1:4]), lambdas, normalizer=normalizer, student_ref_logprob=frozen[0],
    )  # fmt: skip
    coefficient = options.pop("ref_kl_coef")
    loss = reference.tcopd_policy_loss(student, advantage, **tokens, **options)
    loss = loss + coefficient * (tokens["weights"] * reference.k3(student, frozen[0])).sum()
    return [loss.detach(), *torch.autograd.grad(loss, inputs), advantage.detach(), reward]


def run_step(problem, backend, dtype, **changes):
    inputs = leaves(problem.student, dtype)
    loss, _, tokens = problem.run(backend, inputs, **changes)
    return [loss.detach(), *torch.autograd.grad(loss, inputs), tokens.advantage, tokens.reward]


NAMES = ("loss", "hidden.grad", "weight.grad", "bias.grad", "advantage", "reward")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off_policy", [False, True])
def test_error_is_at_most_twice_that_of_torch(backend, dtype, off_policy):
    problem = make_problem(dtype, off_policy)
    truth, torch_values = plain_step(problem, torch.float64), plain_step(problem, dtype)
    for name, value, torch_value, true in zip(NAMES, run_step(problem, backend, dtype), torch_values, truth):
        assert_no_worse_than_torch(value, torch_value, true, name)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("own_bases", [False, True])
@pytest.mark.parametrize("normalizer", ["active", "count", "none"])
def test_lambdas_per_token_and_bases_of_their_own(backend, own_bases, normalizer):
    problem = make_problem()
    problem.options["normalizer"] = normalizer
    lambdas = per_token_lambdas(problem)
    values = run_step(problem, backend, torch.float32, own_bases=own_bases, lambdas=lambdas)
    del problem.options["normalizer"]
    truth, torch_values = (
        plain_step(problem, dtype, own_bases, lambdas, normalizer) for dtype in (torch.float64, torch.float32)
    )
    for name, value, torch_value, true in zip(NAMES, values, torch_values, truth):
        assert_no_worse_than_torch(value, torch_value, true, name)


def test_the_plain_definition_is_the_same_step():
    """reference.linear_tcopd_step, from the frozen models' logprobs, in float64."""
    problem = make_problem()
    inputs = leaves(problem.student, torch.float64)
    frozen = [
        reference.linear_logprob(h.double(), w.double(), problem.targets, temperature=0.8).logprob
        for h, w in (problem.ref, *problem.teachers)
    ]
    tokens = {name: value.double() for name, value in problem.tokens.items()}
    loss, advantage, reward = reference.linear_tcopd_step(
        *inputs[:2], problem.targets, frozen[0], torch.stack(frozen[1:]), problem.lambdas.double(),
        bias=inputs[2], **tokens, **problem.options,
    )  # fmt: skip
    found = [loss.detach(), *torch.autograd.grad(loss, inputs), advantage, reward]
    for value, true in zip(found, plain_step(problem, torch.float64), strict=True):
        torch.testing.assert_close(value, true)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_results_equal_those_of_the_separate_functions(backend):
    """Metrics, entropy and all per-token results, with clamps, masked tokens and mixed dtypes of the models."""
    problem = make_problem()
    problem.options |= {"logratio_clamp": 2.0, "advantage_clamp": 1.5, "entropy": True}
    problem.tokens["weights"][::7] = 0.0
    problem.targets[3] = -100
    problem.teachers[1] = tuple(t.half() for t in problem.teachers[1])
    loss, metrics, tokens = problem.run(backend)
    counted = (problem.tokens["weights"] != 0) & (problem.targets != -100)
    logprobs = [
        reference.linear_logprob(h.double(), w.double(), problem.targets, temperature=0.8).logprob
        for h, w in (problem.ref, *problem.teachers)
    ]
    expected = {"ref_logprob": logprobs[0], "teacher_logprobs": torch.stack(logprobs[1:])}
    log_ratio = (expected["teacher_logprobs"] - logprobs[0]).clamp(-2, 2)
    expected["reward"] = (problem.lambdas.double().unsqueeze(1) * log_ratio).sum(0) / 3
    hidden, weight, bias = (t.double() for t in problem.student)
    call = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in {**problem.tokens, **problem.options}.items()
    }
    call.pop("logratio_clamp")
    expected_loss, expected_metrics, stats = linear_tcopd_loss(
        hidden, weight, torch.where(counted, problem.targets, -100), bias=bias, backend="reference",
        reward=expected["reward"], ref_logprob=logprobs[0], **call,
    )  # fmt: skip
    expected |= {"logprob": stats.logprob, "entropy": stats.entropy}
    expected["advantage"] = (expected["reward"] - (call["old_logprob"] - logprobs[0])).clamp(-1.5, 1.5)
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in tokens._asdict().items():
        shown = torch.where(counted, expected[name].float(), 0.0)
        torch.testing.assert_close(value, shown, rtol=1e-5, atol=2e-5, msg=name)


def test_tokens_and_models_that_take_no_part_may_hold_anything():
    """NaN in masked tokens, in a teacher without λ, and in rows without λ; such a teacher may also be None."""
    problem = make_problem()
    problem.tokens["weights"][:4] = 0.0
    problem.targets[4] = -100
    lambdas = per_token_lambdas(problem)
    lambdas[2] = 0.0
    clean = run_step(problem, FAST, torch.float32, lambdas=lambdas)
    masked = torch.arange(5)
    for tensor in (problem.student[0], problem.ref[0], *(t[0] for t in problem.teachers)):
        tensor[masked] = float("nan")
    problem.tokens["old_logprob"][masked] = float("nan")
    problem.teachers[2][0].fill_(float("nan"))
    problem.teachers[1][0][16:32] = float("nan")
    for stained in (
        run_step(problem, FAST, torch.float32, lambdas=lambdas),
        run_step(problem, FAST, torch.float32, lambdas=lambdas, teachers=[*problem.teachers[:2], (None, None)]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(clean, stained, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="comes before the backend")
def test_shared_models_are_run_once():
    problem = make_problem()
    as_models = [Model(*head) for head in (problem.ref, *problem.teachers, problem.bases[0])]
    shared, same_as_ref = Model(*problem.bases[0]), Model(*problem.ref)
    counted = torch.ones(N, dtype=torch.bool)
    frozen, table = needed_models(
        as_models[0], as_models[1:4], [shared, as_models[4], same_as_ref], problem.lambdas, counted, "active"
    )
    assert frozen.roles == [(1, 2), (3, 2), (4, 0)] and len(frozen.models) == 5 and table.shape == (3, N)
    frozen, _ = needed_models(as_models[0], as_models[1:4], [None] * 3, [0.0, 2.0, 0.0], counted, "active")
    assert frozen.roles == [(None, None), (1, 0), (None, None)] and not frozen.own_bases


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("lambdas", [[1.5, 0.5, 1.0], [3.0, -1.0, 0.0]])
def test_a_reference_that_cancels_may_be_left_out(backend, lambdas):
    problem = make_problem()
    problem.options["ref_kl_coef"] = 0.0
    results = []
    for ref in (problem.ref, (None, None)):
        inputs = leaves(problem.student, torch.float32)
        loss, metrics, tokens = problem.run(backend, inputs, lambdas=lambdas, ref=ref)
        results.append(([loss.detach(), *torch.autograd.grad(loss, inputs)], metrics, tokens))
    (values, metrics, tokens), (bare_values, bare_metrics, bare) = results
    torch.testing.assert_close(bare.advantage, tokens.advantage, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(bare.reward, tokens.reward + tokens.ref_logprob, rtol=1e-5, atol=5e-6)
    assert bare.ref_logprob is None
    assert metrics.keys() - bare_metrics.keys() == {"ref_kl_sum"}
    for value, bare_value in zip(values, bare_values, strict=True):
        torch.testing.assert_close(bare_value, value, rtol=1e-4, atol=1e-5)


def test_compaction_stays_within_its_certificate():
    """Four likely columns, which hold all targets, and a tail of little mass."""
    problem = make_problem(off_policy=False)
    problem.options["softcap"] = None
    problem.student[1] *= 0.5
    problem.student[2][:4] += 8.0
    problem.targets %= 4
    exact, tolerant = (run_step(problem, FAST, torch.float32, grad_tol=tol) for tol in (0.0, 0.1))
    _, metrics, tokens = problem.run(FAST, grad_tol=0.1, student=leaves(problem.student, torch.float32), entropy=True)
    assert metrics["grad_row_count"] == N and metrics["kept_column_sum"] < 0.5 * N * V
    assert 0 < metrics["dropped_mass_max"] <= 0.1
    assert tokens.entropy is not None and tokens.entropy.min() > 0
    torch.testing.assert_close(tolerant[0], exact[0])
    weight = problem.student[1]
    error = (tolerant[1] - exact[1]).norm(dim=1)
    growth = (tokens.ref_logprob - tokens.logprob).expm1().abs()
    slope = problem.tokens["weights"] * (tokens.advantage.abs() + problem.options["ref_kl_coef"] * growth)
    assert (error <= slope * metrics["dropped_mass_max"] * weight.norm(dim=1).max() / 0.8 + 1e-6).all()
    assert error.max() > 1e-6


def test_gradients_only_where_they_are_needed():
    problem = make_problem()
    every = run_step(problem, FAST, torch.float32)
    for place in range(3):
        inputs = [t.clone() for t in problem.student]
        inputs[place].requires_grad_()
        loss, _, tokens = problem.run(FAST, inputs)
        assert torch.equal(torch.autograd.grad(loss, inputs[place])[0], every[1 + place])
        assert not tokens.logprob.requires_grad
    with torch.no_grad():
        loss, _, _ = problem.run(FAST, leaves(problem.student, torch.float32))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, every[0])


def test_teachers_get_no_gradient_and_backward_may_run_twice():
    problem = make_problem()
    problem.teachers = [tuple(t.clone().requires_grad_() for t in head) for head in problem.teachers]
    inputs = leaves(problem.student, torch.float32)
    loss, _, _ = problem.run(FAST, inputs)
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = torch.autograd.grad(loss, problem.teachers[0], allow_unused=True)
    assert found == (None, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_no_token_counts(backend):
    problem = make_problem()
    inputs = leaves(problem.student, torch.float32)
    loss, metrics, tokens = problem.run(backend, inputs, weights=torch.zeros(N))
    assert loss == 0 and metrics["token_count"] == 0
    assert tokens.teacher_logprobs.shape == (3, N) and not tokens.teacher_logprobs.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, inputs))


def test_every_element_is_written_and_runs_agree_bitwise(monkeypatch):
    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    problem = make_problem()
    lambdas = per_token_lambdas(problem)
    clean = run_step(problem, FAST, torch.float32, lambdas=lambdas)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert torch.empty(3).isnan().all()
    stained = run_step(problem, FAST, torch.float32, lambdas=lambdas)
    assert all(torch.equal(a, b) for a, b in zip(clean, stained, strict=True))


def test_lambda_forms_agree():
    problem = make_problem()
    forms = [problem.lambdas, problem.lambdas.tolist(), problem.lambdas.unsqueeze(1).expand(-1, N)]
    results = [run_step(problem, FAST, torch.float32, lambdas=form) for form in forms]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


REFUSED = {
    "ref needed by penalty": ({"ref": (None, None)}, ValueError, "required with ref_kl_coef=0.2"),
    "ref needed by clamp": (
        {"ref": (None, None), "ref_kl_coef": 0.0, "logratio_clamp": 2.0}, ValueError, "required with logratio_clamp=2",
    ),
    "ref does not cancel": (
        {"ref": (None, None), "ref_kl_coef": 0.0}, ValueError, r"does not cancel at token 0: Σ λ / Z is 0\.4, not 1",
    ),
    "half a ref": ({"ref": (torch.ones(N, 16), None)}, ValueError, "ref_weight is None but ref_hidden is not"),
    "teacher missing": ({"teachers": [(None, None)] * 3}, ValueError, r"teacher_hiddens\[0\] is None, but"),
    "teacher rows": (
        {"teachers": [(torch.ones(5, 4), torch.ones(V, 4))] * 3}, ValueError, r"teacher_hiddens\[0\] has 5 rows",
    ),
    "lambda shape": ({"lambdas": [1.0, 2.0]}, ValueError, r"lambdas must have shape \[3\]"),
    "teacher count": ({"teacher_softcaps": [None]}, ValueError, "teacher_softcaps must have 3 entries"),
    "target range": ({"targets": torch.full((N,), V + 1)}, ValueError, f"targets holds {V + 1}"),
    "weights shape": ({"weights": torch.ones(3)}, ValueError, rf"weights must have shape \[{N}\]"),
    "old shape": ({"old_logprob": torch.ones(3)}, ValueError, "old_logprob must have shape"),
    "normalizer": ({"normalizer": "mean"}, ValueError, "normalizer must be one of active, count, none, got 'mean'"),
    "launch": ({"launch": "both"}, ValueError, "launch must be one of"),
    "clip": ({"clip_low": 2.0}, ValueError, "clip_low must be in"),
    "softcap": ({"teacher_softcaps": [0.0, None, None]}, ValueError, r"teacher_softcaps\[0\] must be in"),
    "teacher dtype": (
        {"teachers": [(torch.ones(N, 4), torch.ones(V, 4).half())] * 3}, TypeError, r"teacher_weights\[0\] is torch.f",
    ),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the checks come before the backend")
@pytest.mark.parametrize("changes, error, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_named(changes, error, message):
    problem, backend = make_problem(), ("torch", changes.get("launch", "auto"))
    changes = {name: value for name, value in changes.items() if name != "launch"}
    with pytest.raises(error, match=message):
        problem.run(backend, **changes)


@pytest.mark.skipif(INTERPRETED, reason="bfloat16 is not for the interpreter")
def test_autocast_casts_all_models_as_linear_layers_would():
    problem = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_step(problem, FAST, torch.float32)
    problem.student = [*(t.bfloat16() for t in problem.student[:2]), problem.student[2]]
    problem.ref = tuple(t.bfloat16() for t in problem.ref)
    problem.teachers = [tuple(t.bfloat16() for t in head) for head in problem.teachers]
    torch.testing.assert_close(found[0], problem.run(FAST)[0])
    assert found[1].dtype == torch.float32
