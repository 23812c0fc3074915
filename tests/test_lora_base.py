"""The frozen base of a LoRA student: nobody's copy, who scores from it, and that checkpoints belong to it."""

from __future__ import annotations

import gc
import re
import shutil

import pytest
import torch
from forked import end_all, run_forked
from learners import on_learner
from running import lines
from test_lora_student import lora_tree, train
from test_models import exact, rollouts
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from tcopd_fast.cli import main
from tcopd_fast.scoring import delta

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def storages():
    """Bytes of all float tensors in this process."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def share_the_base(learner, world, config, inputs):
    """Bytes that scoring adds beside the learner, and what the reference says of some rollouts."""
    from tcopd_fast.scoring import Scorer

    before = storages()
    scorer = Scorer(config, inputs.models, world, learner.frozen_base())
    added = storages() - before
    for parameter in learner.lm.parameters():
        if parameter.requires_grad and config.learner.zero_stage < 3:
            parameter.data.add_(0.1)  # the adapter moves, its base does not
    lambdas = [dict.fromkeys(config.teachers, 1.0)] * 3
    scored = scorer.score(rollouts(), lambdas)
    return {
        "added": added,
        "lines": scorer.placements(),
        "reference": [item.ref_logprob for item in scored],
        "teachers": {name: [item.teacher_logprobs[name] for item in scored] for name in config.teachers},
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reference_and_adapter_teachers_run_from_the_learners_base(tiny, tmp_path, stage):
    from test_lora_teachers import make_adapter

    # Wide enough that a copy of the weights is far more than anything else that scoring makes.
    base = tmp_path / "base"
    make_model(0, tied=False).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    wrapped = {name: make_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("expert", "anti"))}
    tree = lora_tree(tiny, tmp_path / "run", {"path": str(base)}, learner={"zero_stage": stage})
    tree["teachers"] = {name: {"path": str(tmp_path / name)} for name in ("expert", "anti")}
    [result] = on_learner(share_the_base, tree, tmp_path / "rank")
    student = AutoModelForCausalLM.from_pretrained(base)
    whole = sum(p.nbytes for p in student.parameters())
    for i, rollout in enumerate(rollouts()):
        torch.testing.assert_close(result["reference"][i].double(), exact(student, rollout), atol=2e-5, rtol=0)
        for name, model in wrapped.items():
            expected = exact(model, rollout)
            torch.testing.assert_close(result["teachers"][name][i].double(), expected, atol=2e-5, rtol=0)
    reference = next(line for line in result["lines"] if line.startswith("reference"))
    if stage == 3:
        assert "reference: resident" in reference, "its base is spread over the ranks"
        assert result["added"] >= whole
        return
    assert "reference: student (the frozen base of the learner's LoRA student; no second copy)" in reference
    assert all("that is student" in line for line in result["lines"] if not line.startswith("reference"))
    factors = 2 * sum(4 * 4 * sum(p.shape) for name, p in student.named_parameters() if "_proj" in name)
    assert result["added"] < factors + whole // 4, (result["added"], whole)


def score_beside_the_base(learner, world, config, inputs):
    """What the teachers say of some rollouts where no base may be read from its files."""
    from tcopd_fast.scoring import Scorer, placement

    def refused(*words):
        raise AssertionError("the base is there")

    placement.MappedWeights = refused
    scorer = Scorer(config, inputs.models, world, learner.frozen_base())
    for parameter in learner.lm.parameters():
        if parameter.requires_grad and config.learner.zero_stage < 3:
            parameter.data.add_(0.1)
    scored = scorer.score(rollouts(), [dict.fromkeys(config.teachers, 1.0)] * 3)
    return scorer.placements(), {name: [s.teacher_logprobs[name] for s in scored] for name in config.teachers}


@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_a_delta_on_the_learners_base_scores_as_its_whole_teacher_bit_for_bit(tiny, tmp_path, stage, dtype):
    base, whole, folder = (tmp_path / name for name in ("base", "whole", "delta"))
    model = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=getattr(torch, dtype))
    for target in (base, whole):
        model.save_pretrained(target)
        make_tokenizer().save_pretrained(target)
        for parameter in model.parameters():  # a tenth of the weights of every tensor
            parameter.data.flatten()[::10] += 0.25
    delta.make(str(base), str(whole), folder)
    tree = lora_tree(tiny, tmp_path / "run", {"path": str(base), "dtype": dtype}, learner={"zero_stage": stage})
    tree["teachers"] = {"expert": {"path": str(folder)}, "anti": {"path": str(whole), "placement": "resident"}}
    [(placements, scores)] = on_learner(score_beside_the_base, tree, tmp_path / "rank")
    kinds = dict(re.match(r"(\w+): (\w+)", line).groups() for line in placements)
    assert kinds == {"reference": "resident" if stage == 3 else "student", "expert": "delta", "anti": "resident"}
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for i, (got, expected) in enumerate(zip(scores["expert"], scores["anti"], strict=True)):
        assert torch.equal(got, expected)
        assert (got - exact(start, rollouts()[i])).abs().max() > 0.1, "it must differ from its base"


@pytest.mark.parametrize("size", [1, 2])
def test_a_resume_on_another_base_is_refused_and_the_base_may_have_moved(tiny, tmp_path, size, capsys):
    base, kept, run_dir = tmp_path / "base", tmp_path / "kept", tmp_path / "run"
    shutil.copytree(tiny.student, base)
    shutil.copytree(base, kept)
    train(tmp_path, lora_tree(tiny, run_dir, {"path": str(base)}, steps=1), size)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    model.save_pretrained(base)
    text = run_forked(["--resume", str(run_dir), "steps=2"], tmp_path / "refused.log", size, status=2)
    refusal = rf"step_000001: holds a LoRA adapter alone, trained on weights of SHA-256 .* but model.path {base} holds"
    assert len(re.findall(refusal, text)) == 1, text
    assert "self-check" not in text and len(lines(run_dir / "metrics.jsonl")) == 1
    assert main(["export", str(run_dir)]) == 2
    assert re.search(refusal, capsys.readouterr().err)
    assert main(["export", str(run_dir), "--adapter"]) == 0, "it needs no base"
    text = run_forked(["--resume", str(run_dir), "steps=2", f"model.path={kept}"], tmp_path / "resumed.log", size)
    assert f"changed since the run began: model.path: '{base}' -> '{kept}'" in text
    assert len(lines(run_dir / "metrics.jsonl")) == 2
    assert main(["export", str(run_dir)]) == 0


def test_a_resume_with_another_kind_of_adapter_is_refused(tiny, tmp_path, capsys):
    train(tmp_path, lora_tree(tiny, tmp_path / "run", steps=1))
    for override in ("model.lora.alpha=16", "model.lora=null"):
        assert main(["train", "--resume", str(tmp_path / "run"), override]) == 2
        assert "model.lora.alpha: the run began with 8.0 and cannot go on with" in capsys.readouterr().err
