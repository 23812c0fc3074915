"""The miniature: task, tokenizer, shipped checkpoints, and a build that repeats itself bit for bit."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tcopd_fast import miniature
from tcopd_fast.errors import UserError
from tcopd_fast.miniature import asset, task, training
from tcopd_fast.miniature import build as builder
from tcopd_fast.miniature.tokenizer import VOCABULARY

MODELS = ("base", "expert", "anti_expert")
TINY = builder.Recipe(
    train_problems=16, heldout_problems=8, measure_samples=2, batch=8, base_steps=3, expert_steps=1,
    expert_prompts=2, expert_group=2, anti_expert_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset("base"))


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(asset(name), dtype=torch.float32) for name in MODELS}


@pytest.fixture()
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_worked_examples_of_both_domains():
    assert task.response_to("M:47+38-19+12", show_work=True) == r"85;66;78;\boxed{78}"
    assert task.response_to("M:47+38-19+12", show_work=False) == r"\boxed{78}"
    assert task.response_to("L:47+38-19+52", show_work=True) == r"47;47;52;\boxed{52}"


@given(st.sampled_from(task.DOMAINS), st.integers(0, 2**32))
def test_math_is_what_python_computes_and_totals_have_two_digits(domain, seed):
    problem = next(task.problem_stream(domain, seed))
    chain = task.chain_of(problem)
    numbers = [int(n) for n in chain.replace("-", "+").split("+")]
    expected = eval(chain) if domain == "math" else max(numbers)  # digits and signs of our own making
    assert task.answer_of(problem) == str(expected)
    assert all(10 <= value <= 99 for value in task.running_values(problem))


def test_correctness_looks_at_the_last_boxed_number():
    assert task.is_correct(r"85;\boxed{11};\boxed{78}", "78")
    assert not task.is_correct(r"\boxed{78}\boxed{11}", "78")
    assert not task.is_correct("78", "78")


@pytest.mark.parametrize("bad", ["M:47+38-19", "X:47+38-19+12", "M:47+38-19+12="])
def test_a_malformed_problem_is_named(bad):
    with pytest.raises(ValueError, match="is not of the form"):
        task.answer_of(bad)


def test_tokenizer_round_trip(tokenizer):
    text = r"M:47+38-19+12=85;66;78;\boxed{78}<eos>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<eos>")
    assert tokenizer.unk_token_id not in ids


@given(st.lists(st.sampled_from(VOCABULARY[3:])))
def test_any_token_sequence_survives_decode_and_encode(tokens):
    tokenizer = builder.make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_chat_template(tokenizer):
    user = {"role": "user", "content": "M:47+38-19+12"}
    text = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert text == "M:47+38-19+12="
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert prompt == tokenizer.encode("M:47+38-19+12=")
    whole = [user, {"role": "assistant", "content": r"\boxed{78}"}]
    assert tokenizer.apply_chat_template(whole, tokenize=False) == r"M:47+38-19+12=\boxed{78}<eos>"


def test_shipped_problem_files_are_disjoint_by_chain_and_correct():
    files = {name: task.read_problems(asset(name)) for name in ("train", "train_largest", "heldout", "heldout_largest")}
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 4096,
        "train_largest": 4096,
        "heldout": 512,
        "heldout_largest": 512,
    }
    chains = [task.chain_of(p.problem) for problems in files.values() for p in problems]
    assert len(set(chains)) == len(chains)
    assert all(p.answer == task.answer_of(p.problem) for problems in files.values() for p in problems)
    assert {p.domain for p in files["train"] + files["heldout"]} == {"math"}
    assert {p.domain for p in files["train_largest"] + files["heldout_largest"]} == {"largest"}


def test_the_builder_writes_the_shipped_problem_files(tmp_path):
    builder.write_problem_files(tmp_path, 0, builder.Recipe())
    for file in tmp_path.iterdir():
        assert file.read_bytes() == asset(file.stem).read_bytes(), file.name
    assert len(list(tmp_path.iterdir())) == 4


def test_one_checkpoint_has_two_names():
    assert asset("largest_expert") == asset("anti_expert")


def drawn_in_training(train, heldout_chains, monkeypatch):
    """Return the chains that one training stage feeds to its optimizer in its first 20 batches."""
    seen = []

    def record(model, tokenizer, next_batch, **kwargs):
        for item in (item for _ in range(20) for item in next_batch()):
            seen.append(task.chain_of(item if isinstance(item, str) else item.problem))

    monkeypatch.setattr(builder, "supervised_fine_tune", record)
    monkeypatch.setattr(builder, "grpo", record)
    train(None, None, builder.Recipe(), 0, heldout_chains, print)
    return set(seen)


@pytest.mark.parametrize("stage", ["train_base", "train_expert", "train_anti_expert"])
def test_no_training_stage_draws_a_heldout_chain(stage, monkeypatch):
    train = getattr(builder, stage)
    unrestricted = drawn_in_training(train, frozenset(), monkeypatch)
    heldout_chains = frozenset(islice(sorted(unrestricted), 200))
    assert not drawn_in_training(train, heldout_chains, monkeypatch) & heldout_chains


def test_the_build_hands_every_heldout_chain_to_every_stage(tmp_path, monkeypatch):
    handed = []
    for stage in ("train_base", "train_expert", "train_anti_expert"):
        monkeypatch.setattr(builder, stage, lambda *args: handed.append(set(args[4])))
    builder.build(tmp_path, recipe=TINY, progress=lambda line: None)
    files = [task.read_problems(tmp_path / name) for name in ("heldout.jsonl", "heldout_largest.jsonl")]
    heldout = {task.chain_of(p.problem) for problems in files for p in problems}
    assert len(heldout) == 2 * TINY.heldout_problems and handed == [heldout] * 3


def test_missing_and_unknown_assets_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean anti_expert"):
        asset("antiexpert")
    monkeypatch.setattr(miniature, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="tcopd miniature build"):
        asset("base")


def test_checkpoints_are_small_tied_and_share_shape(models, tokenizer):
    for name, model in models.items():
        assert sum(f.stat().st_size for f in asset(name).rglob("*") if f.is_file()) < 5e6
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert sum(p.numel() for p in model.parameters()) < 400_000
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    states = [model.state_dict() for model in models.values()]
    assert all(s[k].shape == states[0][k].shape for s in states for k in states[0])


def test_own_sampler_agrees_with_transformers_greedy(models, tokenizer):
    problems = [p.problem for p in task.read_problems(asset("heldout"))[:16]]
    prompts_BP = training.prompt_ids(tokenizer, problems)
    ours = training.generate(models["expert"], prompts_BP, temperature=0)
    theirs = models["expert"].generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP), do_sample=False)
    assert torch.equal(ours, theirs[:, prompts_BP.shape[1] :])


def test_base_lies_between_anti_expert_and_expert_on_heldout_math(models, tokenizer):
    problems = task.read_problems(asset("heldout"))[:128]
    measured = (training.measure(models[name], tokenizer, problems, samples=4) for name in MODELS)
    base, expert, anti = (m.accuracy for m in measured)
    assert anti < 0.1 < base < expert < 0.8


def test_anti_expert_is_better_than_base_on_its_own_domain(models, tokenizer):
    problems = task.read_problems(asset("heldout_largest"))[:128]
    base, anti = (training.measure(models[name], tokenizer, problems).accuracy for name in ("base", "anti_expert"))
    assert anti > base + 0.1


def test_a_tiny_build_repeats_bit_for_bit(tmp_path):
    reports = [builder.build(tmp_path / run, recipe=TINY, progress=lambda line: None) for run in ("a", "b")]
    written = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file())
    assert {str(f) for f in written} >= {f"{name}/model.safetensors" for name in MODELS}
    for path in written:
        if path.name != "build_report.json":
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    assert reports[0]["heldout"] == reports[1]["heldout"]
    assert json.loads((tmp_path / "a" / "build_report.json").read_text()) == reports[0]


def test_seed_changes_the_build(tmp_path):
    for seed in (0, 1):
        builder.build(tmp_path / str(seed), seed=seed, recipe=TINY, progress=lambda line: None)
    for name in ("base/model.safetensors", "train.jsonl", "train_largest.jsonl", "heldout.jsonl"):
        assert (tmp_path / "0" / name).read_bytes() != (tmp_path / "1" / name).read_bytes()


def test_grpo_repeats_bit_for_bit_and_moves_the_weights(models, tokenizer, one_thread):
    def weights_after_one_step():
        model = AutoModelForCausalLM.from_pretrained(asset("base"), dtype=torch.float32)
        builder.train_expert(
            model, tokenizer, builder.Recipe(expert_steps=1), 0, frozenset(), progress=lambda line: None
        )
        return model.state_dict()

    first, second, start = weights_after_one_step(), weights_after_one_step(), models["base"].state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], start[k]) for k in first)
