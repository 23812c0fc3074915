"""Every public operation on a long batch and a large vocabulary (more than 2^32 logits), at extreme logits, in poisoned
memory and with weights beyond 2^31 elements, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_mode import DEVICE, GRAD_LIMIT, HALF, sized
from problems import OPERATIONS, exact, make_copies, make_originals, run
from tcopd_kernels import tcopd_policy_loss

ROWS = sized(32768, 40)
DIMS = sized((64, 64, 32, 64), (16, 8, 8, 16))
QWEN, GEMMA = sized((151936, 262144), (100, 198))
ALL = {"temperature": 0.7, "softcap": 10.0}
PROBLEMS = {
    "Gemma": (GEMMA, HALF, {}),
    "Qwen, all options": (QWEN, HALF, ALL),
    "Qwen in float16, all options": (QWEN, torch.float16, ALL),
    "Qwen in float32": (QWEN, torch.float32, {}),
}
# What an operation takes beside temperature and softcap, with all options. The options, and sizes that are multiples
# of 16, are those of few problems: each other combination is one more compilation.
MORE = {
    "logprob": {"entropy": True},
    "loss": {"entropy": True},
    "step": {"entropy": True, "ref_kl_coef": 1e-4, "logratio_clamp": 2.0, "launch": "joint"},
    "multi": {"launch": "joint"},
}
TOLERANCE = {"grad_tol": 2.0**-6}
TOLERANT = ["logprob", "loss", "step", "full_vocab"]


def assert_near(found, true, limit, label):
    """Relative error of each of 32 parts, so that a few wrong rows show; of parts far below the others, to those."""
    assert found.shape == true.shape
    floor = 0.02 * true.norm() / 32**0.5
    for part, true_part in zip(found.double().chunk(32), true.chunk(32), strict=True):
        error = (part - true_part).norm() / (true_part.norm() + floor)
        assert error <= limit, f"{label}: relative error {error:.3g}, limit {limit:.3g}"  # false for NaN


def assert_accurate(found, true, dtype, *, loosen=0.0, atol=5e-5):
    """atol: of the values per row; a loss is a sum of such with weights."""
    for value, true_value in zip(found.tokens, true.tokens, strict=True):
        torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=atol)
    # A part may be worse than the whole, and float32 sums of so many rows are no better than this.
    limit = max(2 * GRAD_LIMIT[dtype], 2e-5) + loosen
    for name, value, true_value in zip(("hidden", "weight", "bias"), found.grads[1:], true.grads[1:], strict=False):
        assert value.dtype == dtype
        assert_near(value, true_value, limit, name)
    for value, true_value in zip(found.grads[:1], true.grads[:1], strict=True):
        torch.testing.assert_close(value.double(), true_value, rtol=1e-4, atol=8 * atol)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_full_size(problem, operation):
    vocab, dtype, head = problem
    rows, places, originals = make_copies(make_originals(vocab, DIMS, dtype, **head), ROWS)
    options = head | (MORE.get(operation, {}) if head else {})
    true = exact(operation, originals, places, rows.weights, **options)
    assert_accurate(run(operation, rows, **options), true, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_other_divergences_at_full_size(divergence):
    rows, places, originals = make_copies(make_originals(GEMMA, DIMS, HALF), ROWS)
    true = exact("full_vocab", originals, places, rows.weights, divergence=divergence)
    assert_accurate(run("full_vocab", rows, divergence=divergence, backend="auto"), true, HALF)


@pytest.mark.parametrize("operation", TOLERANT)
def test_tolerance_at_full_size(bounds_in_proportion, operation):
    vocab = sized(GEMMA, 500)
    rows, places, originals = make_copies(make_originals(vocab, DIMS, HALF, peaked=True), ROWS)
    true = exact(operation, originals, places, rows.weights)
    found = run(operation, rows, **TOLERANCE)
    tol = TOLERANCE["grad_tol"]
    assert found.metrics["dropped_mass_max"] <= tol
    assert 0 < found.metrics["kept_column_sum"] < ROWS * vocab / 4
    for value, true_value in zip(found.tokens, true.tokens, strict=True):
        torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=5e-5)
    longest, size = originals.heads[0].double().norm(dim=1).max(), true.grads[1].norm(dim=1)
    allowed = coefficients(operation, rows, true) * tol * longest
    error = (found.grads[1].double() - true.grads[1]).norm(dim=1)
    assert (error <= allowed + 2 * GRAD_LIMIT[HALF] * (size + size.mean())).all()


def coefficients(operation, rows, true):
    """[N]: what the mass that a row leaves out is multiplied with in its gradient."""
    if operation == "logprob":  # of logprob − lse / 2
        return 1.5 * rows.weights
    if operation == "full_vocab":  # the tolerance is one of the gradient itself
        return rows.weights
    logprob = true.tokens[0].requires_grad_()
    advantage = true.tokens[-1] if operation == "step" else rows.advantage
    loss, _ = tcopd_policy_loss(
        logprob, advantage, old_logprob=rows.old_logprob, rollout_logprob=rows.rollout_logprob, weights=rows.weights
    )
    return torch.autograd.grad(loss, logprob)[0].abs()


EXTREMES: dict[str, dict] = {
    "far below zero": {"level": -1100.0},
    "plus 1e4": {"level": 1e4},
    "minus 1e4": {"level": -1e4},
    "from minus to plus 1e4": {"scale": 1200.0},
}


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "topk"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits(extreme, dtype, operation):
    """A float32 logit of 1e4 is known to 1e-3."""
    n, vocab = sized((300, 32000), (20, 131))
    rows, places, originals = make_copies(make_originals(vocab, DIMS, dtype, on_policy=True, **extreme), n)
    options = {"advantage_clamp": 10.0} if operation == "step" else {}
    true, found = exact(operation, originals, places, rows.weights, **options), run(operation, rows, **options)
    if operation == "full_vocab" and "scale" in extreme:  # one token has all the mass, and no gradient is left
        assert all(value.isfinite().all() for value in found.grads)
        torch.testing.assert_close(found.grads[0].double(), true.grads[0], rtol=1e-4, atol=1e-3)
    else:
        assert_accurate(found, true, dtype, loosen=8e-3, atol=5e-3)


@pytest.mark.parametrize(
    "operation, options",
    [(name, ALL | MORE.get(name, {})) for name in OPERATIONS] + [(name, TOLERANCE) for name in TOLERANT],
    ids=str,
)
def test_no_memory_is_read_before_it_is_written(bounds_in_proportion, monkeypatch, operation, options):
    n, vocab = sized((300, 32000), (20, 300))
    rows, _, _ = make_copies(make_originals(vocab, DIMS, HALF, peaked="grad_tol" in options), n)
    run(operation, rows, **options)  # tiles are chosen here
    clean = run(operation, rows, **options)

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    stained = run(operation, rows, **options)
    for value, other in zip((*clean.grads, *clean.tokens), (*stained.grads, *stained.tokens), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype, head", [(HALF, {}), (torch.float16, ALL)], ids=["plain", "float16, all options"])
def test_heads_whose_rows_lie_beyond_two_to_the_31_elements(dtype, head, operation):
    """Every head is a slice of the columns of one matrix of 2^24 columns; its row 128 begins at element 2^31."""
    vocab, stride = 160, sized(2**24, 2**9)
    options = head | (MORE.get(operation, {}) if head else {})
    rows, places, originals = make_copies(make_originals(vocab, DIMS, dtype, **head), sized(300, 20))
    true = exact(operation, originals, places, rows.weights, **options)
    storage = torch.empty(vocab, stride, dtype=dtype, device=DEVICE)
    begins = [sum(DIMS[:i]) for i in range(len(DIMS))]
    far = [storage[:, begin : begin + dim] for begin, dim in zip(begins, DIMS, strict=True)]
    for view, own in zip(far, rows.heads, strict=True):
        view.copy_(own)
    assert_accurate(run(operation, rows._replace(heads=far), **options), true, dtype)
    if operation in TOLERANT and not head:
        assert_accurate(run(operation, rows._replace(heads=far), grad_tol=2.0**-20), true, dtype)
