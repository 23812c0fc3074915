"""The throughput benchmark: from timelines to its numbers, its pinning, its refusals, and documents equal the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import throughput  # noqa: E402
from table1_report import link_from  # noqa: E402
from throughput_figure import draw  # noqa: E402
from throughput_plan import (  # noqa: E402
    AHEAD,
    CONFIG,
    ROUNDS,
    STEPS,
    STRICT,
    WARM_UP_STEPS,
    WORKLOADS,
    numbers,
    over_rounds,
    overlap,
    overrides,
)
from throughput_report import BEGIN, END, markdown, summary  # noqa: E402

from tcopd_fast.config_io import load_config  # noqa: E402
from tcopd_fast.timeline import StepTimeline, parse  # noqa: E402

DOC, README = ROOT / "docs" / "throughput.md", ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "throughput.json"
TOKENS = {"rollout": 1000, "scoring": 6000, "learner": 4000}


def strict_step(step: int) -> StepTimeline:
    """2 s: 1 s of waiting while the engine generates for 0.9 s, then 0.4 s of scoring and 0.6 s of learning."""
    tracks = {
        "rank 0": [["rollout", 0.0, 1.0], ["scoring", 1.0, 1.4], ["learner", 1.4, 2.0]],
        "engine 0": [["generate", 0.05, 0.95, 1000]],
    }
    return parse({"step": step, "start": 100.0 + 2 * step, "end": 102.0 + 2 * step, "tokens": TOKENS, "tracks": tracks})


def ahead_step(step: int) -> StepTimeline:
    """1.1 s: the engine generates the next batch in the 1 s of scoring and learning."""
    tracks = {
        "rank 0": [["rollout", 0.0, 0.1], ["scoring", 0.1, 0.5], ["learner", 0.5, 1.1]],
        "engine 0": [["generate", 0.05, 1.05, 1000]],
    }
    return parse({"step": step, "start": 100.0 + step, "end": 101.1 + step, "tokens": TOKENS, "tracks": tracks})


def odd_step(step: int) -> StepTimeline:
    """A first or last step: 10 s of one stage."""
    tracks = {"rank 0": [["learner", 0.0, 10.0]], "engine 0": []}
    return parse({"step": step, "start": 0.0, "end": 10.0, "tokens": TOKENS, "tracks": tracks})


def run(make) -> list[StepTimeline]:
    return [odd_step(n) if n <= WARM_UP_STEPS or n == STEPS else make(n) for n in range(1, STEPS + 1)]


def test_the_numbers_of_a_run_leave_out_first_and_last_steps():
    found = numbers(run(strict_step))
    assert found["step_s"] == pytest.approx(2.0) and found["generating_s"] == pytest.approx(0.9)
    assert found["working_s"] == pytest.approx(1.0) and found["both_s"] == pytest.approx(0.0)
    assert found["shares"] == pytest.approx({"rollout": 0.5, "scoring": 0.2, "learner": 0.3, "generate": 0.45})
    rates = {"rollout/tokens_per_s": 1000 / 0.9, "scoring/tokens_per_s": 15000, "learner/tokens_per_s": 4000 / 0.6,
             "batch/tokens_per_s": 500}  # fmt: skip
    assert found["rates"] == pytest.approx(rates)
    assert numbers(run(ahead_step))["both_s"] == pytest.approx(0.95)


def test_overlap_compares_round_by_round():
    strict, ahead = numbers(run(strict_step)), numbers(run(ahead_step))
    slow = {**strict, "step_s": 4.0, "generating_s": 1.8, "working_s": 2.0}
    found = overlap([strict, slow], [ahead, {**ahead, "step_s": 2.0}])
    assert (found.strict, found.ahead) == (pytest.approx(3.0), pytest.approx(1.55))
    assert (found.rollout, found.learn) == (pytest.approx(1.35), pytest.approx(1.5))
    assert found.ratio == pytest.approx((1.1, 1.0)) and found.hidden == pytest.approx((1.0, 2.0 / 1.8))
    with pytest.raises(ValueError, match="shorter"):
        overlap([strict, slow], [ahead])


def test_rounds_are_summarised_by_medians():
    rounds = [{"step_s": s, "shares": {"scoring": s / 10}} for s in (3.0, 1.0, 2.0)]
    assert over_rounds(rounds) == {"step_s": 2.0, "shares": {"scoring": pytest.approx(0.2)}}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_cell_is_a_configuration_with_the_same_work(workload, tmp_path):
    found = []
    for cell in workload.cells:
        config = load_config(CONFIG, overrides(workload, cell, tmp_path, tmp_path / "models", STEPS))
        assert (config.rollout.vllm.mode == "server") == cell.apart and config.steps == STEPS
        engine = {"engine", "staleness", "vllm"}
        found.append((config.model, config.learner, config.objective, config.rollout.model_dump(exclude=engine)))
    assert all(one == found[0] for one in found)
    assert STRICT in workload.cells and AHEAD in workload.cells
    assert str(found[0][0].path).startswith("miniature:" if workload.shape is None else str(tmp_path / "models"))


@pytest.fixture
def table() -> dict:
    runs = {
        (workload.name, cell.name): [run(ahead_step if cell is AHEAD else strict_step)] * workload.rounds
        for workload in WORKLOADS
        for cell in workload.cells
    }
    return {
        "command": "python bench/throughput.py --out runs/throughput", "rounds": ROUNDS, "steps": STEPS,
        "environment": {"git_sha": "a" * 40, "device": "CPU: test", "versions": {"python": "3.11"},
                        "started": "2026-01-02T03:04:05Z"},
        "warm_up_steps": WARM_UP_STEPS,
        "workloads": [throughput.workload_record(workload, runs, STEPS) for workload in WORKLOADS],
    }  # fmt: skip


def test_tables_figure_and_summary_say_what_was_measured(table, tmp_path):
    block = markdown(table, "t.svg", "../bench/results/throughput.json")
    assert "| vllm, server, staleness 0 | 2.00 | 500 | 1,111 | 15,000 | 6,667 |" in block
    assert block.count("| vllm, server, staleness 0 | 45 % | 50 % | 20 % |") == 2
    assert "| step at staleness 1 ÷ the longer | 1.10 (1.10 – 1.10) | 1.10 (1.10 – 1.10) |" in block
    assert "| of the shorter, hidden behind the longer | 100 % (100 – 100) | 100 % (100 – 100) |" in block
    assert "a step takes 2.00 s at staleness 0 and 1.10 s at staleness 1" in summary(table, "r.json")
    [file] = draw(table, tmp_path / "t.svg")
    assert file.read_text().count("<path") > 20


def test_the_documents_are_what_the_json_says():
    blocks = [file.read_text().split(BEGIN)[1].split(END)[0].strip() for file in (DOC, README)]
    if not RESULTS.exists():
        assert blocks == ["", ""], "tables without their JSON"
        return
    table = json.loads(RESULTS.read_text())
    assert table["rounds"] >= ROUNDS and table["steps"] >= STEPS and "/work" not in json.dumps(table)
    for workload in table["workloads"]:
        rounds = {cell["name"]: cell["rounds"] for cell in workload["cells"]}
        assert all(cell["median"] == over_rounds(cell["rounds"]) for cell in workload["cells"])
        again = vars(overlap(rounds[STRICT.name], rounds[AHEAD.name]))
        assert workload["overlap"] == json.loads(json.dumps(again))
    assert blocks[0] == markdown(table, link_from(DOC, RESULTS.with_suffix(".svg")), link_from(DOC, RESULTS))
    assert blocks[1] == summary(table, link_from(README, RESULTS))


def test_refusals(tmp_path, capsys, monkeypatch):
    for words, message in (
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--steps", "4"], "--steps 4: the first 3 and the last do not count; give more"),
        (["--out", str(tmp_path)], f"--out {tmp_path}: exists; give a new folder"),
        (["--out", str(tmp_path), "--only-report"], "has no throughput.json"),
    ):
        assert throughput.main(["--out", str(tmp_path / "new"), *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert throughput.main(["--out", str(tmp_path / "new")]) == 2
    assert "may use one core only; overlap needs two" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_and_children_of_a_process_are_pinned():
    code = (
        "import subprocess, sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        core = max(os.sched_getaffinity(0))
        throughput.pin(psutil.Process(process.pid), core)
        threads = [thread.id for pid in (process.pid, child) for thread in psutil.Process(pid).threads()]
        assert len(threads) >= 3 and all(os.sched_getaffinity(thread) == {core} for thread in threads)
    finally:
        for one in psutil.Process(process.pid).children():
            one.kill()
        process.kill()
        process.wait()
