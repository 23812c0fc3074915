"""The mid-size benchmark: the paper's way computes the project's loss; checkpoints, plan and report; real cells."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from tiny import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import midsize  # noqa: E402
import midsize_report as report  # noqa: E402
from midsize_child import is_out_of_memory, process_memory, random_rollouts  # noqa: E402
from midsize_figure import draw  # noqa: E402
from midsize_logits import logits_loss, on_device, token_logprobs, without_adapter  # noqa: E402
from midsize_models import SHAPES, TINY, describe, write  # noqa: E402
from midsize_plan import LOGITS, PLACEMENTS, SPEED, Cell, config_tree, lengths, plan, predict  # noqa: E402
from midsize_predict import block as prediction_block  # noqa: E402
from midsize_predict import predictions  # noqa: E402

from tcopd_fast.adapter import ADAPTER, peft_config  # noqa: E402
from tcopd_fast.config import Config  # noqa: E402
from tcopd_fast.config_io import validate  # noqa: E402
from tcopd_fast.config_sections import LoraConfig  # noqa: E402
from tcopd_fast.errors import UserError  # noqa: E402
from tcopd_fast.loss import policy_loss  # noqa: E402
from tcopd_fast.models import PackedCausalLM, load_causal_lm  # noqa: E402
from tcopd_fast.packing import pack  # noqa: E402
from tcopd_fast.scoring.weights import same_checkpoint, weight_files  # noqa: E402
from tcopd_fast.types import Batch, PackedTokens  # noqa: E402

ENVIRONMENT = {
    "git_sha": "a" * 40, "device": "a GPU", "versions": {"python": "3.12"}, "command": "python bench/midsize.py",
    "started": "2026-01-02T03:04:05Z",
}  # fmt: skip
GB = 10**9


@pytest.fixture
def student(tmp_path) -> PackedCausalLM:
    folder = tmp_path / "student"
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_causal_lm(str(folder), dtype="float32", attention="sdpa", vocab_size=None)


def packed() -> PackedTokens:
    """Two sequences in one row."""
    return pack([[3, 4, 5], [6]], [[7, 8, 9, 1], [5, 4, 3, 2, 1, 7]])


def configured(temperature: float) -> Config:
    tree = config_tree(Path("folder"), Cell("tiny", 1, "resident"), 64)
    tree["rollout"]["temperature"] = temperature
    return validate(tree, Config)


def off_policy(lm: PackedCausalLM, temperature: float) -> Batch:
    """A batch whose ratios, mismatch weights and advantages reach every bound of the objective."""
    tokens, generator = packed(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        logprob = lm.logprobs(tokens, temperature=temperature).logprob
    count = len(logprob)
    noise = torch.randn(4, count, generator=generator)
    old = logprob + noise[0]
    return Batch((0, 1), (4, 6), tokens, reward=3 * noise[1], ref_logprob=old + noise[2], old_logprob=old,
                 rollout_logprob=old - 2 * noise[3].abs(), weights=torch.linspace(0.05, 0.15, count))  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("on_policy", [False, True])
def test_materialised_logits_give_the_projects_loss_and_gradients(student, temperature, on_policy):
    config, batch = configured(temperature), off_policy(student, temperature)
    if on_policy:
        batch = Batch(**{**vars(batch), "old_logprob": None})
    found = []
    for compute in (logits_loss, policy_loss):
        student.zero_grad()
        loss, *_, scored = compute(student, on_device(batch, torch.device("cpu")), config)
        loss.backward()
        logprob = scored if compute is logits_loss else scored.logprob
        found.append((loss.detach(), logprob, [p.grad.clone() for p in student.parameters()]))
    (loss, logprob, grads), (expected, expected_logprob, expected_grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprob, expected_logprob, rtol=1e-5, atol=1e-5)
    assert max(float(grad.abs().max()) for grad in expected_grads) > 1e-2
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_scoring_without_the_adapter_is_scoring_by_what_the_student_started_from(student):
    before = token_logprobs(student, packed(), 1.0).detach()
    inject_adapter_in_model(peft_config(LoraConfig(rank=4)), student.model, ADAPTER)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    adapted = token_logprobs(student, packed(), 1.0).detach()
    with without_adapter(student):
        off = token_logprobs(student, packed(), 1.0).detach()
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(off, before)
    torch.testing.assert_close(token_logprobs(student, packed(), 1.0).detach(), adapted)
    assert all(p.requires_grad for n, p in student.named_parameters() if ".lora_" in n)


def test_teachers_share_a_file_and_are_still_different_models(tmp_path):
    write(tmp_path, SHAPES["tiny"], "base", 2)
    base, *teachers = (tmp_path / name for name in ("base", "full_1", "full_2"))
    assert not same_checkpoint(str(base), str(teachers[0])) and not same_checkpoint(*map(str, teachers))
    own, shared = weight_files(teachers[0])
    assert own.stat().st_nlink == 1 and own.stat().st_size < 1000
    assert shared.samefile(weight_files(base)[1]) and shared.stat().st_size > 300_000
    options = {"dtype": "float32", "attention": "sdpa", "vocab_size": None}
    scores = [load_causal_lm(str(f), **options).logprobs(packed(), temperature=1.0).logprob for f in teachers]
    assert (scores[0] - scores[1]).abs().max() > 1e-4
    stamp = own.stat().st_mtime_ns
    write(tmp_path, SHAPES["tiny"], "base", 2)
    assert own.stat().st_mtime_ns == stamp


def test_the_most_telling_cells_come_first_and_large_shapes_have_no_deltas():
    cells = plan(("qwen3_0.6b", "qwen3_4b"), (1, 2, 4), PLACEMENTS)
    assert len(set(cells)) == len(cells) == 3 * (5 + 4)
    assert [cell.name for cell in cells[:4]] == [
        "qwen3_0.6b_resident_1", "qwen3_0.6b_logits_1", "qwen3_0.6b_offload_1", "qwen3_0.6b_resident_4",
    ]  # fmt: skip
    assert [cell.shape for cell in cells[:12]] == ["qwen3_0.6b"] * 6 + ["qwen3_4b"] * 6
    assert {cell.teachers for cell in cells[18:]} == {2}
    assert not any(cell.placement == "delta" and cell.shape == "qwen3_4b" for cell in cells)
    assert [cell.placement for cell in plan(("tiny",), (3,), ("lora",))] == [LOGITS, "lora"]


def test_sequences_pack_into_the_given_tokens():
    assert lengths(16384) == (512, 15873) and lengths(64) == (2, 63)
    tokens = random_rollouts(2, 64, 1000)
    assert [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in tokens] == [64, 64]
    assert tokens[0].token_ids != tokens[1].token_ids


def test_the_plan_is_asked_for_the_gpu_that_there_is(tmp_path):
    write(tmp_path, SHAPES["tiny"], "base", 2)

    def predicted(placement: str, count: int, memory: int | None) -> dict:
        cell = Cell("tiny", count, placement)
        return predict(config_tree(tmp_path, cell, 64), cell, memory)

    one, two = (predicted("resident", count, 80 * GB) for count in (1, 2))
    checkpoint = 326_000
    assert two["stage_bytes"]["scoring"] - one["stage_bytes"]["scoring"] == pytest.approx(checkpoint, rel=0.01)
    assert one["fits"] and one["peak_bytes"] == max(one["stage_bytes"].values()) and one["stage_seconds"]["loss"] > 0
    logits = predicted(LOGITS, 1, 80 * GB)
    assert one["peak_bytes"] < logits["peak_bytes"] <= one["peak_bytes"] + 1000 * 63 * 14
    assert logits["stage_seconds"] == one["stage_seconds"] and logits["fits"] and "stage_bytes" not in logits
    assert not predicted("resident", 1, 1 << 21)["fits"] and not predicted(LOGITS, 1, 1 << 21)["fits"]
    assert predicted("offload", 1, 80 * GB)["host_bytes"] > 326_000
    assert "stage_seconds" not in predicted("offload", 1, None)


@pytest.fixture
def data() -> dict:
    """Two steps per cell: resident grows by 8 GB per teacher, the logits take 35 GB more and do not fit at K = 4."""
    cells = []
    for count in (1, 4):
        for placement, size in (("resident", 10 + 8 * count), (LOGITS, 45 + 8 * count), ("offload", 12)):
            steps = [
                {f"peak_memory_bytes/{s}": (size - 1) * GB for s in ("scoring", "loss")}
                | {"peak_memory_bytes/learner": size * GB, "time_s/loss": 1.0, "time_s/learner": 2.0, "loss": loss}
                | {"time_s/scoring": 0.5 * (1 + count) + more, "time_s/step": 3.0 + 0.5 * (1 + count) + more}
                for more, loss in ((0.0, 0.1), (0.2, 0.1 + (1e-4 if placement == LOGITS else 0.0)))
            ]
            row = {"shape": "qwen3_4b", "teachers": count, "placement": placement, "result": "measured", "cell_s": 9.0,
                   "steps": steps, "predicted": {"peak_bytes": 20 * GB}}  # fmt: skip
            if placement == "offload":
                row["pinned_bytes"] = 11 * GB
                row["predicted"] |= {"stage_bytes": {"scoring": 10 * GB, "loss": 11 * GB, "learner": 16 * GB},
                                     "stage_seconds": {"scoring": 1.1, "loss": 2.0, "learner": 1.0}}  # fmt: skip
            if placement == LOGITS and count == 4:
                row |= {"result": "out of memory", "steps": [], "out_of_memory": {"stage": "loss", "message": ""}}
            cells.append(row)
    cells.append({"shape": "qwen3_4b", "teachers": 2, "placement": "lora", "result": "skipped"})
    about = vars(SHAPES["qwen3_4b"]) | {"packed_tokens": 16384, "response_tokens": 15873}
    return {"environment": ENVIRONMENT, "device": "cuda", "device_bytes": 80 * GB, "tokens": 16384, "measured_steps": 2,
            "shapes": {"qwen3_4b": about}, "cells": cells}  # fmt: skip


def test_costs_are_slopes_of_the_fullest_stage_and_of_scoring(data):
    resident, offload = report.costs(data, "qwen3_4b")
    assert resident["placement"] == "resident" and resident["bytes"] == pytest.approx(8 * GB)
    assert resident["seconds"] == pytest.approx(0.5) and resident["share"] == pytest.approx(0.5 / 4.1)
    assert offload["bytes"] == 0 and offload["counts"] == [1, 4]
    pair = report.against_logits(data, "qwen3_4b")
    assert (pair["teachers"], pair["bytes"], pair["logits_bytes"]) == (1, 18 * GB, 53 * GB)
    assert pair["loss_difference"] == pytest.approx(1e-4)


def test_the_block_shows_every_cell_whatever_became_of_it(data, tmp_path):
    block = report.markdown(data, "r/m.json", "r/m.svg")
    assert "| resident | 1 | 17.00 | 17.00 | 18.00 | – | 1.10 | 1.00 | 2.00 | 4.10 |" in block
    assert "| offload | 1 | 11.00 | 11.00 | 12.00 | 11.0 | 1.10 | 1.00 | 2.00 | 4.10 |" in block
    assert "| offload | 1 | 0.60 | 1.10 | 1.00 | 0.75 | 1.00 | 0.50 | 2.00 |" in block
    assert "| resident | 1 | 0.90 | – | – | – | – | – | – |" in block
    assert "| resident, with logits | 4 | *out of memory in loss* | – |" in block
    assert "| LoRA adapters | 2 | *skipped* | – |" in block
    assert "| resident | 1, 4 | +8.0 | 0.500 | 12.2 |" in block and "a LoRA adapter is trained; 1 sequence of" in block
    assert "at most 1.0e-04 apart" in block and "commit `aaaaaaaaa`; 2026-01-02; `python bench/midsize.py`" in block
    assert {line.count("|") for line in block.splitlines() if line.startswith("| resident")} == {11, 6, 10}
    short = report.summary(data, "r/m.json")
    assert "Qwen3-4B: GB per additional teacher: resident +8.0, offload 0.0; with 1 resident teachers 18.0 GB" in short
    assert "with materialised logits 53.0 GB and 4.10 s" in short and "\n" not in short
    draw(data, tmp_path / "m.svg")
    assert (tmp_path / "m.svg").read_text().startswith("<?xml")


def test_a_file_without_markers_stays_as_it_is_and_half_a_pair_is_refused(tmp_path):
    doc = tmp_path / "d.md"
    doc.write_text("x\n")
    assert not report.insert(doc, "block", report.BEGIN, report.END) and doc.read_text() == "x\n"
    doc.write_text(f"x\n{report.BEGIN}\nold\n{report.END}\n")
    assert report.insert(doc, "block", report.BEGIN, report.END)
    assert doc.read_text() == f"x\n{report.BEGIN}\nblock\n{report.END}\n"
    doc.write_text(f"{report.BEGIN}\n")
    with pytest.raises(UserError, match="midsize:end"):
        report.insert(doc, "block", report.BEGIN, report.END)


def test_a_gpus_allocators_are_asked_by_the_names_that_torch_gives_their_numbers(monkeypatch):
    assert "allocated_bytes.{current,peak" in (torch.cuda.host_memory_stats.__doc__ or "")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 5})
    found = process_memory(torch.device("cuda"))
    assert (found["reserved_bytes"], found["pinned_bytes"]) == (7, 5) and found["host"]["resident_peak_bytes"] > 1 << 20
    assert set(process_memory(torch.device("cpu"))) == {"host"}


def test_only_memory_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_wrong_arguments_get_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert midsize.main(["--out", str(tmp_path)]) == 2
    assert "--shapes qwen3_0.6b: torch sees no CUDA device; --tiny rehearses" in capsys.readouterr().err
    assert midsize.main(["--tiny", "--tokens", "8"]) == 2 and "--tokens 8: at least 32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        midsize.main(["--tiny", "--placements", "sharded"])
    assert "'sharded': placements are resident, offload, delta, lora" in capsys.readouterr().err


def test_without_time_every_cell_is_skipped_and_nothing_is_started(tmp_path, capsys):
    assert midsize.main(["--tiny", "--out", str(tmp_path), "--budget-s", "1e-9"]) == 1
    found = json.loads((tmp_path / "midsize_gpu.json").read_text())
    assert len(found["cells"]) == 2 * (5 + 4) and {row["result"] for row in found["cells"]} == {"skipped"}
    assert not (tmp_path / "cells").exists() and set(found["shapes"]) == set(TINY)


def test_a_cell_that_breaks_leaves_its_last_words(tmp_path):
    waiting = midsize.Waiting(tmp_path / "cell.log", midsize.child_environment("cpu", 1))
    waiting.begin({"config": {"steps": 0}, "placement": "resident", "out": str(tmp_path / "cell.json")})
    assert waiting.wait(60) == 2 and waiting.last_lines().startswith("error: ")
    assert not (tmp_path / "cell.json").exists()
    slow = midsize.Waiting(tmp_path / "slow.log", midsize.child_environment("cpu", 1))
    assert slow.wait(0.01) is None and slow.process.returncode < 0


def test_checkpoints_that_cannot_be_written_fail_their_cells_and_are_tried_once(tmp_path, capsys):
    (tmp_path / "tiny").write_text("in the way")
    arguments = ["--tiny", "--shapes", "tiny", "--teachers", "1", "--placements", "resident", "--out", str(tmp_path)]
    assert midsize.main(arguments) == 1
    rows = json.loads((tmp_path / "midsize_gpu.json").read_text())["cells"]
    assert [row["result"] for row in rows] == ["failed", "failed"] and rows[0]["message"] == rows[1]["message"]
    said = capsys.readouterr()
    assert said.err.count("writing tiny base ended with status 1") == 1 and "| resident | 1 | *failed* |" in said.out


@pytest.mark.slow
def test_a_tiny_run_measures_a_student_with_and_without_logits(tmp_path, capsys):
    arguments = ["--tiny", "--shapes", "tiny_adapter", "--teachers", "1", "--placements", "resident"]
    assert midsize.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "midsize_gpu.json").read_text())
    assert [row["result"] for row in found["cells"]] == ["measured", "measured"]
    ours, theirs = found["cells"]
    assert ours["placements"][0].startswith("reference: student") and len(ours["steps"]) == 2
    for mine, other in zip(ours["steps"], theirs["steps"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-3) and mine["peak_memory_bytes/learner"] > 0
    assert {"scoring", "loss", "learner"} == set(ours["predicted"]["stage_bytes"])
    assert (tmp_path / "midsize_gpu.svg").is_file() and "| resident | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("shape", TINY)
def test_shapes_alone_give_the_prediction_of_real_checkpoints(shape, tmp_path, monkeypatch):
    # Deltas one after another, here, not in processes of their own.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    write(tmp_path / "real", SHAPES[shape], "base", 2)
    if SHAPES[shape].deltas:
        write(tmp_path / "real", SHAPES[shape], "delta", 2)
    describe(tmp_path / "shape", SHAPES[shape], 2)
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "shape").rglob("*.safetensors")) < 200_000
    for cell in plan((shape,), (1, 2), PLACEMENTS):
        real, alone = (predict(config_tree(tmp_path / f, cell, 64), cell, 80 * GB) for f in ("real", "shape"))
        assert real == alone, cell


def test_under_an_adapter_the_reference_is_no_second_copy_with_logits_either(tmp_path):
    describe(tmp_path, SHAPES["tiny_adapter"], 1)
    ours, theirs = (Cell("tiny_adapter", 1, name) for name in ("resident", LOGITS))
    ours, theirs = (predict(config_tree(tmp_path, cell, 64), cell, 80 * GB) for cell in (ours, theirs))
    assert theirs["peak_bytes"] - ours["stage_bytes"]["loss"] == pytest.approx(1000 * 63 * 14, rel=1e-3)


def test_a_prediction_is_repeatable_and_touches_no_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["midsize.py", "--predict", "--tiny"])
    found = []
    for name in ("a", "b"):
        assert midsize.main(["--predict", "--tiny", "--out", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name / "midsize_predicted.json").read_text()))
    a, b = found
    assert a["cells"] == b["cells"] and a["predicted"] is True and len(a["cells"]) == 2 * (5 + 4)
    assert a["environment"]["command"] == "python bench/midsize.py --predict --tiny"
    assert capsys.readouterr().out.count("**Predicted, not measured: tiny**") == 2


def test_the_documents_show_the_prediction_until_there_is_a_measurement(data, tmp_path, monkeypatch):
    doc, results = tmp_path / "performance.md", {name: tmp_path / f"{name}.json" for name in ("measured", "predicted")}
    doc.write_text(f"{report.BEGIN}\n{report.END}\n{report.README_BEGIN}\n{report.README_END}\n")
    for name, path in (("RESULT", results["measured"]), ("PREDICTED", results["predicted"]), ("DOC", doc),
                       ("README", doc)):  # fmt: skip
        monkeypatch.setattr(midsize, name, path)
    assert midsize.main(["--report"]) == 2
    assert midsize.main(["--predict", "--tiny", "--json", str(results["predicted"])]) == 0
    assert "**Predicted, not measured: tiny_adapter**" in doc.read_text() and "A mid-size run" not in doc.read_text()
    results["measured"].write_text(json.dumps(data))
    assert midsize.main(["--report"]) == 0
    assert "Predicted, not measured" not in doc.read_text() and "| measured ÷ predicted | K |" in doc.read_text()
    assert "**A mid-size run, measured.**" in doc.read_text() and (tmp_path / "measured.svg").is_file()


def test_the_table_of_predictions_by_hand():
    def row(placement: str, count: int, size: int, host: int) -> dict:
        seconds = {"scoring": 0.5 * count, "loss": 1.0, "learner": 2.5}
        predicted = {"peak_bytes": size * GB, "fits": size < 80, "host_bytes": host * GB, "stage_seconds": seconds}
        return {"shape": "qwen3_4b", "teachers": count, "placement": placement, "predicted": predicted}

    cells = [row("resident", 1, 18, 3), row("resident", 4, 42, 12), row(LOGITS, 1, 60, 0), row(LOGITS, 4, 84, 0)]
    made_up = {"environment": ENVIRONMENT, "device_bytes": 80 * GB, "speed": vars(SPEED), "tokens": 16384,
               "shapes": {"qwen3_4b": vars(SHAPES["qwen3_4b"])}, "cells": cells}  # fmt: skip
    block = prediction_block(made_up, "r/p.json")
    assert "| resident | 18.0 | 42.0 | 12.0 | 4.00 | +8.0 | 0.500 | 12.5 |" in block
    assert "| resident, with logits | 60.0 | **84.0** | – | 4.00 | +8.0 | 0.500 | 12.5 |" in block
    assert "| *the paper's second 4B teacher* | – | – | – | – | +8.2 | – | 3.5 |" in block
    assert block.startswith("**Predicted, not measured: Qwen3-4B**") and "the paper's step includes a rollout" in block


@pytest.mark.slow
def test_the_committed_prediction_is_what_the_code_computes():
    stored = json.loads(midsize.PREDICTED.read_text())
    about = stored["environment"]
    assert stored == predictions(about, midsize.DEFAULT_SHAPES, midsize.COUNTS, PLACEMENTS, midsize.TOKENS)
    assert about["command"] == "python bench/midsize.py --predict"


def test_committed_tables_are_those_of_the_committed_numbers():
    shown = 0
    for doc, block, begin, end in midsize.blocks():
        text = doc.read_text(encoding="utf-8")
        shown += f"{begin}\n{block}\n{end}" in text
        assert begin not in text or f"{begin}\n{block}\n{end}" in text, doc
    assert shown
