"""`tcopd plan` for LoRA students and for an offloaded optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_plan_sizes import CONFIGS
from transformers import AutoModelForCausalLM

from tcopd_fast.config_io import load_config
from tcopd_fast.config_sections import LoraConfig
from tcopd_fast.errors import UserError
from tcopd_fast.plan.build import make_plan
from tcopd_fast.plan.devices import GB, Cluster, speed_of
from tcopd_fast.plan.report import plan_text
from tcopd_fast.plan.shapes import shape_of, student_shape
from tcopd_fast.plan.zero import zero_bytes

ROOT = Path(__file__).resolve().parent.parent
LORA = {"rank": 8, "alpha": 16}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj"]])
def test_an_adapter_has_the_size_that_peft_gives_it(targets):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3-untied"])
    shape = student_shape(shape_of(CONFIGS["qwen3-untied"]), LoraConfig(**LORA, target_modules=targets))
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"), model)
    assert sorted(shape.adapter) == sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.trained == sum(shape.adapter) and shape.weights == shape_of(CONFIGS["qwen3-untied"]).weights


def lora_plan(tmp_path, **sections):
    """A plan for the 4B shape on one GPU of 80 GB; sections are merged into the paper's configuration."""
    overrides = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    config = load_config(str(ROOT / "configs/qwen3_4b_math.yaml"), overrides, installed=False)
    folders = {"": str(ROOT / "bench/shapes/qwen3_4b")}
    return make_plan(config, Cluster(1, 80 * GB), speed_of("h100"), folders=folders, prompt=256, response=1024)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_lora_student_needs_an_optimizer_for_its_adapter_alone_and_shares_its_base(tmp_path, stage):
    pytest.importorskip("peft")
    full = lora_plan(tmp_path, learner={"zero_stage": stage})
    adapter = lora_plan(tmp_path, learner={"zero_stage": stage}, model={"lora.rank": 16})
    held = adapter.placed.memory.held
    trained = adapter.student.trained
    assert trained < adapter.student.weights / 50
    assert held["learner: Adam moments"] == 8 * trained and held["learner: float32 weights"] == 4 * trained
    assert held["learner: weights"] >= 2 * adapter.student.weights
    assert adapter.placed.memory.peak < full.placed.memory.peak - 12 * (full.student.weights - 2 * trained) / 2
    reference = next(m for m in adapter.placed.frozen if "reference" in m.roles)
    assert (reference.placement == "student") == (stage < 3)
    assert ("reference: weights" in held) == (stage == 3 and reference.placement == "resident")
    assert adapter.costs["learner"].seconds < full.costs["learner"].seconds
    text = plan_text(adapter, "c", "h100")
    assert f"LoRA adapter of {trained / 1e6:,.1f} million weights" in text


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer_and_weights")]
)
def test_offload_moves_the_optimizer_to_the_host(tmp_path, stage, offload):
    before = lora_plan(tmp_path, learner={"zero_stage": stage})
    after = lora_plan(tmp_path, learner={"zero_stage": stage, "offload": offload})
    weights = before.student.weights
    moved = {name for name in before.placed.memory.held if name not in after.placed.memory.held}
    assert {"learner: Adam moments", "learner: float32 weights"} <= moved
    assert ("learner: weights" in moved) == (offload == "optimizer_and_weights")
    assert after.placed.memory.host["learner: Adam moments"] == 8 * weights
    held = [
        sum(size for name, size in p.placed.memory.held.items() if name.startswith("learner")) for p in (before, after)
    ]
    assert held[0] - held[1] >= 12 * weights - after.placed.memory.held.get("learner: staging", 0)
    assert after.placed.memory.host_total >= 16 * weights, "gradients are there, too"
    assert f"offload {offload}" in plan_text(after, "c", "h100")
    apart, one = (
        zero_bytes(before.student, stage, 4, 1, accumulating=True, on_cpu=on_cpu, offload=offload)
        for on_cpu in (False, True)
    )
    assert sum(one.held.values()) == sum(apart.held.values()) + sum(apart.host.values()) and not one.host


def test_an_adapter_on_targets_that_are_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: q_prj: no layer of the student has this name"):
        lora_plan(tmp_path, model={"lora.rank": 16, "lora.target_modules": "[q_prj]"})
