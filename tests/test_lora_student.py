"""A LoRA student: only the adapter learns, and whoever needs whole weights gets sums."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from forked import end_all, run_forked
from learners import on_learner
from running import learning, lines, run, write_config
from test_models import exact, rollouts
from transformers import AutoModelForCausalLM

from tcopd_fast.adapter import check_targets
from tcopd_fast.checkpoints import checkpoint_dir
from tcopd_fast.cli import main
from tcopd_fast.config import Config, EvalRunConfig
from tcopd_fast.config_io import validate
from tcopd_fast.errors import UserError

peft = pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 8}
# A large epsilon makes AdamW's step proportional to the gradient, so that a wrong scale shows in the weights.
SENSITIVE = {"eps": 1.0, "lr": 0.3, "max_grad_norm": 1e6, "weight_decay": 0.0}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def lora_tree(tiny, run_dir, model=None, **sections):
    return tiny.tree(run_dir, model={"lora": LORA, **(model or {})}, **sections)


def train(tmp_path, tree, size=1):
    name = tree["run_dir"].rpartition("/")[2]
    return run_forked(["--config", str(write_config(tmp_path / f"{name}.yaml", tree))], tmp_path / f"{name}.log", size)


def export(run_dir, *words):
    out = run_dir.with_name(f"{run_dir.name}-{'adapter' if words else 'export'}")
    assert main(["export", str(run_dir), "--out", str(out), *words]) == 0
    return out


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def difference(a, b):
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.mark.slow
def test_ranks_stages_and_checkpointing_do_not_change_what_the_adapter_learns(tiny, tmp_path):
    """Tolerance: 2e-5 in merged weights, 1e-4 in the gradient norm; two optimizer steps per batch, two batches."""
    variants = {
        "one_rank": (1, {"zero_stage": 1, "max_tokens_per_microbatch": 1000}, {}),
        "two_ranks_zero1": (2, {"zero_stage": 1, "max_tokens_per_microbatch": 40}, {}),
        "two_ranks_zero2": (2, {"zero_stage": 2, "max_tokens_per_microbatch": 40}, {"gradient_checkpointing": True}),
        "two_ranks_zero3": (2, {"zero_stage": 3, "max_tokens_per_microbatch": 40}, {"gradient_checkpointing": True}),
    }
    found, metrics = {}, {}
    for name, (size, learner, model) in variants.items():
        tree = lora_tree(tiny, tmp_path / name, model, learner={**SENSITIVE, **learner, "minibatches": 2})
        train(tmp_path, tree, size)
        found[name], metrics[name] = weights(export(tmp_path / name)), lines(tmp_path / name / "metrics.jsonl")
    start = weights(tiny.student)
    adapted = {name for name, value in start.items() if not torch.equal(value, found["one_rank"][name])}
    assert adapted == {name for name in start if "_proj" in name}, "every linear layer, and nothing else"
    assert difference(start, found["one_rank"]) > 0.01, "the step must be large enough for a wrong gradient to show"
    for name in list(variants)[1:]:
        assert difference(found["one_rank"], found[name]) < 2e-5, name
        for row, expected in zip(metrics[name], metrics["one_rank"], strict=True):
            assert row["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=1e-4)
            assert row["loss/ratio_mean"] == pytest.approx(expected["loss/ratio_mean"], rel=1e-4)


def inspect(learner, world, config, inputs):
    """What trains, what engines are given, and the logprobs of learner and hf engine after a change of the adapter."""
    from tcopd_fast.dist import World
    from tcopd_fast.models import load_causal_lm
    from tcopd_fast.packing import pack
    from tcopd_fast.rollout.hf import HfEngine
    from tcopd_fast.weight_sync import LearnerWeights, sync_weights

    def loss(lm, tokens):
        return -lm.logprobs(tokens, temperature=1.0).logprob.mean()

    def factors(module):
        return {n: p for n, p in module.named_parameters() if p.requires_grad}

    first = {}
    if config.learner.zero_stage < 3:
        first = {name: p.detach().clone() for name, p in factors(learner.lm.model).items()}
    for _ in range(3):
        learner.engine.backward(learner.engine(loss, pack([[3, 4, 5]], [[6, 7, 1]])), scale_wrt_gas=False)
        learner.engine.step()
    moments = [state["exp_avg"] for state in learner.optimizer.optimizer.state.values()]
    assert {m.dtype for m in moments} == {torch.float32}
    engine = HfEngine(
        config.model.path, inputs.models.tokenizer, dtype=config.model.dtype, max_batch_size=2, vocab_size=None,
        device=world.device,
    )  # fmt: skip
    sync_weights(learner, engine, 1)
    given = LearnerWeights(learner)
    shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given]
    sampled = load_causal_lm(config.model.path, dtype=config.model.dtype, attention="sdpa", vocab_size=None)
    sampled.model.load_state_dict(engine.model.state_dict())
    tokens = pack([r.prompt.token_ids for r in rollouts()], [r.token_ids for r in rollouts()])
    with torch.no_grad():
        merged = sampled.logprobs(tokens, temperature=1.0).logprob.split([len(r.token_ids) for r in rollouts()])
    assert isinstance(world, World)
    return {
        "trained": sorted(factors(learner.lm.model)),
        "first": first,
        "moments": sum(m.numel() for m in moments),
        "shapes_agree": shapes == given.shapes(),
        "names": {name for name, _, _ in shapes} == {name for name, _ in engine.model.named_parameters()},
        "learner": learner.logprobs(rollouts()),
        "merged": list(merged),
    }


@pytest.mark.parametrize(
    ("stage", "dtype", "size"),
    [(1, "float32", 1), (2, "float32", 2), (3, "float32", 2), (1, "bfloat16", 2), (3, "bfloat16", 2)],
)
def test_engines_get_the_sum_of_base_and_adapter(tiny, tmp_path, stage, dtype, size):
    """float32: logprobs within 2e-5 of the learner's. bfloat16: the sums are rounded once more (0.05 nats here)."""
    tree = lora_tree(tiny, tmp_path / "run", {"dtype": dtype}, learner={"zero_stage": stage, "lr": 0.05})
    results = on_learner(inspect, tree, tmp_path / "ranks", size)
    count = sum(4 * (p.shape[0] + p.shape[1]) for name, p in weights(tiny.student).items() if "_proj" in name)
    one = results[0]
    assert all(".lora_A." in name or ".lora_B." in name for name in one["trained"])
    assert len(one["trained"]) == 2 * 14
    assert sum(r["moments"] for r in results) == pytest.approx(count, abs=64), "Adam's moments of the adapter alone"
    for other in results[1:]:
        assert all(torch.equal(one["first"][name], value) for name, value in other["first"].items())
    assert one["shapes_agree"] and one["names"]
    moved = max((a.double() - exact(AutoModelForCausalLM.from_pretrained(tiny.student), r)).abs().max()
                for a, r in zip(one["learner"], rollouts(), strict=True))  # fmt: skip
    assert moved > 0.1, "the adapter must matter"
    for a, b in zip(one["learner"], one["merged"], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 if dtype == "float32" else 0.05, rtol=0)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_adapter_goes_on_bit_for_bit_and_its_checkpoints_hold_no_base(tiny, tmp_path, stage):
    common = {"checkpoint": {"every": 2}, "learner": {"zero_stage": stage, "lr": 0.05, "minibatches": 2}}
    whole = lora_tree(tiny, tmp_path / "whole", **common, steps=4)
    train(tmp_path, whole)
    broken = lora_tree(tiny, tmp_path / "broken", **common, steps=2)
    train(tmp_path, broken)
    run_forked(["--resume", str(tmp_path / "broken"), "steps=4"], tmp_path / "resume.log")
    after = [learning(row) for row in lines(tmp_path / "whole" / "metrics.jsonl")]
    assert [learning(row) for row in lines(tmp_path / "broken" / "metrics.jsonl")] == after
    for name, value in weights(export(tmp_path / "whole")).items():
        assert torch.equal(weights(tmp_path / "whole-export")[name], value)
    assert difference(weights(export(tmp_path / "broken")), weights(tmp_path / "whole-export")) == 0
    files = checkpoint_dir(tmp_path / "whole", 4) / "deepspeed"
    [model_states] = files.glob("*model_states.pt")
    state = torch.load(model_states, weights_only=False)
    assert not [name for name in state["module"] if ".lora_" not in name]
    assert not state.get("frozen_param_fragments")


def test_the_exported_adapter_is_pefts_and_one_of_our_teachers(tiny, tmp_path):
    run_dir = tmp_path / "run"
    train(tmp_path, lora_tree(tiny, run_dir, learner={"lr": 0.05}))
    merged, adapter = export(run_dir), export(run_dir, "--adapter")
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.student), adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny.student)
    model = AutoModelForCausalLM.from_pretrained(merged)
    for rollout in rollouts():
        torch.testing.assert_close(exact(wrapped, rollout), exact(model, rollout), atol=2e-5, rtol=0)
    assert difference(weights(tiny.student), model.state_dict()) > 0.01
    second = tiny.tree(tmp_path / "second", steps=1, teachers={"expert": {"path": str(adapter)}})
    assert "scoring by expert: lora" in train(tmp_path, second)
    assert main(["export", str(tmp_path / "second"), "--adapter"]) == 2


def test_the_adapter_is_drawn_from_the_seed(tiny, tmp_path):
    """B is zero at first, so that the reference is the student; A follows from the seed and nothing else."""
    drawn = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tree = lora_tree(tiny, tmp_path / name, seed=seed)
        [drawn[name]] = on_learner(parameters_of, tree, tmp_path / f"{name}-rank")
    a, b, c = drawn["a"], drawn["b"], drawn["c"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not a[name].any() for name in a if ".lora_B." in name)
    assert all(not torch.equal(a[name], c[name]) for name in a if ".lora_A." in name)


def parameters_of(learner, world, config, inputs):
    return {name: p.detach().clone() for name, p in learner.lm.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["q_proj", "up_prj"],
         "target_modules: up_prj: no layer of the student has this name; give all-linear or some of down_proj, "
         "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; did you mean up_proj"),
        (["embed_tokens"], "embed_tokens: is no linear layer of the decoder"),
        (["lm_head"], "lm_head: is no linear layer of the decoder"),
        (["mlp"], "mlp: is no linear layer of the decoder"),
    ],
)  # fmt: skip
def test_targets_that_are_no_linear_layers_are_refused_before_weights_are_read(tiny, tmp_path, targets, problem):
    config = validate(lora_tree(tiny, tmp_path, {"lora": {**LORA, "target_modules": targets}}), Config)
    with pytest.raises(UserError) as refusal:
        check_targets(config)
    assert problem in str(refusal.value)


def test_named_targets_alone_get_an_adapter(tiny, tmp_path):
    targets = ["self_attn.q_proj", "down_proj"]
    tree = lora_tree(tiny, tmp_path / "run", {"lora": {**LORA, "target_modules": targets}}, learner={"lr": 0.05})
    train(tmp_path, tree)
    start, after = weights(tiny.student), weights(export(tmp_path / "run"))
    moved = {name.split(".", 3)[3] for name in start if not torch.equal(start[name], after[name])}
    assert moved == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    adapter = export(tmp_path / "run", "--adapter")
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.student), adapter)
    assert difference(after, wrapped.merge_and_unload().state_dict()) < 1e-6


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"dropout": 0.1}, "model.lora.dropout=0.1: with dropout the learner's logprobs"),
        ({"target_modules": []}, "model.lora.target_modules=[]: names no layer"),
        ({"rank": 0}, "model.lora.rank"),
        ({"r": 8}, "model.lora.r"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny, tmp_path, lora, problem):
    with pytest.raises(UserError) as refusal:
        validate(lora_tree(tiny, tmp_path, {"lora": lora}), Config)
    assert problem in str(refusal.value)


def test_evaluation_takes_no_adapter_section(tiny):
    tree = {"model": {"path": str(tiny.student), "lora": LORA}, "data": {"train": [{"path": str(tiny.prompts)}]}}
    with pytest.raises(UserError, match=r"model\.lora: is for training"):
        validate(tree, EvalRunConfig)


def test_without_peft_the_run_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tcopd_fast.config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.lora: needs the package peft"):
        validate(lora_tree(tiny, tmp_path), Config)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm")
def test_vllm_samples_from_the_merged_weights(tiny, tmp_path):
    """After steps large enough to matter the sampler's logprobs are still the learner's: exp(their difference) is 1."""
    vllm = {"engine": "vllm", "vllm": {"kv_cache_memory_bytes": 1 << 25}}
    run_dir = tmp_path / "run"
    tree = lora_tree(tiny, run_dir, steps=3, learner={"lr": 0.05}, rollout=vllm)
    run(["--config", str(write_config(tmp_path / "run.yaml", tree))])
    assert difference(weights(tiny.student), weights(export(run_dir))) > 0.01
    for row in lines(run_dir / "metrics.jsonl"):
        assert row["loss/mismatch_weight_mean"] == pytest.approx(1, abs=1e-5)
