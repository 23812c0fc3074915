"""LoRA adapter folders as teachers: peft's numbers, one base for all of them, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from running import lines, run, write_config
from safetensors.torch import load_file, save_file
from test_models import WORLD, config_for, exact, rollouts
from tiny import CHARACTERS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models
from tcopd_fast.scoring import Scorer, delta, placement
from tcopd_fast.scoring.lora import check_adapters
from tcopd_fast.scoring.weights import MappedWeights

peft = pytest.importorskip("peft")

KINDS = {
    "all linear layers": dict(target_modules="all-linear", r=4, lora_alpha=8),
    "rank-stabilised": dict(target_modules=["q_proj", "down_proj"], r=9, lora_alpha=6, use_rslora=True),
    "patterns": dict(
        target_modules=["q_proj", "v_proj", "up_proj"], r=4, lora_alpha=4,
        rank_pattern={"v_proj": 2, r"layers\.1\..*up_proj": 3}, alpha_pattern={"v_proj": 16, "layers.0.mlp.up_proj": 1},
    ),
}  # fmt: skip


def make_adapter(base, folder, seed=0, model=None, **settings):
    """Save a peft LoRA of the checkpoint `base` whose factors are all random; the model in peft's hands."""
    settings = settings or KINDS["all linear layers"]
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(**settings)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    # Left to itself peft adds whole copies of an embedding or a head that has an adapter.
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.eval()


def teachers(**paths):
    """The section `teachers` with the names that the tiny configuration has λ for."""
    return {name: {"path": str(path)} if not isinstance(path, dict) else path for name, path in paths.items()}


def scored(config, lambdas=None):
    check_adapters(config)
    scorer = Scorer(config, check_models(config), WORLD)
    items = scorer.score(rollouts(), lambdas or [{"expert": 1.5, "anti": -0.5}] * 3)
    return scorer, {name: [item.teacher_logprobs[name] for item in items] for name in items[0].teacher_logprobs}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_scores_as_peft_does_merged_and_unmerged(tiny, tmp_path, kind):
    wrapped = make_adapter(tiny.student, tmp_path / "a", **KINDS[kind])
    config = config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti))
    scorer, found = scored(config)
    assert scorer.models[scorer.roles["expert"]].choice.placement == "lora"
    unmerged = [exact(wrapped, rollout) for rollout in rollouts()]
    merged = wrapped.merge_and_unload()
    for got, rollout, before in zip(found["expert"], rollouts(), unmerged, strict=True):
        torch.testing.assert_close(got.double(), before, atol=2e-5, rtol=0)
        torch.testing.assert_close(got.double(), exact(merged, rollout), atol=2e-5, rtol=0)
        assert (got.double() - exact(make_model(0), rollout)).abs().max() > 0.05, "the adapter must matter"


def test_an_adapter_in_bfloat16_is_as_near_the_truth_as_its_merged_checkpoint(tiny, tmp_path):
    wrapped = make_adapter(tiny.student, tmp_path / "a")
    truth = [exact(wrapped, rollout) for rollout in rollouts((40, 40, 40))]
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    model = {"path": str(tiny.student), "dtype": "bfloat16"}
    config = config_for(tiny, tmp_path, model=model, teachers=teachers(expert=tmp_path / "a", anti=tmp_path / "merged"))
    scorer = Scorer(config, check_models(config), WORLD)
    items = scorer.score(rollouts((40, 40, 40)), [{"expert": 1.5, "anti": -0.5}] * 3)

    def distance(name):
        return torch.cat([(i.teacher_logprobs[name] - t).abs() for i, t in zip(items, truth, strict=True)]).mean()

    assert 0 < distance("expert") < 1.3 * distance("anti")


@pytest.mark.parametrize("place", ["offload", "delta"])
def test_scores_do_not_depend_on_where_the_base_is(tiny, tmp_path, place):
    make_adapter(tiny.student, tmp_path / "a")

    def config(**sections):
        return config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti), **sections)

    scorer, expected = scored(config(scoring={"placement": "resident"}))
    assert ": lora (" in scorer.placements()[2] and "; that is resident: configured)" in scorer.placements()[2]
    if place == "delta":
        delta.make(str(tiny.anti), str(tiny.student), tmp_path / "delta")
        sections = {"reference": {"path": str(tmp_path / "delta"), "delta_base": str(tiny.anti)}}
    else:
        sections = {"scoring": {"placement": "offload", "max_tokens_per_forward": 20, "max_tokens_per_trip": 40}}
    scorer, found = scored(config(**sections))
    assert f"; that is {place}: " in scorer.placements()[2]
    assert all(torch.equal(a, b) for a, b in zip(found["expert"], expected["expert"], strict=True))


def test_many_adapters_share_one_resident_base(tiny, tmp_path, monkeypatch):
    """The base is loaded once and its weights are not touched; the reference scores as without adapters."""
    names = [f"t{i}" for i in range(4)]
    for i, name in enumerate(names):
        make_adapter(tiny.student, tmp_path / name, seed=i)
    loads, opened = [], []
    load = placement.load_causal_lm
    monkeypatch.setattr(placement, "load_causal_lm", lambda path, **o: loads.append(path) or load(path, **o))
    monkeypatch.setattr(MappedWeights, "load", lambda self, names: opened.append(names))
    config = config_for(
        tiny,
        tmp_path,
        teachers=teachers(**{name: tmp_path / name for name in names}),
        objective={"lambdas": dict.fromkeys(names, 1.0)},
    )
    scorer = Scorer(config, check_models(config), WORLD)
    items = scorer.score(rollouts(), [dict.fromkeys(names, 1.0)] * 3)
    assert loads == [str(tiny.student)] and not opened and len(scorer.models) == 5
    for item in items:
        torch.testing.assert_close(item.ref_logprob.double(), exact(make_model(0), item.rollout), atol=2e-5, rtol=0)
        found = list(item.teacher_logprobs.values())
        assert all((a - b).abs().max() > 0.01 for i, a in enumerate(found) for b in found[:i])


def test_a_base_without_a_role_is_loaded_once_for_its_adapters(tiny, tmp_path, monkeypatch):
    wrapped = make_adapter(tiny.anti, tmp_path / "a")
    make_adapter(tiny.anti, tmp_path / "b", seed=1)
    loads = []
    load = placement.load_causal_lm
    monkeypatch.setattr(placement, "load_causal_lm", lambda path, **o: loads.append(path) or load(path, **o))
    on = {"delta_base": str(tiny.anti)}
    pair = {"expert": {"path": str(tmp_path / "a"), **on}, "anti": {"path": str(tmp_path / "b"), **on}}
    scorer, found = scored(config_for(tiny, tmp_path, teachers=pair))
    assert loads == [str(tiny.student), str(tiny.anti)] and len(scorer.models) == 3
    for got, rollout in zip(found["expert"], rollouts(), strict=True):
        torch.testing.assert_close(got.double(), exact(wrapped, rollout), atol=2e-5, rtol=0)


def test_a_base_that_comes_later_in_the_file_is_used(tiny, tmp_path, monkeypatch):
    make_adapter(tiny.anti, tmp_path / "a")
    monkeypatch.setattr(placement, "free_host_memory", lambda ranks: 1 << 40)
    pair = {"expert": {"path": str(tmp_path / "a"), "delta_base": str(tiny.anti)}, "anti": {"path": str(tiny.anti)}}
    scorer, _ = scored(config_for(tiny, tmp_path, teachers=pair))
    assert list(scorer.roles) == ["reference", "expert", "anti"] and len(scorer.models) == 3


def test_copies_of_an_adapter_are_one_model_and_another_base_makes_another(tiny, tmp_path):
    make_adapter(tiny.student, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    scorer, _ = scored(config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tmp_path / "copy")))
    assert len(scorer.models) == 2
    other = {"path": str(tmp_path / "copy"), "delta_base": str(tiny.anti)}
    scorer, found = scored(config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=other)))
    assert len(scorer.models) == 3 and not torch.equal(found["expert"][0], found["anti"][0])
    anti = scorer.models[scorer.roles["anti"]].choice.reason
    assert f"on {tiny.anti}, though adapter_config.json names {tiny.student};" in anti


def test_the_reference_can_be_an_adapter_of_the_student(tiny, tmp_path):
    wrapped = make_adapter(tiny.student, tmp_path / "a")
    config = config_for(tiny, tmp_path, reference={"path": str(tmp_path / "a")})
    check_adapters(config)
    item = Scorer(config, check_models(config), WORLD).score(rollouts((5,)), [{"expert": 1.0}])[0]
    torch.testing.assert_close(item.ref_logprob.double(), exact(wrapped, item.rollout), atol=2e-5, rtol=0)


def test_an_adapter_of_an_untied_head_is_followed(tiny, tmp_path):
    base = tmp_path / "untied"
    make_model(5, tied=False).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    wrapped = make_adapter(base, tmp_path / "a", target_modules=["lm_head", "o_proj"], r=2, lora_alpha=4)
    assert any("lm_head" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    config = config_for(
        tiny, tmp_path, model={"path": str(base)}, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti)
    )
    _, found = scored(config)
    for got, rollout in zip(found["expert"], rollouts(), strict=True):
        torch.testing.assert_close(got.double(), exact(wrapped, rollout), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(target_modules=["q_proj"], use_dora=True), r"use_dora=True in adapter_config.json is not supported"),
        (dict(target_modules=["q_proj"], bias="lora_only"), r"bias='lora_only' in adapter_config.json is not"),
        (dict(target_modules=["q_proj"], lora_bias=True), r"lora_bias=True in"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] in"),
        (dict(target_modules=["q_proj"], init_lora_weights="pissa"), r"init_lora_weights='pissa' in"),
        (dict(target_modules=["embed_tokens"]), r"embed_tokens.lora_embedding_A is no LoRA factor of a linear layer"),
        (dict(target_modules=["lm_head"]), r"lm_head.lora_A.weight is no .*heads tied to them .*, or merge it"),
    ],
)  # fmt: skip
def test_what_is_more_than_plain_lora_is_refused(tiny, tmp_path, settings, expected):
    make_adapter(tiny.student, tmp_path / "a", r=2, **settings)
    config = config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti))
    with pytest.raises(UserError, match=expected):
        check_adapters(config)
    with pytest.raises(UserError, match=expected):
        Scorer(config, check_models(config), WORLD)


def change_settings(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def without_one(folder):
    factors = load_file(folder / "adapter_model.safetensors")
    del factors[next(key for key in factors if "lora_B" in key)]
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (pickled, r"no adapter_model.safetensors there; save it with safetensors"),
        (without_one, r"has .*lora_A.weight but not .*lora_B.weight"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), r"holds no LoRA factors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"short"), r"safetensors cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config.json: is not JSON"),
        (lambda f: change_settings(f, lora_alpha=None), r"no number lora_alpha"),
        (lambda f: change_settings(f, peft_type="LOHA"), r"peft_type='LOHA'"),
        (lambda f: change_settings(f, some_new_variant=True), r"some_new_variant=True"),
    ],
)  # fmt: skip
def test_damaged_and_unknown_adapters_are_refused(tiny, tmp_path, damage, expected):
    make_adapter(tiny.student, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=expected):
        check_adapters(config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti)))


def test_a_base_of_other_shapes_or_other_weights_is_refused(tiny, tmp_path):
    def config(folder, **options):
        return config_for(
            tiny, tmp_path, teachers={"expert": {"path": str(folder), **options}, "anti": {"path": str(tiny.anti)}}
        )

    wide = make_model(1)
    wide.config.intermediate_size = 64
    wide = type(wide)(wide.config)
    make_adapter(None, tmp_path / "wide", model=wide, target_modules=["up_proj"], r=2)
    with pytest.raises(UserError, match=r"up_proj has factors \[64, 2\] and \[2, 32\], but .* is \[48, 32\]"):
        check_adapters(config(tmp_path / "wide"))
    make_adapter(tiny.anti, tmp_path / "a")
    with pytest.raises(UserError, match=rf"names {tiny.anti} as base, which has other weights than {tiny.student};"):
        check_adapters(config(tmp_path / "a"))
    check_adapters(config(tmp_path / "a", delta_base=str(tiny.student)))
    # A path of another machine says nothing: it is told, and the reference is used.
    change_settings(tmp_path / "a", base_model_name_or_path="/home/someone/base")
    scorer, _ = scored(config(tmp_path / "a"))
    assert "though adapter_config.json names /home/someone/base" in scorer.placements()[2]


def test_where_an_adapter_cannot_stand_is_said(tiny, tmp_path):
    make_adapter(tiny.student, tmp_path / "a")
    make_adapter(tiny.student, tmp_path / "b")

    def refused(expected, **sections):
        with pytest.raises(UserError, match=expected):
            config = config_for(tiny, tmp_path, **sections)
            check_models(config)
            check_adapters(config)

    on_adapter = {"path": str(tmp_path / "a"), "delta_base": str(tmp_path / "b")}
    placed = {"path": str(tmp_path / "a"), "placement": "offload"}
    refused(r"model .*/a: is a LoRA adapter, which can only be a teacher", model={"path": str(tmp_path / "a")})
    refused(r"model .*/b: is a LoRA adapter", teachers=teachers(expert=on_adapter, anti=tiny.anti))
    refused(r"runs wherever its base is; leave out placement=offload", teachers=teachers(expert=placed, anti=tiny.anti))
    with pytest.raises(UserError, match=r"is a LoRA adapter, which is small as it is; give it as a teacher's path"):
        delta.make(str(tiny.student), str(tmp_path / "a"), tmp_path / "out")


def test_an_adapters_own_tokenizer_is_checked(tiny, tmp_path):
    make_adapter(tiny.student, tmp_path / "a")
    config = config_for(tiny, tmp_path, teachers=teachers(expert=tmp_path / "a", anti=tiny.anti))
    check_models(config)
    make_tokenizer(characters=(*CHARACTERS, "?")).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"teachers\.expert\.path .*/a: token '\?' has id"):
        check_models(config)


@pytest.mark.slow
def test_a_sharded_base_is_streamed_for_its_adapters(tiny, tmp_path):
    """Layers that are spread over the ranks cannot be summed one by one."""
    for i, name in enumerate(("a", "b")):
        make_adapter(tiny.student, tmp_path / name, seed=i)
    tree = tiny.tree(
        tmp_path / "run",
        steps=1,
        teachers=teachers(expert=tmp_path / "a", anti=tmp_path / "b"),
        scoring={"placement": "sharded"},
        rollout={"prompts_per_step": 3},
    )
    output = run(["--config", str(write_config(tmp_path / "c.yaml", tree))], size=2)
    reason = "that is offload: adapters need their base whole"
    assert "scoring by reference: sharded (configured)" in output
    assert re.search(rf"scoring by anti: lora \(0\.0\d MiB of factors on {tiny.student}; {reason}\)", output)
    row = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["scoring/expert/logratio_mean"] != row["scoring/anti/logratio_mean"]
