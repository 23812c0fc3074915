"""The benchmarks of the teachers' cost: real cells at a tiny size, growth and verdicts, documents equal their JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import delta_sizes  # noqa: E402
import delta_sizes_report  # noqa: E402
import teacher_memory  # noqa: E402
import teacher_memory_report as report  # noqa: E402
from delta_sizes_judge import first_line  # noqa: E402
from delta_sizes_models import cut_tokenizer, kept_ids  # noqa: E402
from teacher_memory_figure import draw  # noqa: E402
from teacher_memory_models import SHAPES, one_step_away  # noqa: E402
from teacher_memory_plan import Cell, plan  # noqa: E402
from teacher_memory_steps import run_tree  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402

from tcopd_fast.config import Config  # noqa: E402
from tcopd_fast.config_io import validate  # noqa: E402

DOC = ROOT / "docs" / "teachers.md"
CHECKPOINT = 200_000_000
ENVIRONMENT = {
    "git_sha": "a" * 40, "device": "CPU: test", "versions": {"python": "3.11"}, "command": "python b.py",
    "started": "2026-01-02T03:04:05Z",
}  # fmt: skip


def cell(series: str, teachers: int | None, megabytes: float, ranks: int = 1, difference: float | None = None) -> dict:
    """A measured cell whose second pass is the larger one, and of two ranks the second."""
    passes = [
        {"seconds": 1.0 + (teachers or 0), "resident_set_bytes": size, "anonymous_bytes": 0, "mapped_bytes": size}
        for size in (int(megabytes * 1e6) - 1000, int(megabytes * 1e6))
    ]
    processes = [{"passes": passes[:1]}] * (ranks - 1) + [{"passes": passes}]
    return {"series": series, "teachers": teachers, "ranks": ranks, "processes": processes,
            "max_abs_difference": difference}  # fmt: skip


@pytest.fixture
def data() -> dict:
    """Resident grows by a checkpoint of 200 MB per teacher, offload by 1, sharded by a half."""
    cells = [cell("none", None, 400)]
    for count in (0, 1, 4):
        cells += [cell("resident", count, 600 + 200 * count), cell("offload", count, 450 + count, difference=0.0)]
        cells += [cell("sharded", count, 500 + 100 * count, ranks=2, difference=2e-3 * count)]
    runs = [
        {"round": turn, "placement": "delta", "teachers": count,
         "time_s/scoring": [0.5 * count + turn / 100, 0.5 * count], "time_s/step": [10.0, 10.0]}
        for turn in (0, 1) for count in (1, 2, 4)
    ]  # fmt: skip
    steps = {"weights": 1_000_000, "sequences": 4, "response_tokens": 8, "measured_steps": 2, "rounds": 2, "runs": runs}
    return {
        "environment": ENVIRONMENT, "device": "cpu", "jobs": 1, "threads": 1, "shape": vars(SHAPES["tiny"]),
        "scored_tokens": 32, "packed_tokens": 60, "bytes": {"full": CHECKPOINT, "delta": 40_000_000, "lora": 9_000_000},
        "cells": cells, "steps": steps,
    }  # fmt: skip


def test_growth_is_the_slope_over_all_counts_of_the_largest_pass_and_rank(data):
    found = {one.name: one for one in report.series_of(data)}
    assert list(found) == ["resident", "offload", "sharded 2"]
    assert found["resident"].growth == pytest.approx(200e6) and found["resident"].bytes == {0: 2e8, 1: 4e8, 4: 1e9}
    assert found["sharded 2"].growth == pytest.approx(100e6)
    assert found["resident"].parts["mapped_bytes"] == pytest.approx(200e6)
    assert found["offload"].seconds_per_teacher == pytest.approx(1.0)
    assert found["offload"].difference == 0 and found["resident"].difference is None
    assert found["sharded 2"].difference == 8e-3
    verdicts = [report.verdict(one, CHECKPOINT) for one in found.values()]
    assert verdicts == ["1.00 of a checkpoint", "flat", "0.50 of a checkpoint"]
    with pytest.raises(ValueError, match="two counts"):
        report.slope({1: 2.0})


def test_flat_means_less_than_a_twentieth_of_a_checkpoint_either_way():
    def verdict(share: float) -> str:
        return report.verdict(report.Series("offload", {}, share * CHECKPOINT, {}, 0.0, None), CHECKPOINT)

    assert [verdict(0.049), verdict(-0.049)] == ["flat", "flat"]
    assert verdict(0.05) == "0.05 of a checkpoint" and "flat" not in verdict(-0.2)


def test_the_share_of_a_step_is_the_slope_of_scoring_over_the_step_with_one_teacher(data):
    (row,) = report.step_rows(data)
    assert row["scoring_s"] == pytest.approx(0.5, abs=0.01) and row["share"] == pytest.approx(0.05, rel=0.02)
    del data["steps"]
    assert report.step_rows(data) == []


def test_the_block_holds_every_series_and_says_where_it_is_from(data, tmp_path):
    block = report.memory_block([(data, "r/t.json", "r/t.svg")])
    rows = [line for line in block.splitlines() if line.startswith("| resident") or line.startswith("| offload")]
    assert rows[0] == "| resident | 200 | 400 | 1000 | +200.0 | 1.00 of a checkpoint | 1.00 | – |"
    assert rows[1] == "| offload | 50 | 51 | 54 | +1.0 | **flat** | 1.00 | 0 |"
    assert "| delta | 0.5" in block and "5.0 % |" in block and "3.5 %" in block
    assert "commit `aaaaaaaaa`; 2026-01-02; `python b.py`" in block and "[t.json](r/t.json)" in block
    short = report.readme_block([(data, "r/t.json", "")])
    assert "resident +200.0, offload +1.0, sharded, 2 ranks +100.0." in short and "delta 5.0 %" in short
    doc = tmp_path / "d.md"
    doc.write_text(f"x\n{report.BEGIN}\nold\n{report.END}\ny\n")
    report.insert(doc, block, report.BEGIN, report.END)
    assert doc.read_text() == f"x\n{report.BEGIN}\n{block}\n{report.END}\ny\n"
    draw(data, tmp_path / "t.svg")
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")


def test_the_plan_measures_the_yardsticks_before_what_is_compared_with_them():
    cells = plan(("delta", "lora", "sharded"), (0, 2), (1, 2))
    assert cells[:4] == [Cell("none", None), Cell("merged", 1), Cell("resident", 0), Cell("resident", 2)]
    assert cells[-4:] == [Cell("sharded", count, size) for size in (1, 2) for count in (0, 2)]
    assert len({one.name for one in cells}) == len(cells) == 12


def test_teachers_are_one_rounding_step_away_in_a_twentieth_of_their_weights():
    old = torch.randn(200, 300).bfloat16()
    new = one_step_away(old, torch.Generator().manual_seed(0))
    assert float((new != old).float().mean()) == pytest.approx(0.05, abs=0.005)
    assert ((new.view(torch.int16) - old.view(torch.int16)).abs() <= 1).all()


def test_training_runs_of_the_steps_are_valid_configurations(tmp_path):
    for placement, count in (("resident", 1), ("offload", 2), ("delta", 4)):
        tree = run_tree(tmp_path, tmp_path / "run", placement, count, SHAPES["tiny"], 3)
        config = validate(tree, Config)
        assert config.steps == 3 and sum(config.lambdas_for("d").values()) == pytest.approx(1.0)
        assert len(config.teachers) == count


@pytest.mark.slow
def test_a_tiny_benchmark_from_checkpoints_to_json(tmp_path, capsys):
    """Fresh processes, the project's Scorer, and deltas that score exactly like the same teachers resident."""
    words = [
        "--tiny",
        "--no-steps",
        "--teachers",
        "0,1",
        "--placements",
        "delta",
        "--out",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    assert teacher_memory.main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "teacher_memory.json").read_text())
    cells = {(one["series"], one["teachers"]): one for one in found["cells"]}
    assert set(cells) == {("none", None), ("resident", 0), ("resident", 1), ("delta", 0), ("delta", 1)}
    assert cells["delta", 1]["max_abs_difference"] == 0 and cells["resident", 1]["max_abs_difference"] is None
    assert cells["delta", 1]["processes"][0]["placements"] == ["reference: resident", "teacher_1: delta"]
    assert cells["resident", 0]["processes"][0]["placements"] == ["reference, teacher_1: resident"]
    for one in cells.values():
        assert len(one["processes"][0]["passes"]) == 2
        for row in one["processes"][0]["passes"]:
            assert row["resident_set_bytes"] > 1e8 and row["anonymous_bytes"] > 0 and row["mapped_bytes"] > 0
    assert found["packed_tokens"] > found["scored_tokens"] == 4 * 8
    assert found["environment"]["command"].startswith("python bench/")
    assert "delta: " in capsys.readouterr().out


def test_counts_and_placements_are_checked(capsys):
    for words, message in ((["--teachers", "3"], "at least two"), (["--placements", "server"], "placements are")):
        with pytest.raises(SystemExit):
            teacher_memory.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_training_run_makes_a_small_checked_delta(tmp_path):
    task, _ = delta_sizes.tiny_task(tmp_path)
    (row,) = delta_sizes.trained(task, tmp_path, lr=1e-5, steps=1)
    assert row["steps"] == 1 and row["dtype"] == "bfloat16" and 0 <= row["rollout/accuracy"] <= 1
    assert 0 < row["changed"] < 0.5 * row["weights"] and row["delta_bytes"] < 0.5 * row["base_bytes"]
    assert row["changed_zeros"] <= row["zeros"] < row["weights"]


def test_float32_fine_tunes_change_every_weight(tmp_path):
    base, expert = (delta_sizes.miniature.asset(name) for name in ("base", "expert"))
    row = delta_sizes.difference(base, expert, tmp_path / "delta")
    assert row["changed"] > 0.95 * row["weights"] and row["dtype"] == "float32"
    assert "full" in row["forms"] and row["delta_bytes"] > 0.9 * row["base_bytes"]


def test_a_cut_tokenizer_keeps_first_tokens_characters_and_their_merges():
    vocabulary = {"<bos>": 0, "<eos>": 1, "a": 2, "ab": 3, "abc": 4, **{f"x{i}": i for i in range(5, 16384)}}
    vocabulary |= {"b": 16384, "c": 16385, "é": 16386, "bc": 16387}
    state = json.loads(Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("ab", "c")])).to_str())
    kept = kept_ids(vocabulary)
    assert kept == [*range(16384), 16384, 16385]
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(state, kept)))
    assert cut.encode("abc").tokens == ["<bos>", "abc"] and cut.encode("bc").tokens == ["<bos>", "b", "c"]
    assert cut.get_vocab_size() == len(kept)


def test_the_judge_reads_the_first_line_only():
    assert first_line(" 14\n4+5=9", "14") and not first_line("15\n14", "14") and not first_line("", "14")


def block_of(begin: str, end: str, doc: Path = DOC) -> str:
    return doc.read_text(encoding="utf-8").split(f"{begin}\n")[1].split(f"\n{end}")[0]


def test_the_documents_memory_tables_are_those_of_their_json():
    runs = teacher_memory.runs_to_report()
    if runs:
        assert block_of(report.BEGIN, report.END) == report.memory_block(runs)
        expected = report.readme_block(teacher_memory.from_root(runs))
        assert block_of(report.README_BEGIN, report.README_END, ROOT / "README.md") == expected


def test_the_documents_delta_sizes_are_those_of_their_json():
    file = delta_sizes.DOCUMENTED
    if file.is_file():
        expected = delta_sizes_report.sizes_block(json.loads(file.read_text()), f"../bench/results/{file.name}")
        assert block_of(delta_sizes_report.BEGIN, delta_sizes_report.END) == expected
