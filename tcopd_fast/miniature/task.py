"""The two small domains of the miniature: problems, answers, responses, problem files.

Both domains print the same surface, a tag and a chain of four two-digit numbers joined by ``+`` and ``-``:

* ``math`` (tag ``M``): the value of the chain, from left to right; every running total lies in 10..99.
* ``largest`` (tag ``L``): the largest of the four numbers; the signs do not matter.

A response ends in ``\\boxed{NN}``. It may show its work first, three running values each followed by ``;``
(running totals in ``math``, running maxima in ``largest``)::

    M:47+38-19+12=85;66;78;\\boxed{78}        L:47+38-19+12=\\boxed{47}
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

TAGS = {"math": "M", "largest": "L"}
DOMAINS = tuple(TAGS)
CHAIN_STEPS = 3
LOWEST, HIGHEST = 10, 99
"""Every operand and every running total has two digits, so all prompts have the same number of tokens."""

_PROBLEM = re.compile(r"([ML]):(\d\d)" + r"([+-])(\d\d)" * CHAIN_STEPS)
_BOXED = re.compile(r"\\boxed\{(\d+)\}")


@dataclass(frozen=True)
class Problem:
    """One row of a problem file: `problem` is the user message, `answer` has two digits."""

    id: str
    problem: str
    answer: str
    domain: str


def random_chain(rng: random.Random) -> str:
    """Draw ``a±b±c±d`` with each signed operand uniform over those that keep the running total in 10..99."""
    total = rng.randint(LOWEST, HIGHEST)
    chain = str(total)
    for _ in range(CHAIN_STEPS):
        n_additions = max(0, HIGHEST - total - LOWEST + 1)
        n_subtractions = max(0, total - 2 * LOWEST + 1)
        pick = rng.randrange(n_additions + n_subtractions)
        sign, operand = ("+", pick + LOWEST) if pick < n_additions else ("-", pick - n_additions + LOWEST)
        chain += f"{sign}{operand}"
        total += operand if sign == "+" else -operand
    return chain


def chain_of(problem: str) -> str:
    """Return a problem text without its tag: the unit by which train and held-out are kept apart."""
    return problem.split(":", 1)[1]


def running_values(problem: str) -> list[int]:
    """Return the three running values of a problem text; the last one is the answer.

    Raises ValueError if `problem` is not of the form ``M:47+38-19+12`` or ``L:47+38-19+12``.
    """
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        raise ValueError(f"problem {problem!r} is not of the form 'M:47+38-19+12' or 'L:47+38-19+12'")
    tag, first, *rest = match.groups()
    numbers = [int(first), *(int(digits) for digits in rest[1::2])]
    if tag == TAGS["largest"]:
        return list(accumulate(numbers, max))[1:]
    signed = [numbers[0], *(n if sign == "+" else -n for sign, n in zip(rest[::2], numbers[1:], strict=True))]
    return list(accumulate(signed))[1:]


def answer_of(problem: str) -> str:
    """Return the correct answer of a problem text as two digits."""
    return str(running_values(problem)[-1])


def response_to(problem: str, *, show_work: bool) -> str:
    """Return the correct response text, without the end-of-sequence token."""
    values = running_values(problem)
    work = "".join(f"{value};" for value in values) if show_work else ""
    return rf"{work}\boxed{{{values[-1]}}}"


def boxed_answer(response: str) -> str | None:
    """Return the content of the last ``\\boxed{NN}`` in a response, or None if there is none."""
    found = _BOXED.findall(response)
    return found[-1] if found else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the last boxed number of `response` equals `answer`."""
    return boxed_answer(response) == answer


def problem_stream(domain: str, seed: int, *, exclude: Collection[str] = ()) -> Iterator[str]:
    """Yield problem texts of `domain` for ever, the same for the same seed, skipping chains in `exclude`."""
    if domain not in TAGS:
        raise ValueError(f"domain {domain!r} is unknown; choose one of {', '.join(DOMAINS)}")
    rng = random.Random(f"{domain}-{seed}")
    while True:
        chain = random_chain(rng)
        if chain not in exclude:
            yield f"{TAGS[domain]}:{chain}"


def distinct_problems(
    domain: str, count: int, seed: int, *, split: str, exclude: Collection[str] = ()
) -> list[Problem]:
    """Return `count` problems of `domain` with pairwise different chains, none of them in `exclude`."""
    texts: dict[str, None] = {}
    for text in problem_stream(domain, seed, exclude=exclude):
        texts[text] = None
        if len(texts) == count:
            break
    return [
        Problem(f"{split}-{domain}-{number:05d}", text, answer_of(text), domain) for number, text in enumerate(texts)
    ]


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write one JSON object per line with the fields id, problem, answer, domain."""
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems), encoding="utf-8")


def read_problems(path: Path) -> list[Problem]:
    """Read what `write_problems` wrote."""
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
