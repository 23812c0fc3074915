"""A run's timeline as a Chrome trace, for chrome://tracing and https://ui.perfetto.dev."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tcopd_fast.errors import UserError
from tcopd_fast.timeline import StepTimeline, load

GROUPS = ("steps", "ranks", "rollout engines")
"""What the viewer shows as processes, from the top; their place is their pid."""


def write_trace(run_dir: Path, out: Path) -> Path:
    """Write RUN/timeline.jsonl in the trace event format (complete events, microseconds from the first span).

    A row for the steps, one for every rank and one for every engine in a process of its own. Returns `out`; raises
    UserError when the run has no timeline or `out` cannot be written.
    """
    steps = load(run_dir)
    if not steps:
        raise UserError(f"{run_dir}: its timeline has no step yet; wait for the first one")
    trace = {"traceEvents": [*_names(steps), *_events(steps)], "displayTimeUnit": "ms"}
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another file") from error
    return out


def _names(steps: Sequence[StepTimeline]) -> Iterator[dict[str, Any]]:
    """Metadata events: names and order of the groups and their rows."""

    def metadata(name: str, pid: int, tid: int, key: str, value: str | int) -> dict[str, Any]:
        return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": {key: value}}

    rows = {_row(track): track for step in steps for track in step.tracks}
    for pid in sorted({0} | {pid for pid, _ in rows}):
        yield metadata("process_name", pid, 0, "name", GROUPS[pid])
        yield metadata("process_sort_index", pid, 0, "sort_index", pid)
    yield metadata("thread_name", 0, 0, "name", "steps")
    for (pid, tid), track in sorted(rows.items()):
        yield metadata("thread_name", pid, tid, "name", track)
        yield metadata("thread_sort_index", pid, tid, "sort_index", tid)


def _events(steps: Sequence[StepTimeline]) -> Iterator[dict[str, Any]]:
    # Engines may have generated before the first step, for an evaluation.
    starts = [span.start for step in steps for spans in step.tracks.values() for span in spans]
    zero = min([*starts, *(step.start for step in steps)])

    def event(name: str, row: tuple[int, int], start: float, end: float, arguments: dict[str, Any]) -> dict[str, Any]:
        ts = round(1e6 * (start - zero))
        # Rounded like the next span's start, so that neighbours never overlap.
        dur = round(1e6 * (end - zero)) - ts
        return {"name": name, "ph": "X", "pid": row[0], "tid": row[1], "ts": ts, "dur": dur, "args": arguments}

    for step in steps:
        tokens = {f"{stage}_tokens": count for stage, count in step.tokens.items()}
        yield event(f"step {step.step}", (0, 0), step.start, step.end, tokens)
        for track, spans in step.tracks.items():
            for span in spans:
                arguments = {"step": step.step} | ({"tokens": span.tokens} if span.tokens else {})
                yield event(span.stage, _row(track), span.start, span.end, arguments)


def _row(track: str) -> tuple[int, int]:
    """(pid, tid) of "rank N" or "engine N"."""
    kind, _, number = track.partition(" ")
    return (1 if kind == "rank" else 2), int(number)
