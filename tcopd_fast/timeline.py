"""Who did what when: the spans of timeline.jsonl, their reader, and what they say about throughput.

timeline.jsonl in a run directory has one strict JSON object per step:

    {"step": 3, "start": 1763817678.25, "end": 1763817680.5,
     "tokens": {"rollout": 1710, "scoring": 9120, "learner": 3040},
     "tracks": {"rank 0": [["data", 0.0, 0.001], ["rollout", 0.001, 0.62], ["scoring", 0.62, 1.1], ...],
                "engine 0": [["generate", 0.0, 1.31, 1655], ...]}}

start, end: when the first rank began the step and the last one ended it, in seconds since the epoch. Machines agree
on them as well as their system clocks do.
tracks: spans [stage, from, to], in seconds since `start`; those of a track ascend and do not overlap. A rank's spans
name the stages of `clock.STAGES`, the innermost where stages nest. An engine in a process of its own has "generate":
it had at least one request under way and its weights were not being exchanged; a fourth number counts the tokens of
the responses that came back in the span (or in the exchange after it). Engines' spans begin where the line before
ended, thus before 0 when engines generated between the steps (evaluation, or batches ahead while a checkpoint is
saved). An engine without requests has an empty list; in-process engines have no track, they generate in their rank's
"rollout".
tokens: over all ranks. rollout: response tokens of the step's batch; scoring: tokens of prompts and responses, counted
once for every frozen model that scored them and once where the learner gave log π_old beforehand; learner: tokens of
prompts and responses times `learner.epochs`.

A track has at most `SPANS_PER_TRACK` spans a step (see `fold`), so a line stays small however many micro-batches or
requests a step has.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcopd_fast.errors import UserError

FILE = "timeline.jsonl"
GENERATE = "generate"
TOKEN_METRICS = {"rollout": "batch/tokens", "scoring": "scoring/tokens", "learner": "learner/tokens"}
"""Key of a line's `tokens` -> the metric that has the same number."""
SPANS_PER_TRACK = 64

Interval = tuple[float, float]

_EPOCH = time.time() - time.perf_counter()


def epoch_seconds() -> float:
    """Seconds since the epoch that never run backwards: one offset per process plus the monotonic clock."""
    return _EPOCH + time.perf_counter()


@dataclass(frozen=True, slots=True)
class Span:
    """One stage from `start` to `end`, seconds since the epoch. tokens: of the responses that came back in it."""

    stage: str
    start: float
    end: float
    tokens: int = 0

    @property
    def interval(self) -> Interval:
        """(start, end)."""
        return self.start, self.end


@dataclass(frozen=True)
class StepTimeline:
    """One line of timeline.jsonl, every time in seconds since the epoch. tracks: "rank N" or "engine N" -> spans."""

    step: int
    start: float
    end: float
    tokens: Mapping[str, int]
    tracks: Mapping[str, Sequence[Span]]

    @property
    def seconds(self) -> float:
        """Wall time of the step."""
        return self.end - self.start

    @property
    def ranks(self) -> dict[str, Sequence[Span]]:
        """The tracks of the ranks."""
        return {name: spans for name, spans in self.tracks.items() if name.startswith("rank ")}

    @property
    def engines(self) -> dict[str, Sequence[Span]]:
        """The tracks of engines in processes of their own; empty for in-process engines."""
        return {name: spans for name, spans in self.tracks.items() if name.startswith("engine ")}

    def busy(self) -> dict[str, dict[str, float]]:
        """Track -> stage -> seconds within the step."""
        return {
            name: {
                stage: total(clip((s.interval for s in spans if s.stage == stage), self.start, self.end))
                for stage in dict.fromkeys(s.stage for s in spans)
            }
            for name, spans in self.tracks.items()
        }

    def record(self) -> dict[str, Any]:
        """The line as it is written; spans are rounded to 10 µs."""

        def short(span: Span) -> list[Any]:
            times = [round(span.start - self.start, 5), round(span.end - self.start, 5)]
            return [span.stage, *times, span.tokens] if span.tokens else [span.stage, *times]

        return {
            "step": self.step,
            "start": round(self.start, 6),
            "end": round(self.end, 6),
            "tokens": dict(self.tokens),
            "tracks": {name: [short(span) for span in spans] for name, spans in self.tracks.items()},
        }


def parse(record: Mapping[str, Any]) -> StepTimeline:
    """The inverse of `StepTimeline.record`. Raises ValueError for anything else."""
    try:
        start, end = _ordered(record["start"], record["end"])

        def span(stage: Any, first: Any, last: Any, tokens: Any = 0) -> Span:
            first, last = _ordered(first, last)
            return Span(str(stage), start + first, start + last, int(tokens))

        return StepTimeline(
            step=int(record["step"]),
            start=start,
            end=end,
            tokens={str(name): int(count) for name, count in record["tokens"].items()},
            tracks={_track(name): tuple(span(*item) for item in spans) for name, spans in record["tracks"].items()},
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a line of {FILE}: {error!r}") from error


def _ordered(start: Any, end: Any) -> Interval:
    start, end = float(start), float(end)
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise ValueError(f"no interval: {start} to {end}")
    return start, end


def _track(name: str) -> str:
    if not re.fullmatch(r"(rank|engine) \d+", name):
        raise ValueError(f"track {name!r}: neither a rank's nor an engine's")
    return name


def load(run_dir: Path | str) -> list[StepTimeline]:
    """Every step of a run's timeline.jsonl, ascending; a last line that a crash left unfinished is left out.

    Raises UserError when there is no such file, or for any other line that is not a step.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the run_dir of a training run with logging.timeline=true")
    lines = path.read_bytes().split(b"\n")
    steps = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            steps.append(parse(json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                continue
            raise UserError(f"{path}:{number}: not a step of a timeline; delete the line") from error
    return sorted(steps, key=lambda step: step.step)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, ascending; empty ones are dropped."""
    out: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def intersection(a: Iterable[Interval], b: Iterable[Interval]) -> list[Interval]:
    """The points that lie in both, as disjoint intervals, ascending."""
    left, right = union(a), union(b)
    out: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            out.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return out


def clip(intervals: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """The part of the union that lies in [start, end]."""
    return intersection(intervals, [(start, end)])


def total(intervals: Iterable[Interval]) -> float:
    """Length of the union, seconds."""
    return sum(end - start for start, end in union(intervals))


def merged(tracks: Iterable[Sequence[Span]]) -> list[Span]:
    """One engine's spans as several ranks saw them: the union of their intervals, with all their tokens."""
    spans = sorted((span for track in tracks for span in track), key=lambda span: span.start)
    out: list[Span] = []
    for span in spans:
        if out and span.start <= out[-1].end:
            last = out[-1]
            out[-1] = Span(last.stage, last.start, max(last.end, span.end), last.tokens + span.tokens)
        else:
            out.append(span)
    return out


def tracks_of(
    ranks: Sequence[Sequence[Span]], engines: Sequence[Mapping[str, Sequence[Span]]]
) -> dict[str, Sequence[Span]]:
    """Every rank's own spans, and the engines' as the ranks saw them: one mapping each, see `RolloutEngine.spans`."""
    names = dict.fromkeys(name for seen in engines for name in seen)
    return {f"rank {rank}": spans for rank, spans in enumerate(ranks)} | {
        name: fold(merged(seen.get(name, ()) for seen in engines)) for name in names
    }


def fold(spans: Sequence[Span], limit: int = SPANS_PER_TRACK) -> list[Span]:
    """At most `limit` spans of one track with the same time and tokens per stage; `limit` exceeds the number of stages.

    Above the limit, stretches of 4 neighbouring spans (or 8, 16, …, as few as will do) become one span per stage, laid
    end to end from the stretch's start in order of first appearance: loss, learner, loss, learner turns into loss,
    learner of twice the length. What a stage took stays exact; only its order inside a stretch is lost.
    """
    folded, width = list(spans), 4
    while len(folded) > limit:
        stretches = (spans[i : i + width] for i in range(0, len(spans), width))
        folded = [span for stretch in stretches for span in _per_stage(stretch)]
        width *= 2
    return folded


def _per_stage(stretch: Sequence[Span]) -> Iterator[Span]:
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for span in stretch:
        seconds[span.stage] += span.end - span.start
        tokens[span.stage] += span.tokens
    start = stretch[0].start
    for stage, length in seconds.items():
        yield Span(stage, start, start + length, tokens[stage])
        start += length


@dataclass(frozen=True)
class Use:
    """How a step's wall time was used, in seconds.

    generating: some engine had requests under way (in-process engines: some rank was at its rollout). working: some
    rank was at another stage than rollout. both: the two at the same time; 0 for in-process engines. engine_busy: mean
    over the engines (in-process: ranks) of the time that each generated.
    """

    step: float
    generating: float
    working: float
    both: float
    engine_busy: float

    @property
    def over_ideal(self) -> float:
        """step ÷ max(generating, working): 1 where the longer of the two hides the other; nan for an idle step."""
        longest = max(self.generating, self.working)
        return self.step / longest if longest else float("nan")


def use(step: StepTimeline) -> Use:
    """See `Use`; only what lies within the step counts."""
    own = [span.interval for spans in step.ranks.values() for span in spans if span.stage != "rollout"]
    working = clip(own, step.start, step.end)
    generators = [clip(intervals, step.start, step.end) for intervals in _generators(step)]
    generating = union(interval for intervals in generators for interval in intervals)
    return Use(
        step=step.seconds,
        generating=total(generating),
        working=total(working),
        both=total(intersection(generating, working)) if step.engines else 0.0,
        engine_busy=sum(map(total, generators)) / len(generators) if generators else 0.0,
    )


def throughput_metrics(step: StepTimeline) -> dict[str, float]:
    """The step's rates and shares for metrics.jsonl (docs/metrics.md); nan where a stage took no time.

    A rate divides by the time in which any rank or engine was at that stage.
    """
    used = use(step)
    engine_tokens = sum(span.tokens for spans in step.engines.values() for span in spans)
    tokens = engine_tokens if step.engines else step.tokens["rollout"]
    # Not cut at the step's start: the tokens are those of all responses since the line before.
    generating = total(interval for intervals in _generators(step) for interval in intervals)
    metrics = {
        "batch/tokens_per_s": _ratio(step.tokens["rollout"], used.step),
        "rollout/tokens_per_s": _ratio(tokens, generating),
        "scoring/tokens_per_s": _ratio(step.tokens["scoring"], _stage_seconds(step, "scoring")),
        "learner/tokens_per_s": _ratio(step.tokens["learner"], _stage_seconds(step, "loss", "learner")),
        "rollout/engine_busy_share": _ratio(used.engine_busy, used.step),
    }
    if step.engines:
        metrics["rollout/overlap_share"] = _ratio(used.both, used.generating)
    return metrics


def _generators(step: StepTimeline) -> list[list[Interval]]:
    """When each engine generated; in-process engines do so in their ranks' rollout."""
    if step.engines:
        return [[span.interval for span in spans] for spans in step.engines.values()]
    return [[span.interval for span in spans if span.stage == "rollout"] for spans in step.ranks.values()]


def _stage_seconds(step: StepTimeline, *stages: str) -> float:
    return total(span.interval for spans in step.ranks.values() for span in spans if span.stage in stages)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
