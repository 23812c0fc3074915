"""The order of prompts is a pure function: epochs without a gap, and with weights exact shares of every domain."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcopd_fast.errors import UserError
from tcopd_fast.order import batch_for_step, domain_counts, weighted_prompts
from tcopd_fast.types import Prompt


def numbered(n: int) -> list[Prompt]:
    return [Prompt(str(i), "default", (i,), "", None, "") for i in range(n)]


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 100),
    epochs=st.integers(1, 4),
    seed=st.integers(-5, 2**63),
    shuffle=st.booleans(),
)
def test_every_prompt_comes_once_per_epoch(n, size, epochs, seed, shuffle):
    prompts = numbered(n)
    steps = -(-n * epochs // size)
    stream = [p.id for step in range(steps) for p in batch_for_step(prompts, step, size, seed=seed, shuffle=shuffle)]
    assert len(stream) == steps * size
    for epoch in range(epochs):
        assert Counter(stream[epoch * n : (epoch + 1) * n]) == Counter(p.id for p in prompts)
    if not shuffle:
        assert stream[:n] == [p.id for p in prompts]


@given(n=st.integers(1, 40), step=st.integers(0, 50), size=st.integers(1, 30), parts=st.integers(1, 5))
def test_smaller_steps_walk_the_same_order(n, step, size, parts):
    """A step of size·parts is the concatenation of `parts` steps of `size`: nothing but the position counts."""
    prompts = numbered(n)
    whole = batch_for_step(prompts, step, size * parts, seed=1, shuffle=True)
    pieces = [p for i in range(parts) for p in batch_for_step(prompts, step * parts + i, size, seed=1, shuffle=True)]
    assert whole == pieces


def test_order_depends_on_seed_and_epoch_and_is_pinned():
    prompts = numbered(12)

    def order(step: int, seed: int) -> list[int]:
        return [int(p.id) for p in batch_for_step(prompts, step, 12, seed=seed, shuffle=True)]

    assert len({tuple(order(step, seed)) for step in range(3) for seed in range(3)}) == 9
    # A resumed run on another machine must meet the same prompts.
    assert order(0, 0) == [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]


WEIGHTS = st.dictionaries(
    st.sampled_from("abcdefg"), st.floats(0, 100, allow_subnormal=False).map(lambda x: round(x, 2)), min_size=1
).filter(lambda weights: any(weights.values()))


def of_domains(**sizes: int) -> list[Prompt]:
    return [Prompt(f"{name}{i}", name, (i,), "", None, "") for name, size in sizes.items() for i in range(size)]


def counted(batch: list[Prompt]) -> dict[str, int]:
    return dict(Counter(prompt.domain for prompt in batch))


@given(weights=WEIGHTS, total=st.integers(0, 300))
def test_counts_are_those_of_dealing_out_one_by_one(weights, total):
    """Against the definition, and within the stated distance of the exact share at every length."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    dealt = dict.fromkeys(sorted(exact), 0)
    for number in range(total + 1):
        if number in (0, 1, total // 2, total):
            assert domain_counts(weights, number) == dealt
        dealt[min(dealt, key=lambda name: (2 * dealt[name] + 1) / exact[name])] += 1
    for name, count in domain_counts(weights, total).items():
        share = exact[name] / sum(exact.values())
        off = abs(count - total * share)
        assert off <= (1 + len(exact) * share) / 2
        assert len(exact) != 2 or off <= Fraction(1, 2)
        assert len(exact) != 3 or off < 1


def test_counts_far_into_a_long_run_are_exact_and_cheap():
    assert domain_counts({"math": 3, "code": 1}, 4 * 10**12) == {"code": 10**12, "math": 3 * 10**12}
    assert domain_counts({"a": 0.1, "b": 0.2, "c": 0}, 9) == {"a": 3, "b": 6}


@given(
    weights=st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.integers(0, 9), "c": st.integers(1, 9)}),
    size=st.integers(1, 20),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_step_takes_its_exact_number_from_each_domain(weights, size, seed, shuffle):
    """And every domain walks through its own epochs, whatever the steps' size."""
    prompts = of_domains(a=5, b=3, c=7)
    streams: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for step in range(12):
        batch = batch_for_step(prompts, step, size, seed=seed, shuffle=shuffle, weights=weights)
        assert len(batch) == size
        for name in streams:
            streams[name] += [p.id for p in batch if p.domain == name]
        dealt = domain_counts(weights, (step + 1) * size)
        assert {name: len(ids) for name, ids in streams.items() if weights[name]} == dealt
    one_step = batch_for_step(prompts, 0, 12 * size, seed=seed, shuffle=shuffle, weights=weights)
    for name, n in (("a", 5), ("b", 3), ("c", 7)):
        own = [p.id for p in prompts if p.domain == name]
        assert streams[name] == [p.id for p in one_step if p.domain == name]
        for epoch in range(len(streams[name]) // n):
            assert Counter(streams[name][epoch * n : (epoch + 1) * n]) == Counter(own)
        assert shuffle or streams[name] == (own * (len(streams[name]) // n + 1))[: len(streams[name])]


def test_small_steps_come_to_the_shares_in_the_long_run():
    prompts = of_domains(math=10, code=10)

    def step(number: int) -> dict[str, int]:
        return counted(batch_for_step(prompts, number, 1, seed=0, shuffle=True, weights={"math": 3, "code": 1}))

    assert sum((Counter(step(number)) for number in range(8)), Counter()) == {"math": 6, "code": 2}
    assert [step(number) for number in range(8)].count({"code": 1}) == 2


@given(seed=st.integers(0, 1000), step=st.integers(0, 100))
def test_every_part_of_a_step_holds_its_share_and_no_rank_gets_one_domain_alone(seed, step):
    prompts = of_domains(a=500, b=500)
    batch = batch_for_step(prompts, step, 128, seed=seed, shuffle=True, weights={"a": 1, "b": 1})
    for first in range(0, 128, 32):
        assert abs(counted(batch[first : first + 32])["a"] - 16) <= 2
    for ranks in (2, 4):
        for rank in range(ranks):
            assert len(counted(batch[rank::ranks])) == 2


def test_the_weighted_order_is_pinned_and_does_not_depend_on_how_weights_are_written():
    prompts = of_domains(math=6, code=4)

    def ids(step: int, weights: dict[str, float]) -> list[str]:
        return [p.id for p in batch_for_step(prompts, step, 8, seed=3, shuffle=True, weights=weights)]

    # A resumed run on another machine must meet the same prompts.
    pinned = ["code1", "math4", "math2", "math1", "math3", "math5", "code3", "math0"]
    assert ids(1, {"math": 3, "code": 1}) == pinned
    assert ids(1, {"code": 0.5, "math": 1.5}) == pinned


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"math": 1, "cod": 1}, r"domain_weights.cod: no training prompt has this domain; domains are code, math; did"),
        ({"math": 1}, r"training prompts have the domain 'code', which has no weight; add one \(0 leaves"),
        ({"math": 0, "code": 0}, r"every weight is 0; give at least one domain"),
    ],
)
def test_weights_that_do_not_fit_the_prompts_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        weighted_prompts(of_domains(math=2, code=2), weights)


def test_a_weight_of_0_leaves_the_domain_out():
    prompts = of_domains(math=3, code=2)
    assert weighted_prompts(prompts, None) == tuple(prompts)
    only = weighted_prompts(prompts, {"math": 2, "code": 0})
    assert counted(list(only)) == {"math": 3}
    batch = batch_for_step(only, 1, 4, seed=0, shuffle=True, weights={"math": 2, "code": 0})
    assert counted(batch) == {"math": 4}
