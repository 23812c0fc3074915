"""`tcopd plan`: sizes, ZeRO's shares, activations, recommendations, refusals, and the tables made from its results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from tcopd_fast import cli
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config, validate
from tcopd_fast.config_sections import LoraConfig
from tcopd_fast.errors import UserError
from tcopd_fast.packing import PACKED_SDPA, pack
from tcopd_fast.plan import activations
from tcopd_fast.plan.activations import LiveBytes, forward_bytes, learn_bytes
from tcopd_fast.plan.build import make_plan
from tcopd_fast.plan.devices import GB, GPUS, Cluster, parse_bytes, speed_of
from tcopd_fast.plan.head import HeadBytes, chunk_rows, head_bytes
from tcopd_fast.plan.memory import FRAGMENTATION, memory_of
from tcopd_fast.plan.recommend import place
from tcopd_fast.plan.report import plan_text, yaml_lines
from tcopd_fast.plan.shapes import shape_of, student_shape
from tcopd_fast.plan.timing import break_even, forward_flops, scoring_cost
from tcopd_fast.plan.workload import frozen_models, shapes_of, workload_of
from tcopd_fast.plan.zero import BUCKET, sharded_bytes, zero_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import plan_report  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "qwen3-untied": Qwen3Config(**SMALL, tie_word_embeddings=False),
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "mistral": MistralConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL),
}
NO_HEAD = HeadBytes(0, 4)
HUGE = 10**15


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_real_model(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    shape = shape_of(CONFIGS[name])
    assert shape.weights == sum(p.numel() for p in model.parameters())
    assert shape.layer == max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert shape.multiplied == sum(p.numel() for p in model.parameters() if id(p) not in outside)
    assert shape.kv_bytes_per_token(2) == 2 * 3 * 2 * 16 * 2


def test_flops_are_those_that_torch_counts():
    """Without attention, of which torch counts the masked half too; norms and biases, which are no products, are in."""
    config, tokens = CONFIGS["llama"], 32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    assert forward_flops(shape_of(config), tokens, tokens, 0) == pytest.approx(products, rel=0.02)


def test_counted_activations_are_those_of_the_packed_forward():
    """The same count on real tensors, with the attention function that runs use, for sequences of one length."""
    config, tokens, count = CONFIGS["qwen3"], 64, 4
    packed = pack([[1]] * count, [list(range(2, tokens + 2))] * count)

    def saved_and_peak(attention: str) -> tuple[int, int]:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with LiveBytes(model) as counter:
            hidden = model.get_decoder()(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                use_cache=False,
                cu_seq_lens_q=packed.cu_seqlens,
                cu_seq_lens_k=packed.cu_seqlens,
                max_length_q=packed.max_seqlen,
                max_length_k=packed.max_seqlen,
            ).last_hidden_state
            saved = counter.live
            hidden.sum().backward()
        return saved, counter.peak

    one_length = saved_and_peak(activations.ONE_LENGTH_SDPA)
    # The packed form keeps the places of real tokens besides: integers, 8 bytes or less per token.
    assert saved_and_peak(PACKED_SDPA) == pytest.approx(one_length, rel=0.03)


def test_activations_grow_with_tokens_and_layers_and_shrink_with_checkpointing():
    shape = shape_of(CONFIGS["qwen3"])

    def learn(tokens, checkpointing=False, kept=0, shape=shape):
        return learn_bytes(
            shape, "float32", tokens, tokens, checkpointing=checkpointing, head=NO_HEAD, kept_per_gradient=kept
        )

    few, many = learn(256), learn(512)
    deeper = learn(512, shape=shape_of(Qwen3Config(**{**SMALL, "num_hidden_layers": 6}, tie_word_embeddings=True)))
    assert many.saved == pytest.approx(2 * few.saved, rel=0.05) and many.forward >= many.saved
    assert deeper.saved > 1.8 * many.saved
    short = learn(512, checkpointing=True)
    assert short.saved < many.saved / 4 and short.backward < many.backward
    # A float32 gradient that stays for every weight shows once the activations are gone.
    assert learn(8, kept=4).backward >= 4 * shape.weights
    assert forward_bytes(shape, "float32", 512, 512) < short.backward


def test_the_loss_keeps_the_gradients_of_the_head():
    shape = shape_of(CONFIGS["qwen3-untied"])
    without = learn_bytes(shape, "bfloat16", 64, 1, checkpointing=False, head=NO_HEAD, kept_per_gradient=0)
    with_tile = learn_bytes(
        shape, "bfloat16", 64, 1, checkpointing=False, head=HeadBytes(10**6, 4), kept_per_gradient=0
    )
    assert without.saved == with_tile.saved and without.forward < with_tile.forward
    assert with_tile.forward - with_tile.saved >= 10**6


def test_head_workspaces_are_those_of_the_backends():
    triton_loss = pytest.importorskip("tcopd_kernels._triton_loss")
    from tcopd_kernels._torch_grads import Needs
    from tcopd_kernels._torch_loss import TorchChunks

    for predicted in (1, 700, 1024, 5000, 20000):
        for vocab, itemsize in ((151936, 2), (32000, 4), (1000, 2)):
            assert chunk_rows(predicted, vocab, itemsize) == triton_loss.chunk_rows(predicted, vocab, itemsize)
    hidden, weight = torch.zeros(1500, 32), torch.zeros(4000, 32)
    chunks = TorchChunks(
        hidden, weight, torch.zeros(1500, dtype=torch.int64), bias=None, temperature=1.0, softcap=None, entropy=True,
        needs=Needs(True, True, False), scale=None,
    )  # fmt: skip
    used = chunks.buffer.nbytes + chunks.scratch.nbytes
    assert head_bytes(1500, 4000, 32, torch.float32, on_cpu=True) == HeadBytes(used, 4)
    assert head_bytes(20000, 151936, 2560, torch.bfloat16, on_cpu=False).accumulator == 4
    assert head_bytes(500, 151936, 2560, torch.bfloat16, on_cpu=False).accumulator == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_zero_divides_what_its_stage_says(stage, itemsize):
    shape = shape_of(Qwen3Config(**{**SMALL, "hidden_size": 512, "vocab_size": 4096}, tie_word_embeddings=True))
    held = {
        ranks: zero_bytes(shape, stage, itemsize, ranks, accumulating=True, on_cpu=False).held for ranks in (1, 2, 8)
    }
    for ranks in (2, 8):
        for name in ("float32 weights", "Adam moments"):
            assert held[ranks][name] == pytest.approx(held[1][name] / ranks, rel=1e-3)
    persistent = sum(n for n in shape.tensors if n <= 100_000) * itemsize
    expected = shape.weights * itemsize / 8 + persistent if stage == 3 else shape.weights * itemsize
    assert held[8]["weights"] == pytest.approx(expected, rel=1e-3)
    # DeepSpeed's bfloat16 optimizer of stage 1 keeps every gradient in float32.
    if (stage, itemsize) == (1, 2):
        assert held[8]["gradients"] == 4 * shape.weights
    if stage == 3:
        assert held[8]["reduction bucket"] == 4 * BUCKET
        assert held[8]["gradients"] == pytest.approx(4 * shape.weights / 8, rel=1e-3)
    share, gathered = sharded_bytes(shape, itemsize, 8)
    assert share == pytest.approx(shape.weights * itemsize / 8, rel=1e-3)
    assert gathered == (shape.weights + shape.largest) * itemsize and sharded_bytes(shape, itemsize, 1)[1] == 0


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
    assert held[0] - held[1] >= 12 * weights
    assert after.placed.memory.host_total >= 16 * weights, "gradients are there, too"
    assert f"offload {offload}" in plan_text(after, "c", "h100")
    on_cpu = zero_bytes(before.student, stage, 4, 1, accumulating=True, on_cpu=True, offload=offload)
    assert on_cpu == zero_bytes(before.student, stage, 4, 1, accumulating=True, on_cpu=True)


def test_an_adapter_on_targets_that_are_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: q_prj: no layer of the student has this name"):
        lora_plan(tmp_path, model={"lora.rank": 16, "lora.target_modules": "[q_prj]"})
