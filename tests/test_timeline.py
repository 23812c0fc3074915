"""The timeline: spans as they are recorded, folded, merged over ranks, read back, traced and summed up."""

from __future__ import annotations

import json
import math
import random
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from running import lines, run, write_config

from tcopd_fast import cli
from tcopd_fast.clock import StageClock
from tcopd_fast.config_sections import LoggingConfig
from tcopd_fast.errors import UserError
from tcopd_fast.monitor import MetricsLog
from tcopd_fast.timeline import (
    GENERATE,
    Span,
    StepTimeline,
    clip,
    fold,
    intersection,
    load,
    merged,
    parse,
    throughput_metrics,
    total,
    tracks_of,
    union,
    use,
)


def spans(*items: tuple) -> list[Span]:
    return [Span(*item) for item in items]


def step_of(tracks: dict[str, list[Span]], start: float = 0.0, end: float = 10.0, **tokens: int) -> StepTimeline:
    return StepTimeline(1, start, end, {"rollout": 0, "scoring": 0, "learner": 0} | tokens, tracks)


OVERLAPPED = step_of(
    {
        "rank 0": spans(
            ("rollout", 0, 1), ("scoring", 1, 4), ("loss", 4, 5), ("learner", 5, 8), ("weight_sync", 8, 10)
        ),
        "rank 1": spans(
            ("rollout", 0, 2), ("scoring", 2, 4), ("loss", 4, 6), ("learner", 6, 8), ("weight_sync", 8, 10)
        ),
        "engine 0": spans((GENERATE, -2, 1, 200), (GENERATE, 1, 7, 700)),
        "engine 1": spans((GENERATE, 0, 3, 300)),
    },
    rollout=1000,
    scoring=6000,
    learner=2000,
)
TAKING_TURNS = step_of(
    {"rank 0": spans(("rollout", 0, 4), ("scoring", 4, 6), ("learner", 6, 9.5))}, rollout=400, scoring=60, learner=70
)


def test_intervals():
    assert union([(3, 4), (0, 1), (1, 2), (1.5, 1.8), (5, 5)]) == [(0, 2), (3, 4)]
    assert intersection([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert intersection([(0, 1)], [(1, 2)]) == [] and intersection([], [(0, 1)]) == []
    assert clip([(0, 3), (4, 6)], 2, 5) == [(2, 3), (4, 5)]
    assert total([(0, 2), (1, 3), (5, 6)]) == 4 and total([]) == 0


def test_intervals_against_counting_points():
    numbers = random.Random(0)
    for _ in range(50):
        sets = [[tuple(sorted(numbers.choices(range(30), k=2))) for _ in range(6)] for _ in range(2)]
        points = [{p for a, b in one for p in range(a, b)} for one in sets]
        assert total(sets[0]) == len(points[0])
        assert total(intersection(*sets)) == len(points[0] & points[1])


def test_clock_spans_are_the_innermost_stage_and_add_up_to_its_seconds():
    clock = StageClock("cpu")
    before = time.time()
    with clock.stage("rollout"):
        time.sleep(0.01)
        with clock.stage("scoring"):
            time.sleep(0.02)
        time.sleep(0.01)
    with clock.stage("learner"):
        pass
    times = clock.collect()
    assert [span.stage for span in times.spans] == ["rollout", "scoring", "rollout", "learner"]
    assert all(a.end <= b.start for a, b in pairwise(times.spans))
    assert before - 1 < times.spans[0].start < times.spans[-1].end <= times.end < time.time() + 1
    for stage in ("rollout", "scoring", "learner"):
        own = sum(span.end - span.start for span in times.spans if span.stage == stage)
        assert own == pytest.approx(times.metrics[f"time_s/{stage}"])
    assert times.end - times.start == times.metrics["time_s/step"] and times.start <= times.spans[0].start
    assert clock.collect().spans == []


def test_clock_folds_the_alternation_of_many_micro_batches():
    clock = StageClock("cpu")
    for _ in range(300):
        with clock.stage("loss"):
            pass
        with clock.stage("learner"):
            pass
    times = clock.collect()
    assert 32 < len(times.spans) <= 64
    assert [span.stage for span in times.spans[:4]] == ["loss", "learner"] * 2
    assert all(a.end <= b.start + 1e-6 for a, b in pairwise(times.spans))
    for stage in ("loss", "learner"):
        own = sum(span.end - span.start for span in times.spans if span.stage == stage)
        assert own == pytest.approx(times.metrics[f"time_s/{stage}"], abs=1e-5)


def test_fold_keeps_time_tokens_and_place():
    numbers = random.Random(1)
    long, now = [], 0.0
    for _ in range(1000):
        now += numbers.random()
        end = now + numbers.random()
        long.append(Span(numbers.choice("abcdefgh"), now, end, numbers.randrange(5)))
        now = end
    short = fold(long, 64)
    assert len(short) <= 64 and fold(short, 64) == short
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(short))
    assert short[0].start == long[0].start and short[-1].end <= long[-1].end
    for stage in "abcdefgh":
        for value in (lambda span: span.end - span.start, lambda span: span.tokens):
            assert sum(map(value, (s for s in short if s.stage == stage))) == pytest.approx(
                sum(map(value, (s for s in long if s.stage == stage)))
            )


def test_a_line_reads_back_as_it_was():
    line = json.loads(json.dumps(OVERLAPPED.record(), allow_nan=False))
    assert line["tracks"]["engine 1"] == [[GENERATE, 0, 3, 300]]
    assert line["tracks"]["rank 0"][1] == ["scoring", 1, 4]
    back = parse(line)
    assert back.tokens == OVERLAPPED.tokens and list(back.ranks) == ["rank 0", "rank 1"]
    assert {name: list(own) for name, own in back.tracks.items()} == OVERLAPPED.tracks
    assert back.busy()["engine 0"] == {GENERATE: 7.0} and back.busy()["rank 1"]["loss"] == 2.0


@pytest.mark.parametrize(
    "damage",
    [
        {"tracks": {"room 0": []}},
        {"tracks": {"rank 0": [["loss", 1]]}},
        {"start": None},
        {"tokens": [1]},
        {"tracks": 3},
        {"end": float("nan")},
        {"end": -1},
        {"tracks": {"rank 0": [["loss", 2, 1]]}},
        {"tokens": {"rollout": 1e999}},
    ],
)
def test_what_is_no_line_is_refused(damage):
    with pytest.raises(ValueError):
        parse(OVERLAPPED.record() | damage)


def test_use_of_an_overlapped_step_counts_each_moment_once():
    used = use(OVERLAPPED)
    # Engines generate from 0 to 7 (what lies before the step is not the step's), ranks do their own work from 1 to 10.
    assert (used.step, used.generating, used.working, used.both) == (10, 7, 9, 6)
    assert used.engine_busy == 5 and used.over_ideal == pytest.approx(10 / 9)


def test_in_process_engines_take_turns_with_the_rest():
    used = use(TAKING_TURNS)
    assert (used.generating, used.working, used.both, used.engine_busy) == (4, 5.5, 0, 4)
    assert used.over_ideal == pytest.approx(10 / 5.5)
    # A rank that is ahead of another one hides nothing: each generates for itself.
    uneven = use(step_of({"rank 0": spans(("rollout", 0, 4)), "rank 1": spans(("rollout", 0, 2), ("scoring", 2, 4))}))
    assert (uneven.generating, uneven.working, uneven.both, uneven.engine_busy) == (4, 2, 0, 3)
    assert math.isnan(use(step_of({"rank 0": []})).over_ideal)


def test_rates_divide_by_the_time_in_which_a_stage_ran_anywhere():
    assert throughput_metrics(OVERLAPPED) == pytest.approx(
        {
            "batch/tokens_per_s": 100.0,
            "rollout/tokens_per_s": 1200 / 9,
            "scoring/tokens_per_s": 2000.0,
            "learner/tokens_per_s": 500.0,
            "rollout/engine_busy_share": 0.5,
            "rollout/overlap_share": 6 / 7,
        }
    )
    alone = throughput_metrics(TAKING_TURNS)
    assert alone == pytest.approx(
        {
            "batch/tokens_per_s": 40.0,
            "rollout/tokens_per_s": 100.0,
            "scoring/tokens_per_s": 30.0,
            "learner/tokens_per_s": 20.0,
            "rollout/engine_busy_share": 0.4,
        }
    )
    idle = throughput_metrics(step_of({"rank 0": [], "engine 0": []}))
    assert math.isnan(idle["rollout/tokens_per_s"]) and idle["rollout/engine_busy_share"] == 0


def test_engines_seen_by_several_ranks_become_one_track():
    seen = [
        {"engine 0": spans((GENERATE, 0, 2, 10), (GENERATE, 5, 6, 1)), "engine 1": []},
        {"engine 0": spans((GENERATE, 1, 3, 20)), "engine 1": spans((GENERATE, 4, 5, 7))},
    ]
    tracks = tracks_of([spans(("data", 0, 1)), []], seen)
    assert list(tracks) == ["rank 0", "rank 1", "engine 0", "engine 1"]
    assert tracks["engine 0"] == spans((GENERATE, 0, 3, 30), (GENERATE, 5, 6, 1))
    assert tracks["engine 1"] == spans((GENERATE, 4, 5, 7))
    assert merged([]) == []


def write(folder: Path, steps: list[StepTimeline], resume: int | None = None, **logging: bool) -> Path:
    log = MetricsLog(folder, LoggingConfig(tensorboard=False, **logging), resume)
    for step in steps:
        log.log_timeline(step)
    log.close()
    return folder / "timeline.jsonl"


def numbered(*numbers: int) -> list[StepTimeline]:
    return [
        StepTimeline(n, 100.0 * n, 100.0 * n + 10, OVERLAPPED.tokens, {
            name: [Span(s.stage, s.start + 100 * n, s.end + 100 * n, s.tokens) for s in own]
            for name, own in OVERLAPPED.tracks.items()
        })
        for n in numbers
    ]  # fmt: skip


def test_the_file_is_cut_on_resume_and_read_past_a_crash(tmp_path):
    path = write(tmp_path, numbered(1, 2, 3))
    with path.open("a") as file:
        file.write('{"step": 4, "sta')
    assert [step.step for step in load(tmp_path)] == [1, 2, 3]
    write(tmp_path, numbered(3, 4), resume=2)
    assert [step.step for step in load(tmp_path)] == [1, 2, 3, 4]
    assert use(load(tmp_path)[3]).generating == pytest.approx(7)
    with pytest.raises(UserError, match=r"already holds"):
        write(tmp_path, [])


def test_timeline_off_writes_none_and_still_cuts_what_is_there(tmp_path):
    assert not write(tmp_path / "off", numbered(1), timeline=False).exists()
    write(tmp_path / "run", numbered(1, 2))
    write(tmp_path / "run", numbered(2), resume=1, timeline=False)
    assert [step.step for step in load(tmp_path / "run")] == [1]


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"timeline\.jsonl: no such file.*logging\.timeline=true"):
        load(tmp_path)
    (tmp_path / "timeline.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"timeline\.jsonl:1: not a step"):
        load(tmp_path)


def test_trace_has_a_row_per_rank_and_engine_in_microseconds(tmp_path, capsys):
    run_dir = tmp_path / "some run"
    steps = numbered(1, 2)
    write(run_dir, [*steps, replace(steps[1], step=3, start=300.0, end=310.0, tracks={"rank 10": [], "rank 2": []})])
    assert cli.main(["trace", str(run_dir)]) == 0
    assert "trace.json" in capsys.readouterr().out
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {1} and {e["ph"] for e in events} == {"M", "X"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["some run"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert [rows[tid] for tid in sorted(rows, key=order.__getitem__)] == [
        "steps", "rank 0", "rank 1", "rank 2", "rank 10", "engine 0", "engine 1"
    ]  # fmt: skip
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 2 * (1 + 5 + 5 + 2 + 1) + 1 and min(e["ts"] for e in spans) == 0
    scoring = [e for e in spans if rows[e["tid"]] == "rank 1" and e["name"] == "scoring"]
    # Engine 0 began two seconds before the first step.
    assert [(e["ts"], e["dur"], e["args"]) for e in scoring] == [
        (4_000_000, 2_000_000, {"step": 1}), (104_000_000, 2_000_000, {"step": 2})
    ]  # fmt: skip
    assert next(e["args"] for e in spans if rows[e["tid"]] == "engine 1") == {"step": 1, "tokens": 300}
    for tid in rows:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == tid)
        assert all(a[1] <= b[0] for a, b in pairwise(own))


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "no such file"),
        ("", [], "no step yet"),
        ("line", ["--out", "{run}/timeline.jsonl/x.json"], "--out .* cannot be written"),
    ],
)
def test_trace_refuses_in_one_message(tmp_path, capsys, content, words, message):
    if content is not None:
        (tmp_path / "timeline.jsonl").write_text(content and json.dumps(OVERLAPPED.record()) + "\n")
    assert cli.main(["trace", str(tmp_path), *(word.format(run=tmp_path) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_of_two_ranks_writes_what_its_metrics_say(tiny, tmp_path):
    run_dir = tmp_path / "run"
    tree = tiny.tree(
        run_dir,
        steps=2,
        learner={"minibatches": 2, "epochs": 2, "max_tokens_per_microbatch": 16},
        checkpoint={"every": 0},
    )
    run(["--config", str(write_config(tmp_path / "c.yaml", tree))], size=2)
    metrics, steps = lines(run_dir / "metrics.jsonl"), load(run_dir)
    assert [step.step for step in steps] == [row["step"] for row in metrics] == [1, 2]
    assert all(a.end <= b.start for a, b in pairwise(steps))
    for step, row in zip(steps, metrics, strict=True):
        assert list(step.tracks) == ["rank 0", "rank 1"]
        assert all(len(spans) <= 64 and spans[0].stage == "data" for spans in step.tracks.values())
        busy = step.busy()
        for stage in ("rollout", "scoring", "loss", "learner"):
            assert max(busy[rank][stage] for rank in busy) == pytest.approx(row[f"time_s/{stage}"], abs=1e-3)
        # From the first rank's start to the last one's end.
        assert -1e-5 <= step.seconds - row["time_s/step"] < row["time_s/step"]
        sequences = row["learner/tokens"] / 2
        assert step.tokens == {
            "rollout": row["batch/tokens"], "scoring": row["scoring/tokens"], "learner": row["learner/tokens"]
        }  # fmt: skip
        # Reference, two teachers and the learner's log π_old run over every token of prompts and responses.
        assert row["scoring/tokens"] == 4 * sequences and sequences > row["batch/tokens"]
        for name, value in throughput_metrics(step).items():
            assert row[name] == pytest.approx(value, rel=0.02), name
        assert "rollout/overlap_share" not in row
