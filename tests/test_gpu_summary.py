"""bench/gpu_summary.py: a step that ran nothing, failed or was stopped does not count as passed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import gpu_summary

REPORT = '<testsuites><testsuite tests="{tests}" failures="0" errors="0" skipped="{skipped}"/></testsuites>'


def outcome(monkeypatch, tmp_path, steps, part="kernels"):
    """(exit status, the JSON) for steps given as (name, status)."""
    (tmp_path / "steps.tsv").write_text("".join(f"{name}\t{status}\t7\n" for name, status in steps))
    places = [word for name in ("work", "out") for word in (f"--{name}", str(tmp_path))]
    command = ["gpu_summary.py", "outcome", "--part", part, "--steps", str(tmp_path / "steps.tsv"), *places]
    monkeypatch.setattr(sys, "argv", command)
    return gpu_summary.main(), json.loads((tmp_path / f"gpu_{part}.json").read_text())


@pytest.mark.parametrize(("tests", "skipped", "result"), [(9, 8, "passed"), (9, 9, "failed"), (0, 0, "failed")])
def test_tests_that_all_skip_have_shown_nothing(monkeypatch, tmp_path, tests, skipped, result):
    (tmp_path / "gpu_tests.xml").write_text(REPORT.format(tests=tests, skipped=skipped))
    status, found = outcome(monkeypatch, tmp_path, [("gpu_tests", 0)])
    assert found["steps"]["gpu_tests"]["result"] == result and status == (result != "passed")
    assert found["steps"]["gpu_tests"]["skipped"] == skipped


def test_a_step_that_failed_or_was_stopped_fails_the_part(monkeypatch, tmp_path):
    status, found = outcome(monkeypatch, tmp_path, [("sanitize", 1), ("kernel_profile", 124), ("other", 0)], "checks")
    assert status == 1
    assert [step["result"] for step in found["steps"].values()] == ["failed", "timed out", "passed"]
    assert found["command"] == "bash bench/gpu_suite.sh checks" and found["versions"]["torch"]
    assert outcome(monkeypatch, tmp_path, [("other", 0)], "checks")[0] == 0


def test_a_demo_needs_both_evaluations(monkeypatch, tmp_path):
    for name in ("g_opd", "tc_opd"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        (tmp_path / "demo" / name / "environment.json").write_text('{"device": "x"}')
    (tmp_path / "demo" / "g_opd" / "eval.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    status, found = outcome(monkeypatch, tmp_path, [("demo", 0)])
    assert status == 1 and found["steps"]["demo"]["reason"] == "no eval numbers of tc_opd"
    (tmp_path / "demo" / "tc_opd" / "eval.jsonl").write_text('{"step": 0}\n')
    assert outcome(monkeypatch, tmp_path, [("demo", 0)])[0] == 0
    runs = json.loads((tmp_path / "demo_gpu.json").read_text())["runs"]
    assert [row["step"] for row in runs["g_opd"]["eval"]] == [0, 1] and set(runs) == {"g_opd", "tc_opd"}
