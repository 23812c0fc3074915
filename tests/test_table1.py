from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from finished_runs import STEPS, leave_baselines, leave_run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import table1  # noqa: E402
import table1_plan  # noqa: E402
import table1_report  # noqa: E402
from table1_figure import draw  # noqa: E402
from table1_plan import FINAL, ROWS, plan, run_state, train_command  # noqa: E402

from tcopd_fast.config_io import load_config  # noqa: E402
from tcopd_fast.errors import UserError  # noqa: E402


def final_results(rng: np.random.Generator) -> dict:
    results = {
        name: {
            "temperature": sampling.temperature,
            "mean_at_k": float(rng.uniform(0.4, 0.8)),
            "standard_error": 0.01,
            "problems": 512,
            "response_length_mean": float(rng.uniform(8, 12)),
        }
        for name, sampling in FINAL.items()
    }
    results["t1"]["reverse_kl"] = {"expert": float(rng.uniform(0, 0.2)), "anti_expert": 1.0, "reference": 0.1}
    return results


def eval_record(step: int, accuracy: float) -> dict:
    return {
        "step": step,
        "set": "heldout",
        "mean_at_k": accuracy,
        "standard_error": 0.01,
        "response_length_mean": 9.0,
        "reverse_kl": {"expert": 0.05},
    }


def finish(run: table1_plan.Run, rng: np.random.Generator, final: bool = True) -> None:
    records = [eval_record(step, float(rng.uniform(0.4, 0.8))) for step in (0, 10, STEPS)]
    leave_run(run, records, final_results(rng) if final else None)


def finish_all(out: Path, seeds: int) -> list[table1_plan.Run]:
    rng = np.random.default_rng(0)
    runs = plan(out, seeds)
    for run in runs:
        finish(run, rng)
    leave_baselines(out, table1_plan, lambda: final_results(rng))
    return runs


@pytest.fixture
def readme(tmp_path) -> Path:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{table1_report.BEGIN}\nold\n{table1_report.END}\nafter\n")
    return file


def arguments(tmp_path: Path, readme: Path, *more: str) -> list[str]:
    words = ["--out", str(tmp_path / "out"), "--steps", str(STEPS), "--jobs", "2", "--readme", str(readme)]
    return [*words, "--json", str(tmp_path / "r" / "t.json"), "--figure", str(tmp_path / "r" / "t.svg"), *more]


class FakeLauncher:
    """Stands for the training processes: finishes every run but those named in `crash`."""

    def __init__(self, runs, crash=()):
        self.by_log = {run.log: run for run in runs}
        self.crash = crash
        self.commands: dict[str, list[str]] = {}

    def __call__(self, command, log):
        run = self.by_log[log]
        self.commands[run.name] = command
        if run.name in self.crash:
            return 1
        finish(run, np.random.default_rng(1), final=False)
        return 0

    def stop(self):
        pass


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_aggregation_against_numpy(tmp_path, seeds):
    records = [table1.read_run(run) for run in finish_all(tmp_path, seeds)]
    rows = {row["row"]: row for row in table1_report.aggregate(records, "g_opd_1.5")}
    assert list(rows) == [row.key for row in ROWS]

    def values(row: str, name: str) -> np.ndarray:
        return np.array([r["final"][name]["mean_at_k"] for r in records if r["row"] == row])

    def check(entry: dict, expected: np.ndarray) -> None:
        assert entry["n"] == len(expected)
        assert entry["mean"] == pytest.approx(expected.mean(), rel=1e-12)
        if len(expected) == 1:
            assert entry["standard_error"] is None
        else:
            assert entry["standard_error"] == pytest.approx(expected.std(ddof=1) / math.sqrt(len(expected)), rel=1e-9)

    for key, row in rows.items():
        for name in FINAL:
            check(row["metrics"][name], values(key, name))
            if key != "g_opd_1.5":
                check(row["difference"][name], values(key, name) - values("g_opd_1.5", name))
        for index, step in enumerate((0, 10, STEPS)):
            assert row["curve"][index]["step"] == step
            check(row["curve"][index], np.array([r["curve"][index]["accuracy"] for r in records if r["row"] == key]))
    assert rows["g_opd_1.5"]["difference"] == {}


def test_differences_pair_equal_seeds_whatever_the_order(tmp_path):
    records = [table1.read_run(run) for run in finish_all(tmp_path, 3)]
    shuffled = records[::-1]
    a = {row["row"]: row["difference"] for row in table1_report.aggregate(records, "g_opd_1.5")}
    b = {row["row"]: row["difference"] for row in table1_report.aggregate(shuffled, "g_opd_1.5")}
    for key, entries in a.items():
        for name, entry in entries.items():
            assert b[key][name] == pytest.approx(entry)
    # A seed that only one side has stays out of the pairs.
    fewer = [r for r in records if not (r["row"] == "opd" and r["seed"] == 2)]
    opd = next(row for row in table1_report.aggregate(fewer, "g_opd_1.5") if row["row"] == "opd")
    assert opd["difference"]["t1"]["n"] == 2


def test_block_replacement_is_idempotent_and_leaves_the_rest():
    text = f"a\n{table1_report.BEGIN}\nold\n{table1_report.END}\nb\n"
    block = r"| \1 \g<0> | 50 % |"
    once = table1_report.replace_block(text, block)
    assert once == f"a\n{table1_report.BEGIN}\n{block}\n{table1_report.END}\nb\n"
    assert table1_report.replace_block(once, block) == once


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        table1_report.BEGIN,
        table1_report.END,
        f"{table1_report.END}\n{table1_report.BEGIN}",
        f"{table1_report.BEGIN}{table1_report.END}{table1_report.BEGIN}",
    ],
)
def test_missing_markers_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    monkeypatch.setattr(table1, "train_all", lambda *_: pytest.fail("training was started"))
    assert table1.main(arguments(tmp_path, file)) == 2
    assert "table1:begin" in capsys.readouterr().err
    assert file.read_text() == text
    assert not (tmp_path / "out").exists()


def test_absent_readme_is_refused(tmp_path, capsys):
    assert table1.main(arguments(tmp_path, tmp_path / "none.md")) == 2
    assert "none.md: no such file" in capsys.readouterr().err


def test_rows_resolve_to_the_stated_objectives(tmp_path):
    assert len({row.key for row in ROWS}) == len(ROWS) == 7
    for row in ROWS:
        config = load_config(table1_plan.CONFIG, [*table1_plan.shared_overrides(STEPS, 32), *row.overrides()])
        assert config.lambdas_for("math") == {"expert": row.expert, "anti_expert": row.anti_expert}
        # A row without its own normalizer must be the same objective under either.
        assert (row.normalizer is None) == (row.anti_expert == 0)
        assert row.normalizer in (None, config.objective.normalizer)
        assert config.steps == STEPS and [source.limit for source in config.eval.data] == [32]


def test_run_states(tmp_path):
    run = plan(tmp_path, 1)[0]
    assert run_state(run, STEPS) == "new"
    finish(run, np.random.default_rng(0))
    assert run_state(run, STEPS) == "finished"
    assert run_state(run, STEPS + 1) == "partial"
    evals = run.folder / "eval.jsonl"
    evals.write_text("".join(evals.read_text().splitlines(keepends=True)[:-1]))
    assert run_state(run, STEPS) == "partial"
    finish(run, np.random.default_rng(0))
    shutil.rmtree(run.folder / "checkpoints")
    assert run_state(run, STEPS) == "partial"


def test_only_unfinished_runs_are_started(tmp_path):
    rng = np.random.default_rng(0)
    runs = plan(tmp_path, 1)
    finished, interrupted = runs[:3], runs[3]
    for run in finished:
        finish(run, rng)
    finish(interrupted, rng)
    shutil.rmtree(interrupted.folder / "checkpoints")
    launcher = FakeLauncher(runs)
    assert table1.train_all(runs, STEPS, None, 2, launcher) == {}
    assert sorted(launcher.commands) == sorted(run.name for run in runs[3:])
    assert launcher.commands[interrupted.name][-2:] == ["--resume", str(interrupted.folder)]
    for run in runs[4:]:
        assert launcher.commands[run.name] == train_command(run, "new", table1_plan.shared_overrides(STEPS, None))
        assert f"run_dir={run.folder}" in launcher.commands[run.name] and "--resume" not in launcher.commands[run.name]
    again = FakeLauncher(runs)
    assert table1.train_all(runs, STEPS, None, 2, again) == {}
    assert again.commands == {}


def test_a_crash_is_reported_and_does_not_lose_the_others(tmp_path, readme, capsys, monkeypatch):
    runs = plan(tmp_path / "out", 1)
    launcher = FakeLauncher(runs, crash=("opd/seed0",))
    monkeypatch.setattr(table1, "Launcher", lambda: launcher)
    monkeypatch.setattr(table1, "evaluate_all", lambda *_: {})
    assert table1.main(arguments(tmp_path, readme, "--seeds", "1")) == 1
    assert len(launcher.commands) == len(runs)
    shown = capsys.readouterr()
    assert "missing: opd/seed0 (exit status 1; see " in shown.err
    assert "old" in readme.read_text() and not (tmp_path / "r").exists()
    assert {run_state(run, STEPS) for run in runs[1:]} == {"finished"}


def test_a_run_that_ends_early_without_an_error_is_reported(tmp_path):
    class StopsEarly(FakeLauncher):
        def __call__(self, command, log):
            super().__call__(command, log)
            shutil.rmtree(self.by_log[log].folder / "checkpoints")
            return 0

    runs = plan(tmp_path, 1)[:1]
    assert "ended before step 20; see" in table1.train_all(runs, STEPS, None, 1, StopsEarly(runs))["opd/seed0"]


def test_finished_evaluations_are_not_repeated(tmp_path, monkeypatch):
    runs = finish_all(tmp_path, 1)
    monkeypatch.setattr(table1, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("an evaluation was started"))
    assert table1.evaluate_all(tmp_path, runs, STEPS, None, 2) == {}


def test_another_recipe_is_refused(tmp_path):
    table1_plan.open_recipe(tmp_path, table1_plan.make_recipe(STEPS, None))
    table1_plan.open_recipe(tmp_path, table1_plan.make_recipe(STEPS, None))
    with pytest.raises(UserError, match=r"steps=20, now it is 40; give another --out"):
        table1_plan.open_recipe(tmp_path, {**table1_plan.make_recipe(STEPS, None), "steps": 40})


def test_launcher_keeps_output_and_stops_whole_process_groups(tmp_path):
    launcher = table1.Launcher()
    log = tmp_path / "a" / "log"
    assert launcher([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], log) == 3
    assert log.read_text() == "hello\n"
    # A child of the child, as the deepspeed launcher starts them, must end too.
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    status: list[int] = []
    log = tmp_path / "b.log"
    thread = threading.Thread(target=lambda: status.append(launcher([sys.executable, "-c", child], log)))
    thread.start()
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    grandchild = int(log.read_text())
    assert is_running(grandchild)
    launcher.stop()
    thread.join(20)
    assert status == [-signal.SIGTERM] and not launcher.running
    while is_running(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_only_report_writes_json_figure_and_readme(tmp_path, readme, capsys):
    out = tmp_path / "out"
    finish_all(out, 3)
    table1_plan.open_recipe(out, table1_plan.make_recipe(STEPS, None))
    words = arguments(tmp_path, readme, "--seeds", "3", "--only-report")
    assert table1.main(words) == 0, capsys.readouterr().err
    first = readme.read_text()
    assert table1.main(words) == 0
    assert readme.read_text() == first
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first

    table = json.loads((tmp_path / "r" / "t.json").read_text())
    assert set(table1_report.MANDATORY) <= set(table)
    assert {"device", "threads", "versions", "git_sha", "command"} <= set(table["environment"])
    assert table["recipe"]["steps"] == STEPS and table["recipe"]["config"]["learner"]["lr"] == pytest.approx(2e-4)
    assert table["seeds"] == [0, 1, 2] and len(table["runs"]) == 3 * len(ROWS) and len(table["rows"]) == len(ROWS)
    assert "--only-report" not in table["command"] and "--seeds 3" in table["command"]
    assert table["commits"] == ["a" * 40]
    for run in table["runs"]:
        assert {"row", "lambdas", "normalizer", "seed", "environment", "curve", "final"} <= set(run)

    lines = [line for line in first.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(table1_plan.BASELINES) + len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
    g_opd = next(row for row in table["rows"] if row["row"] == "g_opd_2")["metrics"]["t1"]
    assert f"{100 * g_opd['mean']:.1f} ± {100 * g_opd['standard_error']:.1f}" in first
    assert "](r/t.svg)" in first and "(r/t.json)" in first
    assert (tmp_path / "r" / "t.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("seeds", "steps", "limit", "whole"),
    [(5, 40, None, True), (3, 40, None, True), (2, 40, None, False), (5, 20, None, False), (5, 40, 32, False)],
)
def test_only_a_whole_table_goes_to_the_repository_by_itself(seeds, steps, limit, whole):
    def chosen(*more: str) -> table1.Outputs:
        words = ["--out", "o", "--seeds", str(seeds), *more]
        return table1.choose_outputs(table1._parser().parse_args(words), steps, limit)

    results = ROOT / "bench" / "results"
    if whole:
        assert chosen() == table1.Outputs(results / "table1.json", results / "table1.svg", ROOT / "README.md")
    else:
        assert chosen() == table1.Outputs(Path("o/table1.json"), Path("o/table1.svg"), None)
    assert chosen("--readme", "").readme is None
    named = table1.Outputs(Path("a.json"), Path("b.svg"), Path("c.md"))
    assert chosen("--json", "a.json", "--figure", "b.svg", "--readme", "c.md") == named


def test_only_report_without_runs_or_with_missing_ones_is_refused(tmp_path, readme, capsys):
    out = tmp_path / "out"
    assert table1.main(arguments(tmp_path, readme, "--only-report")) == 2
    assert "no table was started there" in capsys.readouterr().err
    runs = finish_all(out, 2)
    table1_plan.open_recipe(out, table1_plan.make_recipe(STEPS, None))
    runs[-1].final.unlink()
    assert table1.main(arguments(tmp_path, readme, "--only-report", "--seeds", "2")) == 1
    assert f"missing: {runs[-1].name}" in capsys.readouterr().err
    assert "old" in readme.read_text()


def test_figure_is_reproducible(tmp_path):
    out = tmp_path / "out"
    table = table1.assemble(out, finish_all(out, 2), table1_plan.make_recipe(STEPS, None))
    svg, png = draw(table, tmp_path / "a.svg")
    again, _ = draw(table, tmp_path / "b.svg")
    assert svg.read_bytes() == again.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
