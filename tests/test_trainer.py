"""Whole runs on tiny checkpoints: what a user is promised about ranks, micro-batches, faults and files."""

from __future__ import annotations

import json
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
from running import learning, lines, run, start, write_config

from tcopd_fast import checkpoints
from tcopd_fast.cli import main
from tcopd_fast.config_io import load_config

# A large epsilon makes AdamW's step proportional to the gradient, so that a wrong scale shows in the weights.
SENSITIVE = {"eps": 1.0, "lr": 0.3, "max_grad_norm": 1e6, "weight_decay": 0.0}


def exported(tmp_path, run_dir):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / f"{run_dir.name}-export"
    assert main(["export", str(run_dir), "--out", str(folder)]) == 0
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_ranks_stages_and_microbatches_do_not_change_the_gradient(tiny, tmp_path):
    """One global batch, two optimizer steps per batch; stated tolerance: 2e-5 in weights, 1e-4 in gradient norm."""
    variants = {
        "one_rank": (1, {"zero_stage": 2, "max_tokens_per_microbatch": 1000}),
        "small_microbatches": (1, {"zero_stage": 1, "max_tokens_per_microbatch": 30}),
        "two_ranks_zero2": (2, {"zero_stage": 2, "max_tokens_per_microbatch": 40}),
        "two_ranks_zero3": (2, {"zero_stage": 3, "max_tokens_per_microbatch": 1000}),
    }
    weights, metrics = {}, {}
    for name, (size, learner) in variants.items():
        run_dir = tmp_path / name
        tree = tiny.tree(run_dir, rollout={"prompts_per_step": 7}, learner={**SENSITIVE, **learner, "minibatches": 2})
        run(["--config", str(write_config(tmp_path / f"{name}.yaml", tree))], size)
        weights[name], metrics[name] = exported(tmp_path, run_dir), lines(run_dir / "metrics.jsonl")
    start_weights = {k: v.clone() for k, v in weights["one_rank"].items()}
    moved = max(float((start_weights[k] - v).abs().max()) for k, v in load_start(tiny).items())
    assert moved > 0.01, "the step must be large enough for a wrong gradient to show"
    for name in list(variants)[1:]:
        for key, value in weights["one_rank"].items():
            torch.testing.assert_close(weights[name][key], value, atol=2e-5, rtol=0, msg=f"{name} {key}")
        for row, expected in zip(metrics[name], metrics["one_rank"], strict=True):
            assert row["batch/tokens"] == expected["batch/tokens"]
            assert row["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=1e-4)
            for key in ("loss/value", "loss/entropy", "reward/mean", "scoring/expert/logratio_mean", "loss/ratio_mean"):
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (name, key)


def load_start(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.student).state_dict()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_metrics(tiny, tmp_path):
    """SIGKILL three times, once before any checkpoint: in float32 with the embedded engine every metric is equal."""
    common = {
        "steps": 7,
        "checkpoint": {"every": 2},
        "eval": {"data": [{"path": str(tiny.prompts)}], "samples": 2, "every": 3},
        "learner": {"minibatches": 2, "warmup_steps": 3},
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(["--config", str(write_config(tmp_path / "whole.yaml", tiny.tree(whole, **common)))])
    words = ["--config", str(write_config(tmp_path / "broken.yaml", tiny.tree(broken, **common)))]
    for kill_after in (1, 3, 5):
        [process] = start(words)
        wait_for_lines(broken / "metrics.jsonl", kill_after, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        words = ["--resume", str(broken)]
    run(words)
    for name in ("metrics.jsonl", "eval.jsonl", "token_samples.jsonl"):
        assert [learning(row) for row in lines(broken / name)] == [learning(row) for row in lines(whole / name)], name


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished two-domain run with evaluation, checkpoints and several optimizer steps per batch."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    tree = tiny.tree(
        run_dir,
        steps=3,
        objective={"lambdas": {"even": {"expert": 1.5, "anti": -0.5}, "odd": {"anti": 1.0}}},
        learner={"minibatches": 2, "epochs": 2},
        eval={"data": [{"path": str(tiny.prompts), "limit": 6}], "samples": 3},
        checkpoint={"every": 1, "keep_last": 2},
        logging={"tensorboard": True, "token_samples": 2},
    )
    output = run(["--config", str(write_config(run_dir.parent / "c.yaml", tree))])
    return run_dir, output


def test_a_run_directory_holds_everything(finished):
    run_dir, output = finished
    assert load_config(run_dir / "config.yaml").learner.epochs == 2
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["seed"] == 3
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    assert list((run_dir / "tensorboard").glob("events*"))
    samples = pq.read_table(run_dir / "eval" / "step_000003_prompts.parquet")
    assert samples.num_rows == 18
    assert "step 3/3" in output and "self-check" in output


def test_metrics_are_named_by_stage_and_teacher(finished):
    run_dir, _ = finished
    row = lines(run_dir / "metrics.jsonl")[-1]
    stages = ("data", "rollout", "scoring", "reward", "batch", "loss", "learner", "weight_sync")
    for stage in stages:
        assert row[f"time_s/{stage}"] >= 0 and row[f"peak_memory_bytes/{stage}"] > 0
    for key in (
        "scoring/expert/logratio_p5",
        "scoring/expert/reverse_kl/even",
        "scoring/anti/reverse_kl/odd",
        "reward/anti/sign_agreement",
        "reward/expert/clamp_fraction",
        "loss/ratio_max",
        "loss/effective_sample_size",
        "rollout/accuracy",
        "learner/grad_norm",
    ):
        assert row[key] is not None, key
    assert "scoring/expert/reverse_kl/odd" not in row, "the expert must not have seen the other domain"
    assert row["weight_sync/version"] == 3 and row["rollout/version"] == 2
    assert row["loss/ratio_max"] > 1.0, "several optimizer steps per batch move the ratio"


def test_what_the_backward_left_out_is_logged(finished, tiny, tmp_path):
    run_dir = tmp_path / "run"
    tree = tiny.tree(run_dir, steps=2, loss={"grad_tol": 0.25}, learner={"minibatches": 2})
    run(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    names = ("loss/dropped_mass_mean", "loss/dropped_mass_max", "loss/dense_row_share", "loss/kept_column_share")
    for row in lines(run_dir / "metrics.jsonl"):
        mean, largest, dense, kept = (row[name] for name in names)
        assert 0 <= mean <= largest <= 0.25
        assert 0 <= dense <= 1 and 0 < kept <= 1 and kept >= dense
    assert not set(names) & set(lines(finished[0] / "metrics.jsonl")[-1]), "an exact backward has nothing to report"


def test_token_samples_add_up_to_the_advantage(finished):
    run_dir, _ = finished
    records = lines(run_dir / "token_samples.jsonl")
    assert len(records) == 6
    for record in records:
        reward = torch.zeros(len(record["tokens"]))
        for teacher in record["teachers"].values():
            reward += torch.tensor(teacher["contribution"])
        torch.testing.assert_close(reward, torch.tensor(record["reward"]), atol=1e-5, rtol=0)


def test_a_second_run_in_the_same_folder_is_refused(finished, capsys):
    run_dir, _ = finished
    assert main(["train", "--config", str(run_dir.parent / "c.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)])
def test_export_is_the_student_at_every_stage_and_dtype(tiny, tmp_path, dtype, stage):
    """With learning rate 0 the export must be the start, bit for bit in its dtype; resuming then moves it."""
    run_dir = tmp_path / "run"
    tree = tiny.tree(run_dir, steps=1, model={"dtype": dtype}, learner={"zero_stage": stage, "lr": 0.0})
    run(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    unmoved, first = exported(tmp_path / "a", run_dir), load_start(tiny)
    for key, value in first.items():
        torch.testing.assert_close(unmoved[key], value.to(unmoved[key].dtype), atol=0, rtol=0)
    run(["--resume", str(run_dir), "steps=2", "learner.lr=0.01"])
    assert load_config(run_dir / "config.yaml").steps == 2
    assert len(json.loads((run_dir / "environment.json").read_text())["resumed"]) == 1
    moved = exported(tmp_path / "b", run_dir)
    assert all((moved[k].float() - unmoved[k].float()).abs().max() > 1e-3 for k in first)


def test_a_checkpoint_that_was_being_written_is_not_one(finished, tiny):
    run_dir, _ = finished
    partial = run_dir / "checkpoints" / "step_000009.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    assert checkpoints.checkpoint_steps(run_dir) == [2, 3]
    partial.joinpath("manifest.json").unlink()
    partial.rmdir()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(tiny, tmp_path, stage):
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny.expert)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    from tiny import make_tokenizer

    make_tokenizer().save_pretrained(broken)
    run_dir = tmp_path / "run"
    teachers = {"expert": {"path": str(broken)}, "anti": {"path": str(tiny.anti)}}
    tree = tiny.tree(run_dir, teachers=teachers, learner={"zero_stage": stage})
    output = run(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    assert "1 optimizer step(s) skipped, gradient not finite" in output
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["learner/skipped_steps"] for row in rows] == [1, 1]
    first, last = load_start(tiny), exported(tmp_path, run_dir)
    for key, value in first.items():
        torch.testing.assert_close(last[key], value, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"train": [{"path": "no.jsonl"}]}}, "no.jsonl"),
        ({"objective": {"lambdas": {"even": {"expert": 1.0}}}}, "the domain 'odd'"),
        ({"rollout": {"max_new_tokens": 4096}}, "the models hold 128 positions"),
        ({"eval": {"data": [{"path": "unanswered.jsonl"}]}}, "1 of 1 problems have no reference answer"),
        ({"data": {"overlong": "refuse", "max_prompt_tokens": 2}}, "max_prompt_tokens"),
    ],
)
def test_bad_input_is_refused_before_any_process_starts(tiny, tmp_path, monkeypatch, capsys, sections, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unanswered.jsonl").write_text('{"problem": "1+1"}\n')
    config = write_config(tmp_path / "c.yaml", tiny.tree(tmp_path / "run", **sections))
    assert main(["train", "--config", str(config)]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_a_learner_that_disagrees_with_its_frozen_copy_is_stopped(tiny, tmp_path):
    tree = tiny.tree(tmp_path / "run", scoring={"self_check_tolerance": 1e-12})
    [process] = start(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2
    assert "error: scoring.self_check_tolerance=1e-12: the student as a frozen model differs" in output
