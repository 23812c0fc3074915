from __future__ import annotations

import shutil

import pytest
import torch
from tiny import CHARACTERS, make_model, make_tokenizer

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models, load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.scoring import Scorer
from tcopd_fast.types import Prompt, Rollout

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


def config_for(tiny, tmp_path, **sections) -> Config:
    return validate(tiny.tree(tmp_path / "run", **sections), Config)


def rollouts(lengths=(3, 5, 2)) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 16, (length + 4,), generator=generator).tolist()
        prompt = Prompt(f"p{i}", "d", tuple(ids[:4]), "q", "1", "s")
        out.append(Rollout(prompt, 0, tuple(ids[4:]), torch.zeros(length), "stop", 0, ""))
    return out


def exact(model, rollout, rows=None) -> torch.Tensor:
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :rows].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def test_scores_equal_each_model_on_its_own(tiny, tmp_path):
    config = config_for(tiny, tmp_path, scoring={"max_tokens_per_forward": 9})
    scorer = Scorer(config, check_models(config), WORLD)
    items = scorer.score(rollouts(), [{"expert": 1.5, "anti": -0.5}] * 3)
    for item in items:
        for got, seed in (
            (item.ref_logprob, 0),
            (item.teacher_logprobs["expert"], 1),
            (item.teacher_logprobs["anti"], 2),
        ):
            torch.testing.assert_close(got.double(), exact(make_model(seed), item.rollout), atol=2e-5, rtol=0)


def test_a_teacher_never_sees_samples_where_its_lambda_is_zero(tiny, tmp_path, monkeypatch):
    config = config_for(
        tiny, tmp_path, objective={"lambdas": {"x": {"expert": 1.0}, "y": {"expert": 1.0, "anti": -0.5}}}
    )
    scorer = Scorer(config, check_models(config), WORLD)
    seen = {}
    whole = Scorer.logprobs
    monkeypatch.setattr(
        Scorer, "logprobs", lambda self, key, r, i, t=None: seen.setdefault(key, list(i)) and whole(self, key, r, i, t)
    )
    items = scorer.score(
        rollouts(), [{"expert": 1.0, "anti": 0.0}, {"expert": 1.0, "anti": -0.5}, {"expert": 1.0, "anti": 0.0}]
    )
    assert seen[scorer.roles["anti"]] == [1]
    assert [set(item.teacher_logprobs) for item in items] == [{"expert"}, {"expert", "anti"}, {"expert"}]


def test_a_teacher_that_is_never_active_is_not_loaded(tiny, tmp_path):
    config = config_for(tiny, tmp_path, objective={"lambdas": {"expert": 1.5, "anti": 0.0}})
    scorer = Scorer(config, check_models(config), WORLD)
    assert "anti" not in scorer.roles and len(scorer.models) == 2


def test_identical_checkpoints_load_once(tiny, tmp_path):
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(tiny.expert)
    shutil.copytree(tiny.expert, copy)
    teachers = {
        "expert": {"path": str(link), "base": str(copy)},
        "anti": {"path": str(tiny.expert), "base": str(tiny.student)},
    }
    config = config_for(tiny, tmp_path, teachers=teachers)
    scorer = Scorer(config, check_models(config), WORLD)
    assert len(scorer.models) == 2, "expert and anti are one checkpoint, reference and base another"


def test_padded_vocabulary_is_handled(tiny, tmp_path):
    config = config_for(
        tiny, tmp_path, teachers={"expert": {"path": str(tiny.padded)}, "anti": {"path": str(tiny.anti)}}
    )
    models = check_models(config)
    assert models.vocab_size == 24
    item = Scorer(config, models, WORLD).score(rollouts((4,)), [{"expert": 1.0, "anti": 0.0}])[0]
    expected = exact(make_model(1, vocab_rows=40), item.rollout, rows=24)
    torch.testing.assert_close(item.teacher_logprobs["expert"].double(), expected, atol=2e-5, rtol=0)


def copy_of(tiny, tmp_path, tokenizer):
    folder = tmp_path / "other"
    shutil.copytree(tiny.expert, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_other_token_ids_are_refused(tiny, tmp_path):
    swapped = list(CHARACTERS)
    swapped[5], swapped[6] = swapped[6], swapped[5]
    folder = copy_of(tiny, tmp_path, make_tokenizer(characters=tuple(swapped)))
    with pytest.raises(UserError, match=r"teachers\.expert\.path .*token '2' has id 6 there and 5 in the student"):
        check_models(
            config_for(tiny, tmp_path, teachers={"expert": {"path": str(folder)}, "anti": {"path": str(tiny.anti)}})
        )


def test_another_end_of_sequence_is_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path, make_tokenizer(eos="<pad>"))
    with pytest.raises(UserError, match="eos is '<pad>' there and '<eos>' in the student"):
        check_models(
            config_for(tiny, tmp_path, teachers={"expert": {"path": str(folder)}, "anti": {"path": str(tiny.anti)}})
        )


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tiny, tmp_path):
    folder = tmp_path / "small"
    make_model(1, vocab_rows=12).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"teachers\.expert\.path: vocabulary has 12 rows"):
        check_models(
            config_for(tiny, tmp_path, teachers={"expert": {"path": str(folder)}, "anti": {"path": str(tiny.anti)}})
        )


def test_a_missing_checkpoint_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="model path /no/such/model: no such folder"):
        check_models(
            config_for(
                tiny, tmp_path, teachers={"expert": {"path": "/no/such/model"}, "anti": {"path": str(tiny.anti)}}
            )
        )


def test_truncated_weights_are_named(tiny, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(tiny.expert, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated: its weights cannot be loaded"):
        load_causal_lm(str(folder), dtype="float32", attention="sdpa", vocab_size=None)


def test_pickled_weights_are_not_loaded(tiny, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny.expert, folder)
    (folder / "model.safetensors").unlink()
    torch.save(make_model(1).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(str(folder), dtype="float32", attention="sdpa", vocab_size=None)


def test_softcapped_logits_are_honoured(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=None,
            query_pre_attn_scalar=8,
        )
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "gemma")
    model = model.eval()
    lm = load_causal_lm(str(tmp_path / "gemma"), dtype="float32", attention="sdpa", vocab_size=None).eval()
    [rollout] = rollouts((9,))
    with torch.no_grad():
        got = lm.logprobs(pack([rollout.prompt.token_ids], [rollout.token_ids]), temperature=1.0).logprob
    torch.testing.assert_close(got.double(), exact(model, rollout), atol=5e-5, rtol=0)
