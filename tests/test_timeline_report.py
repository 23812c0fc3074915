"""The report's timeline: the right steps, bars where they belong, runs without a timeline beside those with one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from test_report import Page, fake_run
from test_timeline import OVERLAPPED, TAKING_TURNS

from tcopd_fast.report import write_report
from tcopd_fast.report.timeline import steps_shown
from tcopd_fast.timeline import Span, StepTimeline

BAR = re.compile(r'<i style="left:([\d.]+)%;width:([\d.]+)%;background:(#\w+)" title="([^"]+)"></i>')


def at(shape: StepTimeline, step: int, start: float, scale: float = 1.0) -> StepTimeline:
    """The same step at another time, `scale` times as long."""

    def moved(when: float) -> float:
        return start + scale * when

    tracks = {
        name: [Span(span.stage, moved(span.start), moved(span.end), span.tokens) for span in spans]
        for name, spans in shape.tracks.items()
    }
    return StepTimeline(step, moved(shape.start), moved(shape.end), shape.tokens, tracks)


def with_timeline(run: Path, steps: list[StepTimeline]) -> Path:
    (run / "timeline.jsonl").write_text("".join(json.dumps(step.record()) + "\n" for step in steps))
    return run


def section(html: str) -> str:
    return html[html.index("<h2>Timeline</h2>") : html.index("<h2>Sampled responses</h2>")]


def lanes(chart: str) -> dict[str, list[tuple[str, ...]]]:
    """Track -> (left %, width %, colour, title) of its bars."""
    rows = re.findall(r'<div class="lane"><b>([^<]+)</b><div class="strip">(.*?)</div></div>', chart)
    return {name: BAR.findall(bars) for name, bars in rows}


def test_bars_lie_where_the_spans_were(tmp_path: Path) -> None:
    # Start-up, then steps of 20, 10 and 10 seconds with an hour of evaluation between the last two.
    shapes = [(1, 0, 30.0), (2, 1000, 2.0), (3, 1020, 1.0), (4, 4630, 1.0)]
    run = with_timeline(fake_run(tmp_path / "a"), [at(OVERLAPPED, *shape) for shape in shapes])
    page = section(write_report([run], tmp_path / "r.html").read_text("utf-8"))
    drawn = lanes(page)
    assert list(drawn) == ["rank 0", "rank 1", "engine 0", "engine 1"]
    assert "step 2: 20.0 s" in page and "step 4: 10.0 s" in page and "step 1:" not in page
    second = [bar for bar in drawn["rank 0"] if bar[3].startswith("step 3")]
    # 40 s are drawn; step 3 begins after 20 of them.
    assert [(float(left), float(width)) for left, width, _, _ in second] == [
        (50, 2.5), (52.5, 7.5), (60, 2.5), (62.5, 7.5), (70, 5),
    ]  # fmt: skip
    assert [title for *_, title in second[:2]] == ["step 3: rollout, 1.00 s", "step 3: scoring, 3.00 s"]
    # What an engine did before a step is not part of it: its span from −2 to 1 starts at the step.
    assert drawn["engine 0"][0][:2] == ("0.000", "5.000") and "400 tokens" not in drawn["engine 0"][0][3]
    colours = {title.split(": ")[1].split(",")[0]: colour for bars in drawn.values() for *_, colour, title in bars}
    keys = dict(re.findall(r'<li><i style="background:(#\w+)"></i>(\w+)</li>', page))
    assert colours == {stage: colour for colour, stage in keys.items()} and "generate" in colours
    assert len(set(colours.values())) == len(colours)


def test_numbers_are_means_over_all_steps_but_the_first(tmp_path: Path) -> None:
    shapes = [(1, 0, 30.0), (2, 1000, 2.0), (3, 1020, 1.0)]
    overlapped = with_timeline(fake_run(tmp_path / "a"), [at(OVERLAPPED, *shape) for shape in shapes])
    turns = with_timeline(fake_run(tmp_path / "b"), [at(TAKING_TURNS, *shape) for shape in shapes])
    page = section(write_report([overlapped, turns], tmp_path / "r.html").read_text("utf-8"))
    rows = dict(re.findall(r'<tr><th class="text">([^<]+)</th>(<td>.*?)</tr>', page))
    cells = {label: re.findall(r"<td>(.*?)</td>", row) for label, row in rows.items()}
    assert cells["generating"] == ["10.5 s <small>70.0 %</small>", "6.00 s <small>40.0 %</small>"]
    assert cells["working"] == ["13.5 s <small>90.0 %</small>", "8.25 s <small>55.0 %</small>"]
    assert cells["both at once"] == ["9.00 s <small>60.0 %</small>", "0.00 ms <small>0.0 %</small>"]
    assert cells["generate"] == ["7.50 s <small>50.0 %</small>", "–"]
    assert cells["rollout"] == ["2.25 s <small>15.0 %</small>", "6.00 s <small>40.0 %</small>"]
    assert cells["step"] == ["15.0 s", "15.0 s"]
    assert cells["step ÷ max(generating, working)"] == ["1.11", "1.82"]


def test_rates_come_from_the_metrics(tmp_path: Path) -> None:
    run = with_timeline(fake_run(tmp_path / "a", done=3), [at(OVERLAPPED, 1, 0)])
    rates = [9e9, 1000.0, 2000.0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"scoring/tokens_per_s": rate}) for row, rate in zip(rows, rates, strict=True)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = section(write_report([run], tmp_path / "r.html").read_text("utf-8"))
    assert re.search(r"scored, while scoring</small></th><td>1 500</td>", page)
    assert re.search(r"generated, while generating</small></th><td>–</td>", page)


def test_runs_without_a_timeline_stand_beside_those_with_one(tmp_path: Path) -> None:
    old, new = fake_run(tmp_path / "old"), with_timeline(fake_run(tmp_path / "new"), [at(OVERLAPPED, 1, 0)])
    (old / "timeline.jsonl").unlink()
    html = write_report([old, new], tmp_path / "r.html").read_text("utf-8")
    assert "timeline.jsonl" not in Page(html).text
    assert ">new</" in section(html) and ">old</" not in section(html)
    # A single step is shown although it is the first.
    assert "step 1: 10.0 s" in section(html)
    alone = write_report([old], tmp_path / "o.html").read_text("utf-8")
    assert "No run recorded when" in section(alone)


def test_broken_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    run = with_timeline(fake_run(tmp_path / "a"), [at(OVERLAPPED, 1, 0), at(OVERLAPPED, 2, 10)])
    with (run / "timeline.jsonl").open("a") as file:
        file.write(
            '{"step": 3, "start": 5}\n{"step": 4, "start": 1, "end": 2, "tokens": {}, "tracks": {"<b>": []}}\n{"st'
        )
    html = write_report([run], tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    assert "timeline.jsonl: 2 lines of another form left out" in page.text
    assert "timeline.jsonl: 1 unreadable line left out" in page.text
    assert "step 2: 10.0 s" in section(html)


def test_many_ranks_are_cut_and_counted(tmp_path: Path) -> None:
    tracks = {f"rank {rank}": [Span("loss", 0, 5)] for rank in range(40)} | {"engine 11": [], "engine 2": []}
    run = with_timeline(fake_run(tmp_path / "a"), [StepTimeline(1, 0, 10, {}, tracks)])
    page = section(write_report([run], tmp_path / "r.html").read_text("utf-8"))
    assert list(lanes(page)) == [*(f"rank {rank}" for rank in range(16)), "engine 2", "engine 11"]
    assert "24 more not shown." in page


def test_steps_of_about_median_length_are_drawn() -> None:
    def steps(*lengths: float) -> list[int]:
        line = [at(OVERLAPPED, number, 0, length / 10) for number, length in enumerate(lengths, start=1)]
        return [step.step for step in steps_shown(line)]

    assert steps(90, 5, 60, 5, 4, 6, 1, 1, 5) == [4, 5, 6]
    assert steps(90, 5, 5, 5, 5) == [2, 3, 4]
    assert steps(90, 1, 9, 5) == [2, 3, 4]
    assert steps(90, 1) == [2] and steps(90) == [1]


def test_a_step_of_no_length_is_no_error(tmp_path: Path) -> None:
    run = with_timeline(fake_run(tmp_path / "a"), [StepTimeline(1, 5.0, 5.0, {}, {"rank 0": []})])
    assert "step 1: 0.00 ms" in section(write_report([run], tmp_path / "r.html").read_text("utf-8"))
