"""`tcopd plan`: placements, recommendations, refusals, and the tables made from its results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tcopd_fast import cli
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config, validate
from tcopd_fast.errors import UserError
from tcopd_fast.plan.build import make_plan
from tcopd_fast.plan.devices import GB, GPUS, Cluster, parse_bytes, speed_of
from tcopd_fast.plan.memory import FRAGMENTATION, memory_of
from tcopd_fast.plan.recommend import place
from tcopd_fast.plan.report import plan_text, yaml_lines
from tcopd_fast.plan.timing import break_even, scoring_cost
from tcopd_fast.plan.workload import frozen_models, shapes_of, workload_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import plan_report  # noqa: E402

HUGE = 10**15


@pytest.fixture
def parts(tiny, tmp_path):
    """(config, student, frozen, work): vocabulary and widths of a test, placements free."""
    config = validate(tiny.tree(tmp_path / "run"), Config)
    shapes = shapes_of(config, {})
    return config, shapes[config.model.path], frozen_models(config, shapes), workload_of(config, 2)


def test_frozen_models_are_the_distinct_checkpoints_that_are_needed(tiny, tmp_path):
    def roles(count=None, **sections):
        config = validate(tiny.tree(tmp_path / "run", **sections), Config)
        return [model.roles for model in frozen_models(config, shapes_of(config, {}), count)]

    assert roles() == [("reference",), ("expert",), ("anti",)]
    assert roles(objective={"lambdas": {"expert": 1.5, "anti": 0.0}}) == [("reference",), ("expert",)]
    assert roles(teachers={"expert": {"path": str(tiny.student)}}) == [("reference", "expert"), ("anti",)]
    assert roles(scoring={"skip_unused_reference": True}, objective={"lambdas": {"expert": 1.5, "anti": 0.5}}) == [
        ("expert",),
        ("anti",),
    ]
    assert roles(4) == [("reference",), ("expert",), ("anti",), ("expert#2",), ("anti#2",)]
    assert roles(1) == [("reference",), ("expert",)]


def test_placements_cost_what_they_hold(parts):
    config, student, frozen, work = parts

    def held(placement):
        models = [replace(model, placement=placement) for model in frozen]
        return memory_of(config, student, models, work, Cluster(2, HUGE))

    size = frozen[0].nbytes
    resident, sharded, offload = held("resident"), held("sharded"), held("offload")
    assert resident.always - sharded.always == len(frozen) * (size - -(-size // 2 // 4) * 4)
    assert resident.always - offload.always == len(frozen) * size
    # Each of two ranks pins every model, every tensor rounded up to a power of two.
    assert 2 * len(frozen) * size <= offload.host_total <= 4 * len(frozen) * size
    assert held("server").always == resident.always - len(frozen) * size
    assert resident.peak == int(resident.stage_peak(resident.fullest) * (1 + FRAGMENTATION)) + resident.reserve


def test_recommendation_goes_from_resident_over_sharded_to_offload(parts):
    config, student, frozen, work = parts

    def kinds(memory, ranks=2):
        placed = place(config, student, frozen, work, Cluster(ranks, memory))
        return [model.placement for model in placed.frozen], placed

    best, placed = kinds(HUGE)
    assert best == ["resident"] * 3 and placed.fits
    peaks = {}
    for step in range(6):
        found, placed = kinds(placed.memory.peak - 1)
        if not placed.fits:
            break
        peaks[step] = placed.memory.peak
        # Never offloaded before every model is sharded, the last model first.
        if "offload" in found:
            assert "resident" not in found
        assert found == sorted(found, key=["offload", "sharded", "resident"].index, reverse=True)
    assert peaks and list(peaks.values()) == sorted(peaks.values(), reverse=True)
    assert kinds(1)[1].why is not None and kinds(1)[0] == ["offload"] * 3
    one_rank = place(config, student, frozen, work, Cluster(1, HUGE))
    alone, _ = kinds(one_rank.memory.peak - 1, ranks=1)
    assert "sharded" not in alone


def test_given_placements_are_kept_and_a_base_follows_its_teacher(tiny, tmp_path):
    tree = tiny.tree(tmp_path / "run")
    tree["teachers"] = {
        "expert": {"path": str(tiny.expert), "base": str(tiny.padded)},
        "anti": {"path": str(tiny.anti), "placement": "offload"},
    }
    config = validate(tree, Config)
    shapes = shapes_of(config, {})
    frozen, work = frozen_models(config, shapes), workload_of(config, 2)
    placed = place(config, shapes[config.model.path], frozen, work, Cluster(2, HUGE))
    found = {model.roles[0]: model.placement for model in placed.frozen}
    assert found == {"reference": "resident", "expert": "resident", "expert.base": "resident", "anti": "offload"}
    tight = place(config, shapes[config.model.path], frozen, work, Cluster(2, 1))
    found = {model.roles[0]: model.placement for model in tight.frozen}
    assert found["expert"] == found["expert.base"] == "offload"


def test_an_adapter_takes_its_factors_and_a_base_that_is_not_sharded(tiny, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 4}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(128, 4)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = validate(tiny.tree(tmp_path / "run", teachers={"expert": {"path": str(adapter)}}), Config)
    shapes = shapes_of(config, {})
    frozen, work = frozen_models(config, shapes), workload_of(config, 2)
    assert [model.placement for model in frozen] == [None, "lora", None]
    assert frozen[1].nbytes == sum(t.nbytes for t in factors.values()) and not frozen[0].shardable
    student = shapes[config.model.path]
    best = place(config, student, frozen, work, Cluster(2, HUGE))
    assert best.memory.held["expert: factors"] == frozen[1].nbytes
    for _ in range(4):
        best = place(config, student, frozen, work, Cluster(2, best.memory.peak - 1))
        assert best.frozen[0].placement in ("resident", "offload") and best.frozen[1].placement == "lora"
    # Of another base than the reference a copy is loaded.
    tree = tiny.tree(tmp_path / "run", teachers={"expert": {"path": str(adapter), "delta_base": str(tiny.anti)}})
    del tree["teachers"]["anti"], tree["objective"]["lambdas"]["anti"]
    config = validate(tree, Config)
    roles = [model.roles for model in frozen_models(config, shapes_of(config, {}))]
    assert roles == [("reference",), ("base of adapters",), ("expert",)]


def test_host_memory_can_forbid_offload(parts):
    config, student, frozen, work = parts
    frozen = [replace(model, placement="offload") for model in frozen]
    placed = place(config, student, frozen, work, Cluster(2, HUGE, host_memory=1000))
    assert not placed.fits and "pinned host memory" in placed.why


def qwen_plan(*overrides, memory=80 * GB, ranks=8, **options):
    config = load_config(ROOT / "configs" / "qwen3_4b_math.yaml", overrides, installed=False)
    folders = {"": str(ROOT / "bench" / "shapes" / "qwen3_4b")}
    return make_plan(config, Cluster(ranks, memory), GPUS["h100"], folders=folders, response=2048.0, **options)


def test_remedies_fit_and_are_valid_overrides():
    plan = qwen_plan("model.gradient_checkpointing=false")
    assert not plan.placed.fits and plan.remedies
    assert all(remedy.placed.fits and remedy.placed.memory.peak <= 80 * GB for remedy in plan.remedies)
    first = plan.remedies[0]
    again = qwen_plan("model.gradient_checkpointing=false", *first.overrides)
    assert again.config == first.config and again.placed.fits
    text = plan_text(plan, "c.yaml", "h100")
    assert "It does not fit" in text and "model.gradient_checkpointing=true" in text


def test_vllm_takes_its_share_and_needs_enough_of_it():
    share = "rollout.vllm.gpu_memory_utilization=0.3"
    asleep, awake = qwen_plan(share).placed.memory, qwen_plan(share, "rollout.vllm.sleep=false").placed.memory
    assert awake.held["vLLM"] == asleep.stages["rollout"]["vLLM"] == asleep.stages["weight_sync"]["vLLM"] == 24 * GB
    assert "vLLM" not in asleep.held and awake.peak > asleep.peak
    apart = qwen_plan(share, "rollout.vllm.mode=server").placed.memory
    assert "vLLM" not in apart.held and "vLLM" not in apart.stages["rollout"]
    small = qwen_plan("rollout.vllm.gpu_memory_utilization=0.1")
    assert "do not hold its weights" in small.placed.why
    assert any("rollout.vllm.gpu_memory_utilization=0.2" in remedy.overrides for remedy in small.remedies)


def test_teachers_that_stream_are_bound_by_compute_from_the_break_even_on():
    plan = qwen_plan("scoring.placement=offload")
    model, speed, work = plan.placed.frozen[0], plan.speed, plan.work
    even = break_even(2, speed, speed.pcie)
    # Attention and the head add to the computing, so the crossing lies below 2 FLOP per weight and token.
    plenty = replace(work, sequences=1, prompt=1.0, response=2.0 * even, trip_budget=4 * even)
    scarce = replace(work, sequences=1, prompt=1.0, response=even / 4)
    assert scoring_cost(model, plenty, plan.cluster, speed).bound == "compute"
    assert scoring_cost(model, scarce, plan.cluster, speed).bound == "pcie"
    faster = replace(speed, pcie=2 * speed.pcie)
    assert break_even(2, faster, faster.pcie) == pytest.approx(even / 2, abs=1)


def test_qwen3_4b_is_what_its_name_says():
    plan = qwen_plan(teachers=8)
    assert plan.student.weights == 4_022_468_096
    assert len(plan.placed.frozen) == 9 and plan.placed.fits
    assert plan.resident_logits > plan.placed.memory.peak
    more = qwen_plan("scoring.placement=resident", teachers=3).placed.memory.always
    assert more - qwen_plan("scoring.placement=resident", teachers=2).placed.memory.always == 2 * plan.student.weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu-memory", "eighty"], "--gpu-memory eighty: not a size of memory"),
        (["--gpu-memory", "80"], "--gpu-memory 80: not a size of memory"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB"),
        (["--host-memory", "much"], "--host-memory much"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--mfu", "2"], "--mfu 2: must be above 0 and at most 1"),
        (["--pcie", "-1"], "--pcie -1: must be above 0"),
        (["--teachers", "0"], "--teachers 0: must be at least 1"),
        (
            ["--mean-response-tokens", "99"],
            "--mean-response-tokens 99: must lie between 1 and rollout.max_new_tokens=12",
        ),
        (["--shape", "nobody=."], "no such model; give one of student, "),
        (["--shape", "/nowhere"], "--shape /nowhere: no config.json there"),
        (["--gpus", "9"], "rollout.prompts_per_step=8: fewer than the 9 ranks"),
        (["model.path=/nowhere"], "--shape student=FOLDER"),
        (["learner.zero_stag=2"], "did you mean zero_stage?"),
    ],
)
def test_refusals_are_one_message(tiny, tmp_path, capsys, words, message):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny.tree(tmp_path / "run")))
    assert cli.main(["plan", str(config), "--gpus", "1", "--gpu-memory", "80GB", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_sizes_and_speeds_are_read():
    assert parse_bytes("80GB", "x") == 80 * 10**9 and parse_bytes("1.5 GiB", "x") == 3 * 2**29
    assert speed_of("A100", pcie=10.0).pcie == 10.0 and speed_of("a100") == GPUS["a100"]
    with pytest.raises(UserError, match="no such preset"):
        speed_of("abacus")


def test_command_prints_a_prediction_and_placements_that_can_be_pasted(tiny, tmp_path, capsys):
    tree = tiny.tree(tmp_path / "run")
    config, out = tmp_path / "c.yaml", tmp_path / "out" / "plan.json"
    config.write_text(yaml.safe_dump(tree))
    words = [
        "plan",
        str(config),
        "--gpus",
        "2",
        "--gpu-memory",
        "24GiB",
        "--json",
        str(out),
        "rollout.max_new_tokens=8",
    ]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION") and "Nothing was run" in text
    pasted = yaml.safe_load(text[text.index("scoring: {") :])
    for section, values in pasted.items():
        for name, value in values.items():
            tree[section] = {
                **tree.get(section, {}),
                name: value if section == "scoring" else tree[section][name] | value,
            }
    assert validate(tree, Config).scoring.placement == "resident"
    written = json.loads(out.read_text())
    assert written["prediction"] and written["fits"] and written["work"]["response_tokens"] == 8
    peaks = written["memory"]["stage_peak_bytes"]
    assert max(peaks, key=peaks.get) == written["memory"]["fullest"]
    assert cli.main(["plan", str(config), "--gpus", "2", "--gpu-memory", "1MB"]) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_a_configured_reference_gets_a_line_of_its_own(tiny, tmp_path):
    config = validate({**tiny.tree(tmp_path / "run"), "reference": {"path": str(tiny.anti)}}, Config)
    frozen = [replace(m, placement="offload") for m in frozen_models(config, shapes_of(config, {}))]
    assert yaml_lines(config, frozen)[0] == "reference: {placement: offload}"


def test_documents_hold_the_tables_of_the_results():
    found = plan_report.all_blocks()
    assert all(set(blocks) == {"plan-check", "plan-qwen3"} for blocks in found.values())
    for file, blocks in found.items():
        text = file.read_text(encoding="utf-8")
        for name, block in blocks.items():
            assert plan_report.replace_block(text, name, block) == text, f"{file.name}: {name} is out of date"


def test_block_needs_its_markers():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert plan_report.replace_block(text, "x", r"new \1") == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="x:begin"):
        plan_report.replace_block("nothing", "x", "new")
