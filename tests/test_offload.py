"""learner.offload: the same training with the optimizer, and under ZeRO 3 the weights, in host memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from forked import end_all, run_forked
from learners import on_learner
from running import learning, lines, write_config
from transformers import AutoModelForCausalLM

from tcopd_fast.cli import main
from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.errors import UserError
from tcopd_fast.learner import deepspeed_config

# A large epsilon makes AdamW's step proportional to the gradient, so that a wrong scale shows in the weights.
SENSITIVE = {"eps": 1.0, "lr": 0.3, "max_grad_norm": 1e6, "minibatches": 2, "max_tokens_per_microbatch": 60}


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def train(tiny, tmp_path, name, size=1, learner=None, model=None, **environment):
    tree = tiny.tree(tmp_path / name, model=model or {}, learner={**SENSITIVE, **(learner or {})})
    config = write_config(tmp_path / f"{name}.yaml", tree)
    run_forked(["--config", str(config)], tmp_path / f"{name}.log", size, **environment)
    return exported(tmp_path / name)


def exported(run_dir):
    out = run_dir.with_name(f"{run_dir.name}-export")
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


def difference(a, b):
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.mark.slow
def test_offload_does_not_change_what_is_learnt(tiny, tmp_path):
    """Tolerance 2e-5 in weights that moved by more than 0.01; two ranks, several micro-batches, two steps per batch.

    Without a compiler in reach: torch's own fused AdamW is used, so nothing is built.
    """
    plain = train(tiny, tmp_path, "plain", learner={"zero_stage": 1})
    assert difference(plain, AutoModelForCausalLM.from_pretrained(tiny.student).state_dict()) > 0.01
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to(shutil.which("git"))
    no_compiler = {"PATH": str(tmp_path / "bin"), "CXX": "/nonexistent"}
    no_compiler["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "built")
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer_and_weights")):
        name = f"zero{stage}_{offload}"
        learner = {"zero_stage": stage, "offload": offload}
        assert difference(train(tiny, tmp_path, name, 2, learner, **no_compiler), plain) < 2e-5, name
        rows = [lines(tmp_path / run / "metrics.jsonl") for run in (name, "plain")]
        for row, expected in zip(*rows, strict=True):
            assert row["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=1e-4)
    assert not list((tmp_path / "built").glob("**/*.so"))


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer_and_weights")])
def test_an_offloaded_run_resumes_bit_for_bit(tiny, tmp_path, stage, offload):
    learner = {"zero_stage": stage, "offload": offload, "lr": 0.01, "max_tokens_per_microbatch": 60}
    model = {"dtype": "bfloat16"}
    trees = {
        name: tiny.tree(tmp_path / name, steps=steps, model=model, learner=learner, checkpoint={"every": 2})
        for name, steps in (("whole", 4), ("broken", 2))
    }
    for name, tree in trees.items():
        run_forked(["--config", str(write_config(tmp_path / f"{name}.yaml", tree))], tmp_path / f"{name}.log")
    run_forked(["--resume", str(tmp_path / "broken"), "steps=4"], tmp_path / "resume.log")
    whole, broken = ([learning(row) for row in lines(tmp_path / n / "metrics.jsonl")] for n in ("whole", "broken"))
    assert whole == broken
    assert difference(exported(tmp_path / "whole"), exported(tmp_path / "broken")) == 0


def where_things_are(learner, world, config, inputs):
    optimizer = learner.optimizer
    return {
        "optimizer": type(optimizer.optimizer).__name__,
        "fused": optimizer.optimizer.param_groups[0]["fused"],
        "offload_optimizer": learner.engine.zero_cpu_offload(),
        "offload_param": learner.engine.zero_offload_param() is not None,
    }


def test_deepspeed_offloads_with_torchs_own_adamw(tiny, tmp_path):
    learner = {"zero_stage": 3, "offload": "optimizer_and_weights"}
    [found] = on_learner(where_things_are, tiny.tree(tmp_path / "run", learner=learner), tmp_path / "rank")
    assert found == {"optimizer": "AdamW", "fused": True, "offload_optimizer": True, "offload_param": True}


@pytest.mark.parametrize(
    ("offload", "sections"),
    [
        ("none", set()),
        ("optimizer", {"offload_optimizer"}),
        ("optimizer_and_weights", {"offload_optimizer", "offload_param"}),
    ],
)
def test_host_memory_is_pinned_for_a_gpu(tiny, tmp_path, monkeypatch, offload, sections):
    config = validate(tiny.tree(tmp_path, learner={"zero_stage": 3, "offload": offload}), Config)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        zero = deepspeed_config(config)["zero_optimization"]
        assert {key: zero[key] for key in zero if key.startswith("offload")} == {
            name: {"device": "cpu", "pin_memory": cuda} for name in sections
        }


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_offloaded_under_zero_3_alone(tiny, tmp_path, stage):
    with pytest.raises(UserError, match=rf"learner\.offload=optimizer_and_weights with learner\.zero_stage={stage}"):
        validate(tiny.tree(tmp_path, learner={"zero_stage": stage, "offload": "optimizer_and_weights"}), Config)
