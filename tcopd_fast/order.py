"""Stage 1, data: which prompts every step takes. Pure functions, so that a resumed run needs only its step number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tcopd_fast.config import nearest
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt


def weighted_prompts(prompts: Sequence[Prompt], weights: Mapping[str, float] | None) -> tuple[Prompt, ...]:
    """The prompts that take part: all of them without weights, else those whose domain has a weight above 0.

    Raises UserError for a weight of a domain that no prompt has, a domain without a weight, and weights that are all 0.
    """
    if weights is None:
        return tuple(prompts)
    domains = sorted({prompt.domain for prompt in prompts})
    for name in weights:
        if name not in domains:
            raise UserError(
                f"data.domain_weights.{name}: no training prompt has this domain; domains are "
                f"{', '.join(domains)}{nearest(name, domains)}"
            )
    for domain in domains:
        if domain not in weights:
            raise UserError(
                f"data.domain_weights: training prompts have the domain {domain!r}, which has no weight; add one "
                "(0 leaves the domain out)"
            )
    if not any(weights.values()):
        raise UserError("data.domain_weights: every weight is 0; give at least one domain a weight above 0")
    return tuple(prompt for prompt in prompts if weights[prompt.domain])


def batch_for_step(
    prompts: Sequence[Prompt],
    step: int,
    size: int,
    *,
    seed: int,
    shuffle: bool,
    weights: Mapping[str, float] | None = None,
) -> list[Prompt]:
    """Return the `size` prompts of `step` (counted from 0), over all ranks.

    Epochs follow each other without a gap: a batch may end one epoch and begin the next, and every prompt comes
    once per epoch. With `shuffle` each epoch has its own permutation, drawn from (seed, epoch).

    weights: domain -> relative share of the prompts (see `domain_counts`). Every domain then has epochs of its own,
    and the domains of a step are interleaved, so that each part of the batch holds its share of every domain.

    The result depends on the arguments alone.
    """
    if weights is None:
        return _stretch(prompts, step * size, size, seed, shuffle)
    before, after = domain_counts(weights, step * size), domain_counts(weights, (step + 1) * size)
    batch: list[Prompt] = []
    places: list[np.ndarray] = []
    for domain, start in before.items():
        count = after[domain] - start
        own = [prompt for prompt in prompts if prompt.domain == domain]
        batch += _stretch(own, start, count, seed, shuffle, stream=domain)
        # One prompt in each of `count` equal parts of the batch, at a random place in it: a fixed place could put
        # every prompt of a domain on the same rank.
        offset = _random_bits(count, seed, step, "places", domain) / 2.0**64 if shuffle else 0.5
        places.append((np.arange(count) + offset) / max(count, 1))
    return [batch[i] for i in np.argsort(np.concatenate(places), kind="stable")]


def domain_counts(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """How many of the first `total` prompts of a run each domain with a weight above 0 gives.

    With share p_d = w_d / Σw the j-th prompt of a domain (from 0) is due at (j + ½) / p_d, and prompts come in the
    order of their due times (Sainte-Laguë's method). Counts therefore never fall as `total` grows, and differ from
    total · p_d by at most (1 + n · p_d) / 2 for n domains: by ½ with two of them, by less than 1 with three.
    """
    given = {domain: Fraction(str(weight)) for domain, weight in sorted(weights.items()) if weight}
    shares = {domain: weight / sum(given.values()) for domain, weight in given.items()}
    # The last due time is at least total − n/2. What is due before that is counted, the rest dealt out one by one.
    last = total - Fraction(len(shares), 2)
    counts = {domain: max(0, math.floor(share * last - Fraction(1, 2))) for domain, share in shares.items()}
    while sum(counts.values()) < total:
        counts[min(shares, key=lambda domain: (2 * counts[domain] + 1) / shares[domain])] += 1
    return counts


def _stretch(
    prompts: Sequence[Prompt], start: int, size: int, seed: int, shuffle: bool, stream: str = ""
) -> list[Prompt]:
    """Prompts start … start + size − 1 of the endless order."""
    n_prompts = len(prompts)
    out: list[Prompt] = []
    for epoch in range(start // n_prompts, (start + size - 1) // n_prompts + 1):
        order = np.argsort(_random_bits(n_prompts, seed, epoch, stream), kind="stable") if shuffle else range(n_prompts)
        first, last = max(start - epoch * n_prompts, 0), min(start + size - epoch * n_prompts, n_prompts)
        out += [prompts[i] for i in order[first:last]]
    return out


def _random_bits(count: int, seed: int, number: int, *names: str) -> np.ndarray:
    """uint64 [count], fixed by the other arguments. NumPy promises equal raw bits across versions, nothing more."""
    entropy = [seed % 2**64, number, *(byte for name in names for byte in name.encode())]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
