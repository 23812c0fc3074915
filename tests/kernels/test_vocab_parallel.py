"""A head whose vocabulary is sharded over ranks against the whole head in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import assert_no_worse_than_torch, make_problem, plain_logprob
from ranks import run_ranks
from tcopd_kernels import linear_logprob
from test_grad_tol import make_peaked

N, VOCAB, DIM, IGNORED = 37, 203, 24, [3, 20, 36]
STARTS = {2: [0, 71, VOCAB], 3: [0, 17, 160, VOCAB]}
GRAD_TOL = 2.0**-6
HEADS = {
    "plain": {},
    "all options": {"temperature": 0.7, "softcap": 6.0, "with_bias": True, "entropy": True},
    "bfloat16": {"dtype": torch.bfloat16, "with_bias": True, "entropy": True},
    "triton": {"backend": "triton", "temperature": 1.2, "with_bias": True, "entropy": True},
    "large logits": {"level": 1e4, "with_bias": True, "entropy": True},
    "removed tokens": {"removed": 100, "with_bias": True, "entropy": True},
    "padded": {"vocab_size": 190, "with_bias": True, "entropy": True},
}


def head_problem(dtype=torch.float32, level=0.0, removed=0, vocab_size=None, with_bias=False, **options):
    """(hidden, weight, bias, targets, upstream [3, N], options of linear_logprob)."""
    hidden, weight, bias, targets = make_problem(N, VOCAB, DIM)
    bias = bias + level
    if removed:
        bias[:removed] = -torch.inf
        targets = targets % (VOCAB - removed) + removed
    if vocab_size is not None:
        weight[vocab_size:] = torch.nan
        targets, options["vocab_size"] = targets % vocab_size, vocab_size
    targets[IGNORED] = -100
    upstream = torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    head = [hidden.to(dtype), weight.to(dtype), bias.to(dtype) if with_bias else None]
    return *head, targets, upstream, {"backend": "torch"} | options


def outputs_and_grads(call, hidden, weight, bias, targets, upstream, **options):
    """[logprob, lse, entropy or not, gradients of hidden, weight, bias or not]."""
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    out = [t for t in call(inputs[0], inputs[1], targets, bias=inputs[2], **options) if t is not None]
    loss = sum((g.to(o.dtype) * o).sum() for g, o in zip(upstream, out, strict=False))
    return [t.detach() for t in (*out, *torch.autograd.grad(loss, [t for t in inputs if t is not None]))]


def own_rows(group, starts=None):
    starts = starts or STARTS[group.size()]
    return slice(starts[group.rank()], starts[group.rank() + 1])


def run_head(group, **case):
    hidden, weight, bias, targets, upstream, options = head_problem(**case)
    rows = own_rows(group)
    shard = {"vocab_start": rows.start, "process_group": group}
    own_bias = None if bias is None else bias[rows]
    return outputs_and_grads(linear_logprob, hidden, weight[rows], own_bias, targets, upstream, **options, **shard)


def peaked_problem():
    hidden, weight, targets = make_peaked(48, 700, 8.0, flat_rows=2)
    targets[5] = -100
    upstream = torch.randn(2, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return hidden.double(), weight.double(), targets, upstream


def run_tolerance(group):
    hidden, weight, targets, upstream = peaked_problem()
    rows, certificate = own_rows(group, [0, 150, 320, 700] if group.size() == 3 else [0, 150, 700]), {}
    found = outputs_and_grads(
        linear_logprob, hidden, weight[rows], None, targets, upstream, backend="torch", grad_tol=GRAD_TOL,
        certificate=certificate, vocab_start=rows.start, process_group=group,
    )  # fmt: skip
    return found, certificate, rows


def run_errors(group):
    """The message of every wrong call, on this rank."""
    hidden, weight, _, targets, _, _ = head_problem()
    rows, rank = own_rows(group), group.rank()
    last = rank == group.size() - 1
    calls = {
        "gap": {"vocab_start": rows.start + 5 * last},
        "overlap": {"vocab_start": rows.start - 5 * last},
        "length": {"hidden": hidden[: N - rank], "targets": targets[: N - rank]},
        "targets": {"targets": targets.roll(rank)},
        "unowned": {"targets": targets + 100 * VOCAB},
    }
    messages = {}
    for name, call in calls.items():
        call = {"hidden": hidden, "targets": targets, "vocab_start": rows.start} | call
        with pytest.raises(ValueError) as error:
            linear_logprob(call.pop("hidden"), weight[rows], process_group=group, **call)
        messages[name] = str(error.value)
    return messages


def run_group(group):
    own_sum = run_head(group, reduce_grad_hidden=False)
    return {
        "heads": {name: run_head(group, **case) for name, case in HEADS.items()},
        "own grad_hidden": own_sum[2],
        "tolerance": run_tolerance(group),
        "errors": run_errors(group),
    }


def run_groups():
    """All three ranks together, and the last two of them alone."""
    pair = dist.new_group([1, 2])
    found = {3: run_group(dist.group.WORLD)}
    return found | ({2: run_group(pair)} if dist.get_rank() else {})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(run_groups, 3, tmp_path_factory.mktemp("ranks"), TRITON_INTERPRET="1")


@pytest.fixture(params=[2, 3])
def ranks(request, results):
    return [rank[request.param] for rank in results if request.param in rank]


@pytest.mark.parametrize("name", HEADS)
def test_outputs_and_gradients_are_those_of_the_whole_head(ranks, name):
    case = HEADS[name]
    hidden, weight, bias, targets, upstream, options = head_problem(**case)
    kept = targets != -100
    vocab = options.get("vocab_size", VOCAB)

    def plain(hidden, weight, targets, bias, temperature=1.0, softcap=None, entropy=False, **_):
        """The definition on the rows that count, spread over all."""
        bias = None if bias is None else bias[:vocab]
        values = plain_logprob(hidden[kept], weight[:vocab], targets[kept], bias, temperature, softcap)
        return [v.new_zeros(N).masked_scatter(kept, v) for v in values[: 3 if entropy else 2]]

    same = (hidden, weight, bias)
    if case.get("removed"):
        # exp(−inf)·(−inf) is NaN: the definition works on the tokens that remain.
        first = case["removed"]
        same, targets = (hidden, weight[first:], bias[first:]), torch.where(kept, targets - first, -100)
        vocab -= first
    wide = [None if t is None else t.double() for t in same]
    truth = outputs_and_grads(plain, *wide, targets, upstream, **options)
    torch_values = outputs_and_grads(plain, *same, targets, upstream, **options)
    found = [rank["heads"][name] for rank in ranks]
    n_local = 2 if bias is not None else 1
    shared = len(truth) - n_local
    for values in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values[:shared], found[0], strict=False))
    joined = found[0][:shared] + [torch.cat([v[shared + i] for v in found]) for i in range(n_local)]
    if case.get("removed"):
        assert all((t[:first] == 0).all() for t in joined[shared:])
        joined[shared:] = [t[first:] for t in joined[shared:]]
    outputs = ("logprob", "lse", "entropy")[: shared - 1]
    names = (*outputs, "hidden.grad", "weight.grad", "bias.grad")
    for label, value, torch_value, true in zip(names, joined, torch_values, truth, strict=False):
        assert_no_worse_than_torch(value, torch_value, true, f"{name} {label}")
    assert all((t[IGNORED] == 0).all() for t in joined[:shared])


def test_without_reduction_the_ranks_gradients_of_hidden_add_up(ranks):
    total = sum(rank["own grad_hidden"] for rank in ranks)
    torch.testing.assert_close(total, ranks[0]["heads"]["plain"][2])
    assert not torch.equal(ranks[0]["own grad_hidden"], total)


def test_what_the_ranks_leave_out_together_is_within_the_tolerance(ranks):
    hidden, weight, targets, upstream = peaked_problem()
    exact = outputs_and_grads(linear_logprob, hidden, weight, None, targets, upstream, backend="torch")
    found = [rank["tolerance"] for rank in ranks]
    coefficient = (upstream[1] - upstream[0]).abs() * (targets != -100)
    largest = [certificate["dropped_mass_max"].item() for _, certificate, _ in found]
    assert max(largest) <= GRAD_TOL / len(ranks) * (1 + 1e-6) and min(largest) > 0
    assert any(certificate["kept_column_sum"] < 47 * (rows.stop - rows.start) / 2 for _, certificate, rows in found)
    bound = sum(largest) * (1 + 1e-6)
    for values, certificate, rows in found:
        assert certificate["grad_row_count"] == 47
        error = values[2] - exact[2]
        assert (error.norm(dim=1) <= coefficient * bound * weight.norm(dim=1).max() + 1e-9).all()
        assert (values[3] - exact[3][rows]).norm() <= (coefficient * bound * hidden.norm(dim=1)).sum() + 1e-9
    assert any((values[3] != exact[3][rows]).any() for values, _, rows in found)


def test_every_rank_gets_the_same_clear_error(ranks):
    expected = {
        "gap": "nobody holds",
        "overlap": "more than one holds",
        "length": r"must be the same on all ranks of process_group, got N=\[37, 36",
        "targets": "targets must be the same ids",
        "unowned": "which no rank of process_group owns",
    }
    for name, pattern in expected.items():
        messages = {rank["errors"][name] for rank in ranks}
        assert len(messages) == 1, messages
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(messages.pop())


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_compiled_call_takes_a_process_group(group_of_one):
    hidden, weight, bias, targets, upstream, options = head_problem(with_bias=True)
    options |= {"process_group": group_of_one, "grad_tol": 0.1}
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    eager, found = (
        outputs_and_grads(call, hidden, weight, bias, targets, upstream, **options)
        for call in (linear_logprob, compiled)
    )
    torch.testing.assert_close(found, eager)


BAD_SHARDS = {
    "vocab_start must be an int": {"vocab_start": 1.0},
    "at least 0, got -1": {"vocab_start": -1},
    "pass the process_group that holds the others": {"vocab_start": 4},
    "process_group must be a torch.distributed.ProcessGroup or None, got str": {"process_group": "tp"},
}


@pytest.mark.parametrize("message", BAD_SHARDS)
def test_bad_shards_are_named(message):
    hidden, weight, _, targets = make_problem(3, 9, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_logprob(hidden, weight, targets, **BAD_SHARDS[message])
