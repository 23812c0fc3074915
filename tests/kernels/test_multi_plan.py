"""How several models are cut into programs, the choice between one launch and several, and its benchmark."""

from __future__ import annotations

import heapq
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcopd_kernels import multi_linear_logprob
from tcopd_kernels._launch_plan import PROGRAM_US, Work, choose_launch, plan, predicted_us, work

BENCH = Path(__file__).parents[2] / "bench"
WORKS = st.lists(st.builds(Work, st.integers(1, 400), st.floats(0.05, 50)), min_size=1, max_size=6)


def durations(works, tiles_per_split, row_blocks):
    """Length of every program, longest models first as the kernel runs them."""
    longest = sorted(zip(works, tiles_per_split, strict=True), key=lambda pair: -pair[0].tile_us * pair[1])
    for w, tiles in longest:
        lengths = [min(tiles, w.tiles - first) * w.tile_us + PROGRAM_US for first in range(0, w.tiles, tiles)]
        yield from lengths * row_blocks


def makespan(lengths, multiprocessors):
    """When the last program ends if each goes to the multiprocessor that is free first."""
    free = [0.0] * multiprocessors
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


@settings(max_examples=200, deadline=None)
@given(WORKS, st.integers(1, 40), st.integers(1, 150))
def test_a_plan_is_a_cut_and_bounds_its_own_schedule(works, row_blocks, multiprocessors):
    cut, time_us = plan(tuple(works), row_blocks, multiprocessors)
    assert all(1 <= tiles <= w.tiles for tiles, w in zip(cut, works, strict=True))
    assert makespan(durations(works, cut, row_blocks), multiprocessors) <= time_us * (1 + 1e-9)
    assert time_us >= row_blocks * sum(w.tiles * w.tile_us for w in works) / multiprocessors


def test_a_plan_fills_the_gpu():
    """Two widths and one row block on 132 multiprocessors: within a tenth of perfect balance."""
    works = (work(151936, 1024, 2, 64, 128, 1), work(151936, 2560, 2, 64, 128, 1))
    ideal = sum(w.tiles * w.tile_us for w in works) / 132
    assert plan(works, 1, 132).time_us < 1.1 * ideal


def test_one_launch_pays_for_small_problems_and_not_for_large_ones():
    def choice(N, V, D, n_models):
        row_blocks = -(-N // 128)
        group = [work(V, D, 2, 128, 128, row_blocks)] * n_models
        return choose_launch(*predicted_us([group], [row_blocks], 132))

    assert choice(64, 32000, 512, 3) == "joint"
    assert choice(256, 32000, 512, 8) == "joint"
    assert choice(16384, 151936, 2560, 8) == "separate"
    assert all(choice(N, 32000, 512, 1) == "separate" for N in (16, 1024))


def test_models_of_several_dtypes_take_a_launch_each():
    """Two groups of one model each have nothing to share."""
    group = [work(32000, 512, 2, 64, 128, 1)]
    joint_us, separate_us = predicted_us([group, group], [1, 1], 132)
    assert joint_us == separate_us and choose_launch(joint_us, separate_us) == "separate"


def test_an_unknown_launch_is_refused():
    head = [torch.ones(2, 3)], [torch.ones(4, 3)], torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="launch must be one of auto, joint, separate, got 'both'"):
        multi_linear_logprob(*head, launch="both")


def run_benchmark(monkeypatch, tmp_path, *arguments):
    """The report of `multi_launch.py --tiny`, run in this process."""
    out = tmp_path / "multi.json"
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["multi_launch.py", "--tiny", "--rounds", "1", "--json", str(out), *arguments])
    assert importlib.import_module("multi_launch").main() == 0
    return json.loads(out.read_text())


def test_benchmark_reports_both_forms(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    report = run_benchmark(monkeypatch, tmp_path)
    assert report["tiny"] and report["environment"]["versions"]["torch"]
    assert [(row["N"], row["K"]) for row in report["rows"]] == [(16, 1), (16, 3), (33, 1), (33, 3)]
    for row in report["rows"]:
        assert row["largest_difference"] < 1e-4
        assert row["joint_ms"] > 0 and row["separate_ms"] > 0 and row["regret"] >= 0
        assert row["auto"] in ("joint", "separate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole benchmark")
def test_benchmark_without_a_gpu_says_what_is_missing(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["multi_launch.py"])
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module("multi_launch").main()
    message = capsys.readouterr().err
    assert exit_info.value.code == 2 and "no CUDA device" in message and "--tiny" in message
