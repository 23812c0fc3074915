"""bench/multitask.py: the table, figure and document that it makes, from made-up results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from finished_runs import STEPS, leave_baselines, leave_run
from running import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import multitask
import multitask_plan
import multitask_report
from multitask_plan import FINAL, ROWS, SETS, plan
from table1_plan import open_recipe
from table1_report import check_markers

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.errors import UserError
from tcopd_fast.evaluate import accuracy_change


def made_up_final(rng: np.random.Generator) -> dict:
    return {
        domain: {
            name: {
                "mean_at_k": float(rng.uniform(0.4, 0.8)),
                "standard_error": 0.01,
                "problems": 512,
                "response_length_mean": float(rng.uniform(8, 12)),
            }
            for name in FINAL
        }
        for domain in SETS
    }


def finish(job, rng: np.random.Generator, final: bool = True) -> None:
    records: list[dict] = []
    for step in (0, 10, STEPS):
        for domain in SETS:
            new = {"step": step, "set": domain, "domain": domain, "temperature": 1.0, "k": 4}
            new |= {"mean_at_k": float(rng.uniform(0.4, 0.8)), "standard_error": 0.01}
            new |= {"response_length_mean": 9.0, "reverse_kl": {}}
            records.append(new | accuracy_change(new, records))
    leave_run(job, records, made_up_final(rng) if final else None)


def finish_all(out: Path, seeds: int) -> list:
    rng = np.random.default_rng(0)
    runs = plan(out, seeds)
    for job in runs:
        finish(job, rng)
    leave_baselines(out, multitask_plan, lambda: made_up_final(rng))
    open_recipe(out, multitask_plan.make_recipe(STEPS, None))
    return runs


def test_aggregation_against_numpy(tmp_path):
    records = [multitask.read_run(job) for job in finish_all(tmp_path, 3)]
    rows = {row["row"]: row for row in multitask_report.aggregate(records[::-1], "exopd")}
    assert set(rows) == {row.key for row in ROWS}

    def mean_t1(key: str) -> np.ndarray:
        own = sorted((item for item in records if item["row"] == key), key=lambda item: item["seed"])
        return np.array([np.mean([item["final"][d]["t1"]["mean_at_k"] for d in SETS]) for item in own])

    for key, row in rows.items():
        values = mean_t1(key)
        assert row["metrics"]["mean_t1"]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["metrics"]["mean_t1"]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
        for name in ("change", "forgetting"):
            last = [item["curve"]["largest"][-1][name] for item in records if item["row"] == key]
            assert row["metrics"][f"largest_{name}"]["mean"] == pytest.approx(np.mean(last))
        if key == "exopd":
            assert row["difference"] == {}
        else:
            paired = values - mean_t1("exopd")
            assert row["difference"]["mean_t1"]["mean"] == pytest.approx(paired.mean())
            assert row["difference"]["mean_t1"]["standard_error"] == pytest.approx(paired.std(ddof=1) / math.sqrt(3))


@pytest.fixture
def doc(tmp_path) -> Path:
    file = tmp_path / "multitask.md"
    file.write_text(f"before\n{multitask_report.BEGIN}\nold\n{multitask_report.END}\nafter\n")
    return file


def words(tmp_path: Path, doc: Path, *more: str) -> list[str]:
    parts = ["--out", str(tmp_path / "out"), "--steps", str(STEPS), "--jobs", "2", "--doc", str(doc)]
    return [*parts, "--json", str(tmp_path / "r" / "t.json"), "--figure", str(tmp_path / "r" / "t.svg"), *more]


def test_only_report_writes_json_figure_and_document(tmp_path, doc, capsys):
    finish_all(tmp_path / "out", 2)
    command = words(tmp_path, doc, "--seeds", "2", "--only-report")
    assert multitask.main(command) == 0, capsys.readouterr().err
    first, figure = doc.read_text(), (tmp_path / "r" / "t.svg").read_bytes()
    assert multitask.main(command) == 0
    assert doc.read_text() == first and (tmp_path / "r" / "t.svg").read_bytes() == figure
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first

    table = json.loads((tmp_path / "r" / "t.json").read_text())
    assert table["seeds"] == [0, 1] and len(table["runs"]) == 2 * len(ROWS) and table["commits"] == ["a" * 40]
    assert table["command"].startswith("python bench/multitask.py --out ") and "--only-report" not in table["command"]
    assert {"train_largest", "heldout_largest", "largest_expert"} <= set(table["recipe"]["sha256"])
    shown = [line for line in first.splitlines() if line.startswith("|")]
    assert len(shown) == 4 + len(multitask_plan.BASELINES) + 2 * len(ROWS)
    row = next(row for row in table["rows"] if row["row"] == "contrast_0.5_active")
    for name in ("math_t1", "largest_greedy", "mean_t1", "math_forgetting"):
        entry = row["metrics"][name]
        assert f"{100 * entry['mean']:.1f} ± {100 * entry['standard_error']:.1f}" in first, name
    assert "| contrast | 1.5 | −0.5 | yes |" in first and "](r/t.svg)" in first and "(r/t.json)" in first


def test_missing_results_and_markers_are_named(tmp_path, doc, capsys):
    runs = finish_all(tmp_path / "out", 1)
    runs[-1].final.unlink()
    assert multitask.main(words(tmp_path, doc, "--seeds", "1", "--only-report")) == 1
    assert f"missing: {runs[-1].name}" in capsys.readouterr().err and "old" in doc.read_text()
    doc.write_text("nothing")
    assert multitask.main(words(tmp_path, doc, "--seeds", "1", "--only-report")) == 2
    assert "multitask:begin" in capsys.readouterr().err


def test_only_unfinished_runs_are_started(tmp_path, monkeypatch):
    runs = finish_all(tmp_path, 1)
    fresh = runs[2]
    for name in ("config.yaml", "final.json"):
        (fresh.folder / name).unlink()
    started: list[list[str]] = []

    class Launcher:
        def __call__(self, command, log):
            started.append(list(command))
            finish(fresh, np.random.default_rng(1), final=False)
            return 0

        def stop(self):
            pass

    evaluated: list[str] = []
    monkeypatch.setattr(multitask, "Launcher", Launcher)
    monkeypatch.setattr(multitask, "run_evaluations", lambda jobs, *_: evaluated.extend(j.name for j in jobs) or {})
    assert multitask.make_all(tmp_path, runs, STEPS, None, 1) == {}
    [command] = started
    assert command[command.index("--config") + 1] == str(multitask_plan.CONFIG)
    assert f"run_dir={fresh.folder}" in command and "objective.lambdas.math.largest_expert=-0.5" in command
    assert evaluated == [*multitask_plan.BASELINES, *(job.name for job in runs)]


def test_the_document_shows_a_valid_configuration_and_has_a_place_for_the_table(tiny, tmp_path):
    example = yaml.safe_load(multitask.DOC.read_text().split("```yaml\n")[1].split("```")[0])
    teachers = {f"{domain}_teacher": {"path": "x"} for domain in ("math", "code")}
    config = validate({**tiny.tree(tmp_path), "teachers": teachers, **example}, Config)
    assert config.lambdas_for("code") == {"math_teacher": 0.0, "code_teacher": 1.25}
    assert check_markers(multitask.DOC, multitask_report.BEGIN, multitask_report.END)
    with pytest.raises(UserError, match="multitask:begin"):
        check_markers(ROOT / "docs" / "metrics.md", multitask_report.BEGIN, multitask_report.END)
