"""Every public function on drawn sizes, dtypes, masks, heads and logit levels, against float64.

The draws are the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import make_problem, max_error, rounding
from tcopd_kernels import (
    full_vocab_tcopd_loss,
    linear_logprob,
    linear_tcopd_loss,
    multi_linear_logprob,
    tcopd_policy_loss,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = ("ordinary", "up to ±1e4", "all under -1e3")

TOKENS, VOCABULARIES = st.integers(0, 20), st.integers(1, 160)

drawn = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Head(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V] or None; options of the logits."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    softcap: float | None

    def to(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Fresh leaves of `dtype` that need gradients."""
        return [t.to(dtype).requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]


@st.composite
def heads(draw, n=TOKENS, vocab=VOCABULARIES, dtypes=DTYPES, levels=LEVELS) -> Head:
    """A head whose tensors hold values of one of `dtypes`."""
    level, dtype = draw(st.sampled_from(levels)), draw(st.sampled_from(dtypes))
    rows, columns, dim = draw(n), draw(vocab), draw(st.integers(2, 24))
    hidden, weight, bias, _ = make_problem(rows, columns, dim, draw(st.integers(0, 999)))
    highest = largest(hidden @ weight.T)
    if level == "up to ±1e4":
        scale = (1e4 / max(highest, 1e-3)) ** 0.5
        hidden, weight = hidden * scale, weight * scale
    elif level == "all under -1e3":
        hidden[:, 0], weight[:, 0] = -1e3 - 3 * highest, 1.0
    tensors = [t.to(dtype) for t in (hidden, weight, bias)]
    if not draw(st.booleans()):
        tensors[2] = None
    temperature = draw(st.floats(0.4, 2.5))
    return Head(*tensors, temperature, draw(st.one_of(st.none(), st.floats(2.0, 40.0))))


def some(n: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def random_targets(n: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


def plain_logits(hidden, weight, bias, temperature, softcap):
    """fp32 or float64 logits the way a training script computes them: the head in its own dtype."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def with_grads(loss, inputs):
    """[loss, its gradients]; a loss that no input reaches has the gradient zero."""
    if not loss.requires_grad:
        return [loss, *(torch.zeros_like(t) for t in inputs)]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_as_good(values, torch_values, truths, head: Head, upstream: float = 0.0) -> None:
    """The rule of `assert_no_worse_than_torch`, and what rounding costs any fp32 softmax of such logits.

    z has an absolute error of eps·max|z|, and so has every probability a relative one, by which torch's may happen
    to be smaller. The last two or three results are gradients: of hidden, weight and, if there is one, bias.
    `upstream` is Σ |d loss / d output|.
    """
    logits = plain_logits(*(t.double() if t is not None else None for t in head[:3]), head.temperature, head.softcap)
    level = 1 + (logits.abs().max().item() if logits.numel() else 0.0)
    operands = [head.weight, head.hidden] + ([] if head.bias is None else [torch.ones(1)])
    scales = [1.0] * (len(values) - len(operands)) + [upstream * largest(t) for t in operands]
    scales = scales if upstream else [1.0] * len(values)
    for i, (value, torch_value, true, scale) in enumerate(zip(values, torch_values, truths, scales, strict=True)):
        eps = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32).eps
        noise = 8 * eps * level * max(scale, largest(true))
        allowed = max(2 * max_error(torch_value, true), rounding(true, value.dtype), noise)
        assert max_error(value, true) <= allowed, f"result {i}: error {max_error(value, true):.3e} > {allowed:.3e}"


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


@settings(drawn, max_examples=200)
@given(head=heads(), masked=st.floats(0, 1), seed=st.integers(0, 999))
def test_linear_logprob(small_tiles, head, masked, seed):
    n, vocab = head.hidden.shape[0], head.weight.shape[0]
    targets = random_targets(n, vocab, seed).masked_fill(some(n, masked, seed), -100)
    upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(seed + 1))
    kept = targets != -100

    def plain(hidden, weight, bias=None):
        log_p = plain_logits(hidden, weight, bias, head.temperature, head.softcap)
        lse, log_p = torch.logsumexp(log_p, 1), torch.log_softmax(log_p, 1)
        logprob = log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return [torch.where(kept, t, 0.0) for t in (logprob, lse, entropy)]

    def ours(hidden, weight, bias=None):
        return linear_logprob(
            hidden, weight, targets, bias=bias, temperature=head.temperature, softcap=head.softcap, entropy=True
        )

    results = []
    for function, dtype in ((ours, head.hidden.dtype), (plain, head.hidden.dtype), (plain, torch.float64)):
        inputs = head.to(dtype)
        outputs = function(*inputs)
        loss = sum((g.to(o.dtype) * o).sum() for g, o in zip(upstream, outputs, strict=True))
        results.append([*(o.detach() for o in outputs), *with_grads(loss, inputs)[1:]])
    assert_as_good(*results, head, upstream.abs().sum().item())
    assert (results[0][0][~kept] == 0).all() and (results[0][3][~kept] == 0).all()
    again = ours(*head.to(head.hidden.dtype))
    assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=False))


def rows_norm(tensor: torch.Tensor) -> float:
    return largest(tensor.double().flatten(1).norm(dim=1)) if tensor.dim() > 1 else largest(tensor)


def upstream_of(own, terms, clips, ref_kl_coef) -> float:
    """Σ |d loss / d logprob| at the float64 logprobs `own`."""
    leaf, terms = own.clone().requires_grad_(), {name: t.double() for name, t in terms.items()}
    ref_logprob = terms.pop("ref_logprob")
    loss, _ = tcopd_policy_loss(leaf, **terms, **clips)
    d = ref_logprob - leaf
    loss = loss + ref_kl_coef * (terms["weights"] * (d.exp() - d - 1)).sum()
    return torch.autograd.grad(loss, leaf)[0].abs().sum().item()


@settings(drawn, max_examples=150)
@given(
    head=heads(),
    masked=st.floats(0, 1),
    old=st.sampled_from([None, 0.05, 0.5, 2.0]),
    clip=st.sampled_from([(0.2, 0.2, 3.0), (0.1, 0.3, None), (None, None, 2.0)]),
    ref_kl_coef=st.sampled_from([0.0, 0.3]),
    grad_tol=st.sampled_from([0.0, 2.0**-7]),
    seed=st.integers(0, 999),
)
def test_linear_tcopd_loss(small_tiles, head, masked, old, clip, ref_kl_coef, grad_tol, seed):
    """Old logprobs lie far enough from the bounds of the clips for all precisions to be on the same side."""
    n, vocab = head.hidden.shape[0], head.weight.shape[0]
    targets = random_targets(n, vocab, seed)
    generator = torch.Generator().manual_seed(seed)
    advantage = torch.randn(n, generator=generator)
    weights = torch.rand(n, generator=generator).masked_fill(some(n, masked, seed), 0.0)
    own = linear_logprob(
        *(t.double() for t in head[:2]), targets, bias=None if head.bias is None else head.bias.double(),
        temperature=head.temperature, softcap=head.softcap, backend="reference",
    ).logprob  # fmt: skip
    terms = {"advantage": advantage, "weights": weights, "ref_logprob": own + 0.2 * torch.randn(n, generator=generator)}
    if old is not None:
        terms["old_logprob"] = own + old * (2 * some(n, 0.5, seed + 1) - 1)
    clips = dict(zip(("clip_low", "clip_high", "dual_clip"), clip, strict=True))
    options = {"temperature": head.temperature, "softcap": head.softcap, "ref_kl_coef": ref_kl_coef, **clips}
    results = []
    for backend, dtype, tol in (
        ("torch", head.hidden.dtype, grad_tol), ("reference", head.hidden.dtype, 0.0), ("reference", torch.float64, 0.0)
    ):  # fmt: skip
        inputs = head.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        loss, metrics, _ = linear_tcopd_loss(
            *inputs[:2], targets, bias=inputs[2] if len(inputs) > 2 else None, backend=backend, grad_tol=tol,
            **{name: t.to(wide) for name, t in terms.items()}, **options,
        )  # fmt: skip
        results.append(with_grads(loss, inputs))
    assert metrics["token_count"] == (weights != 0).sum()
    values, torch_values, truths = results
    upstream = upstream_of(own, terms, clips, ref_kl_coef)
    if grad_tol:
        operands = [torch.zeros(1), head.weight, head.hidden, torch.ones(1)]
        lost = [upstream * grad_tol / head.temperature * rows_norm(t) for t in operands]
        torch_values = [true + max_error(v, true) + x for v, true, x in zip(torch_values, truths, lost)]
    assert_as_good(values, torch_values, truths, head, upstream)


@settings(drawn, max_examples=80)
@given(data=st.data(), n=st.integers(0, 20), models=st.integers(1, 4), masked=st.floats(0, 1), seed=st.integers(0, 999))
def test_multi_linear_logprob(small_tiles, data, n, models, masked, seed):
    given_heads = [data.draw(heads(st.just(n), st.integers(30, 90))) for _ in range(models)]
    targets = random_targets(n, 30, seed).masked_fill(some(n, masked, seed), -100)
    temperature = given_heads[0].temperature
    values = multi_linear_logprob(
        [h.hidden for h in given_heads], [h.weight for h in given_heads], targets, temperature=temperature,
        biases=[h.bias for h in given_heads], softcaps=[h.softcap for h in given_heads],
    )  # fmt: skip
    assert values.shape == (models, n) and not values.requires_grad
    for row, head in zip(values, given_heads, strict=True):
        head = head._replace(temperature=temperature)
        results = [row]
        for dtype in (head.hidden.dtype, torch.float64):
            parts = [None if t is None else t.to(dtype) for t in head[:3]]
            log_p = torch.log_softmax(plain_logits(*parts, head.temperature, head.softcap), 1)
            logprob = log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
            results.append(torch.where(targets != -100, logprob, 0.0))
        assert_as_good(*([r] for r in results), head)


@settings(drawn, max_examples=80)
@given(
    data=st.data(),
    n=st.integers(1, 20),
    vocab=st.integers(1, 120),
    lambdas=st.lists(st.sampled_from([1.5, 1.0, 0.0, -0.5]), min_size=1, max_size=3),
    normalizer=st.sampled_from(["active", "count", "none"]),
    masked=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_full_vocab_tcopd_loss(small_tiles, data, n, vocab, lambdas, normalizer, masked, seed):
    """One dtype for all models; each has its own width, bias and soft-cap."""
    dtype = data.draw(st.sampled_from(DTYPES))
    draw = heads(st.just(n), st.just(vocab), (dtype,), ("ordinary", "all under -1e3"))
    student, ref, *teachers = (data.draw(draw) for _ in range(2 + len(lambdas)))
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed)).masked_fill(some(n, masked, seed), 0.0)

    def run(backend, dtype):
        inputs = student.to(dtype)
        frozen = [[None if t is None else t.to(dtype) for t in head[:3]] for head in (ref, *teachers)]
        loss, metrics = full_vocab_tcopd_loss(
            *inputs[:2], *frozen[0][:2], [t[0] for t in frozen[1:]], [t[1] for t in frozen[1:]], lambdas,
            weights=weights.to(dtype if dtype == torch.float64 else torch.float32), normalizer=normalizer,
            temperature=student.temperature, bias=inputs[2] if len(inputs) > 2 else None, softcap=student.softcap,
            ref_bias=frozen[0][2], ref_softcap=ref.softcap, teacher_biases=[t[2] for t in frozen[1:]],
            teacher_softcaps=[t.softcap for t in teachers], backend=backend,
        )  # fmt: skip
        assert metrics["token_count"] == (weights != 0).sum()
        return with_grads(loss, inputs)

    loudest = max((student, ref, *teachers), key=lambda head: largest(head.hidden.double() @ head.weight.double().T))
    loudest = student._replace(hidden=loudest.hidden, weight=loudest.weight, softcap=None)
    results = [run("torch", dtype), run("reference", dtype), run("reference", torch.float64)]
    assert_as_good(*results, loudest, 10 * weights.sum().item())


@pytest.mark.parametrize("function", [linear_logprob, linear_tcopd_loss])
def test_a_head_without_tokens_has_zero_gradients(function):
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    extra = {"advantage": torch.zeros(0), "weights": torch.zeros(0)} if function is linear_tcopd_loss else {}
    value = function(hidden, weight, torch.zeros(0, dtype=torch.long), **extra)[0]
    grads = torch.autograd.grad(value.sum(), (hidden, weight))
    assert grads[0].shape == (0, 5) and not grads[1].any()


@pytest.mark.parametrize("grad_tol", [0.0, 2.0**-8])
@pytest.mark.parametrize("fused", [False, True])
def test_a_soft_capped_target_of_vanishing_probability_has_the_slope_of_its_own_logit(fused, grad_tol):
    """Its logit cannot be recovered from a probability of exp(−88), which fp32 does not hold."""
    hidden, weight = torch.tensor([[10332.4, 4170.2]]), torch.tensor([[0.04, 0.44], [-0.32, -0.12], [-1.08, 0.27]])
    targets, head = torch.tensor([1]), {"temperature": 0.4, "softcap": 18.0, "grad_tol": grad_tol, "backend": "torch"}
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    if fused:
        loss = linear_tcopd_loss(*inputs, targets, advantage=torch.ones(1), weights=torch.ones(1), **head)[0]
    else:
        loss = linear_logprob(*inputs, targets, **head).logprob.sum()
    for grad in torch.autograd.grad(loss, inputs):
        assert grad.abs().max() < 1e-30
