"""A run's timeline as a Chrome trace, for chrome://tracing and https://ui.perfetto.dev."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcopd_fast.errors import UserError
from tcopd_fast.timeline import StepTimeline, load

PID = 1
STEPS = "steps"
"""The first row, which has the steps themselves."""


def write_trace(run_dir: Path, out: Path) -> Path:
    """Write RUN/timeline.jsonl in the trace event format (complete events, microseconds from the first span).

    A row for the steps, one for every rank and one for every engine in a process of its own, all of them under the
    name of the run's folder. Returns `out`; raises UserError when the run has no timeline or `out` cannot be written.
    """
    steps = load(run_dir)
    if not steps:
        raise UserError(f"{run_dir}: its timeline has no step yet; wait for the first one")
    rows = _rows(steps)
    events = [*_names(run_dir.resolve().name, rows), *_events(steps, rows)]
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(
            json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False), encoding="utf-8"
        )
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another file") from error
    return out


def _rows(steps: Sequence[StepTimeline]) -> dict[str, int]:
    """Track -> tid: the steps, then ranks, then engines, each by number."""

    def place(track: str) -> tuple[bool, int]:
        kind, _, number = track.partition(" ")
        return kind == "engine", int(number)

    tracks = sorted({track for step in steps for track in step.tracks}, key=place)
    # Viewers take a thread whose tid is the pid for the main one.
    return {track: tid for tid, track in enumerate([STEPS, *tracks], start=PID + 1)}


def _names(run: str, rows: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Metadata events: the run's name, and names and order of its rows."""

    def metadata(name: str, tid: int, key: str, value: str | int) -> dict[str, Any]:
        return {"name": name, "ph": "M", "pid": PID, "tid": tid, "args": {key: value}}

    yield metadata("process_name", 0, "name", run)
    for track, tid in rows.items():
        yield metadata("thread_name", tid, "name", track)
        yield metadata("thread_sort_index", tid, "sort_index", tid)


def _events(steps: Sequence[StepTimeline], rows: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    # Engines may have generated before the first step, for an evaluation.
    starts = [span.start for step in steps for spans in step.tracks.values() for span in spans]
    zero = min([*starts, *(step.start for step in steps)])

    def event(name: str, track: str, start: float, end: float, arguments: dict[str, Any]) -> dict[str, Any]:
        ts = round(1e6 * (start - zero))
        # Rounded like the next span's start, so that neighbours never overlap.
        dur = round(1e6 * (end - zero)) - ts
        return {"name": name, "ph": "X", "pid": PID, "tid": rows[track], "ts": ts, "dur": dur, "args": arguments}

    for step in steps:
        tokens = {f"{stage}_tokens": count for stage, count in step.tokens.items()}
        yield event(f"step {step.step}", STEPS, step.start, step.end, tokens)
        for track, spans in step.tracks.items():
            for span in spans:
                arguments = {"step": step.step} | ({"tokens": span.tokens} if span.tokens else {})
                yield event(span.stage, track, span.start, span.end, arguments)
