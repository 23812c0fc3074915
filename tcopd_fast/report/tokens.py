"""Sampled responses with every token coloured by its advantage, and by each teacher's contribution to its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tcopd_fast.report.collect import Run, number
from tcopd_fast.report.text import MISSING, escape, fixed, visible

SHADES = 10
"""Steps of colour on either side of zero."""
_HEAD_TOKENS = 500
_TAIL_TOKENS = 200
_OPEN_TOKENS = 200
_SAMPLES_PER_RUN = 4
_SCALE_QUANTILE = 0.95

_POSITIVE = (37, 99, 235)
_NEGATIVE = (217, 72, 15)
_STRONGEST_MIX = 0.62


def token_style() -> str:
    """CSS classes p1…p10 (blue, above zero) and n1…n10 (orange, below zero), pale enough for dark text."""
    rules = []
    for letter, colour in (("p", _POSITIVE), ("n", _NEGATIVE)):
        for shade in range(1, SHADES + 1):
            mix = _STRONGEST_MIX * shade / SHADES
            rgb = ",".join(str(round(255 + mix * (channel - 255))) for channel in colour)
            rules.append(f".{letter}{shade}{{background:rgb({rgb})}}")
    return "".join(rules)


def token_section(run: Run) -> str:
    """The run's kept responses: the first of the earliest step, then those of the last step.

    All of them share one colour scale: the 95th percentile of |advantage| and |contribution|, in nats.
    """
    samples = _chosen(run.tokens)
    if not samples:
        return '<p class="missing">No token samples were kept.</p>'
    scale = _scale(samples)
    return _legend(scale) + "".join(_sample(sample, scale) for sample in samples)


def _chosen(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    usable = [sample for sample in samples if isinstance(sample.get("tokens"), list) and sample["tokens"]]
    if not usable:
        return []
    first, last = (edge(sample["step"] for sample in usable) for edge in (min, max))
    latest = [sample for sample in usable if sample["step"] == last]
    if first == last:
        return latest[:_SAMPLES_PER_RUN]
    earliest = next(sample for sample in usable if sample["step"] == first)
    return [earliest, *latest[: _SAMPLES_PER_RUN - 1]]


def _scale(samples: Sequence[Mapping[str, Any]]) -> float:
    values = [value for sample in samples for value in _numbers(sample.get("advantage"))]
    values += [
        value for sample in samples for _, entry in _teachers(sample) for value in _numbers(entry.get("contribution"))
    ]
    magnitudes = sorted(abs(value) for value in values)
    return (magnitudes[int(_SCALE_QUANTILE * (len(magnitudes) - 1))] if magnitudes else 0.0) or 1.0


def _numbers(values: Any) -> list[float]:
    return [value for value in map(number, values if isinstance(values, list) else []) if value is not None]


def _teachers(sample: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    teachers = sample.get("teachers")
    if not isinstance(teachers, Mapping):
        return []
    return [(str(name), entry) for name, entry in teachers.items() if isinstance(entry, Mapping)]


def _legend(scale: float) -> str:
    steps = range(1, SHADES + 1)
    shades = [*(f"n{step}" for step in reversed(steps)), "zero", *(f"p{step}" for step in steps)]
    swatches = "".join(f'<i class="{shade}"></i>' for shade in shades)
    return (
        f'<div class="scale"><span>≤ −{scale:.2g}</span><span class="ramp">{swatches}</span><span>≥ +{scale:.2g}</span>'
        "<span>nats per token; orange lowers and blue raises the token's probability. Hover a token for its numbers. "
        "␣ space, ↵ new line, ⇥ tab.</span></div>"
    )


def _sample(sample: Mapping[str, Any], scale: float) -> str:
    tokens = [str(token) for token in sample["tokens"]]
    shown = _shown(len(tokens))
    verdicts = {"True": ("right", "correct"), "False": ("wrong", "wrong")}
    style, verdict = verdicts.get(str(sample.get("correct")), ("", "not judged"))
    advantage = _numbers(sample.get("advantage"))
    average = fixed(sum(advantage) / len(advantage), sign=True) if advantage else MISSING
    facts = [f"step {sample['step']}", f"prompt {sample.get('prompt_id', MISSING)}", str(sample.get("domain", MISSING))]
    facts += [f"{len(tokens)} tokens", f"mean advantage {average} nats"]
    rows = [_row("advantage", "", _advantage_spans(sample, tokens, shown, scale), True)]
    for name, entry in _teachers(sample):
        weight = f"λ = {fixed(entry.get('lambda'), 2)}"
        spans = _teacher_spans(entry, tokens, shown, scale)
        rows.append(_row(f"contribution of {name}", weight, spans, len(tokens) <= _OPEN_TOKENS))
    return (
        f'<article class="sample"><header><b class="verdict {style}">{verdict}</b>'
        f"<span>{' · '.join(escape(fact) for fact in facts)}</span></header>"
        f'<p class="problem">{escape(sample.get("problem", ""))}</p>{"".join(rows)}</article>'
    )


def _row(title: str, detail: str, spans: str, is_open: bool) -> str:
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{escape(title)} <small>{escape(detail)}</small></summary>"
        f'<div class="tokens">{spans}</div></details>'
    )


def _shown(count: int) -> list[int | None]:
    """Indices to show; None stands for the left-out middle of a long response."""
    if count <= _HEAD_TOKENS + _TAIL_TOKENS:
        return list(range(count))
    return [*range(_HEAD_TOKENS), None, *range(count - _TAIL_TOKENS, count)]


def _advantage_spans(
    sample: Mapping[str, Any], tokens: Sequence[str], shown: Sequence[int | None], scale: float
) -> str:
    def spans(index: int) -> str:
        value = _at(sample, "advantage", index)
        numbers = (
            f"advantage {fixed(value, sign=True)}, reward {fixed(_at(sample, 'reward', index), sign=True)}, "
            f"log π_old {fixed(_at(sample, 'old_logprob', index))} nats"
        )
        return _span(index, tokens[index], value, numbers, scale)

    return "".join(_gap(len(tokens)) if index is None else spans(index) for index in shown)


def _teacher_spans(entry: Mapping[str, Any], tokens: Sequence[str], shown: Sequence[int | None], scale: float) -> str:
    def spans(index: int) -> str:
        value = _at(entry, "contribution", index)
        numbers = (
            f"contribution {fixed(value, sign=True)}, "
            f"log π_teacher − log π_ref {fixed(_at(entry, 'logratio', index), sign=True)} nats"
        )
        return _span(index, tokens[index], value, numbers, scale)

    return "".join(_gap(len(tokens)) if index is None else spans(index) for index in shown)


def _gap(count: int) -> str:
    return f'<em class="gap">… {count - _HEAD_TOKENS - _TAIL_TOKENS} tokens not shown …</em>'


def _at(entry: Mapping[str, Any], key: str, index: int) -> float | None:
    values = entry.get(key)
    return number(values[index]) if isinstance(values, list) and index < len(values) else None


def _span(index: int, token: str, value: float | None, numbers: str, scale: float) -> str:
    title = escape(f"token {index + 1} {token!r}: {numbers}")
    line_end = "<br>" * min(token.count("\n"), 2)
    return f'<span class="{_shade(value, scale)}" title="{title}">{_token_text(token)}</span>{line_end}'


def _token_text(token: str) -> str:
    """The token as HTML text in which white space and other invisible characters can be seen."""
    text = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return escape(visible(text)) or "∅"


def _shade(value: float | None, scale: float) -> str:
    if value is None:
        return "none"
    shade = min(SHADES, round(abs(value) / scale * SHADES))
    if shade == 0:
        return "zero"
    return f"{'p' if value > 0 else 'n'}{shade}"
