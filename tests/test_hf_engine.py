from __future__ import annotations

import pytest
import torch
from test_packing import unpacked_logprobs
from tiny import make_model, make_tokenizer

from tcopd_fast.models import load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.rollout.hf import HfEngine
from tcopd_fast.types import Prompt

PROMPTS = [Prompt(f"p{i}", "d", tuple(range(3, 4 + i)), "q", "1", "s") for i in range(9)]


def engine_at(path, batch=256, vocab_size=None) -> HfEngine:
    tokenizer = make_tokenizer()
    return HfEngine(
        str(path), tokenizer, dtype="float32", max_batch_size=batch, vocab_size=vocab_size, device=torch.device("cpu")
    )


def sample(engine, seed=0, samples=2, temperature=1.0, max_new_tokens=14):
    return engine.generate(PROMPTS, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_model_at_the_sampling_temperature(tiny, temperature):
    model = make_model(0).eval()
    for rollout in sample(engine_at(tiny.student), temperature=temperature):
        expected = unpacked_logprobs(model, list(rollout.prompt.token_ids), list(rollout.token_ids), temperature)
        torch.testing.assert_close(rollout.logprobs.double(), expected, atol=2e-5, rtol=0)


def test_greedy_takes_the_most_likely_token(tiny):
    model = make_model(0).eval()
    for rollout in sample(engine_at(tiny.student), samples=1, temperature=0.0):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        best = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == list(rollout.token_ids)


def test_samples_do_not_depend_on_batching_and_are_prompt_major(tiny):
    whole, small = sample(engine_at(tiny.student)), sample(engine_at(tiny.student, batch=4))
    assert [(r.prompt.id, r.sample, r.token_ids) for r in whole] == [
        (r.prompt.id, r.sample, r.token_ids) for r in small
    ]
    assert [(r.prompt.id, r.sample) for r in whole] == [(p.id, s) for p in PROMPTS for s in range(2)]


def test_seed_decides_the_samples(tiny):
    engine = engine_at(tiny.student)
    first, again, other = sample(engine, 1), sample(engine, 1), sample(engine, 2)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_samples_end_at_eos_or_the_limit(tiny):
    done = []
    rollouts = engine_at(tiny.student).generate(
        PROMPTS, samples=4, max_new_tokens=14, temperature=1.0, seed=0, on_finished=done.append
    )
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert 1 not in r.token_ids[:-1]
        assert (r.token_ids[-1] == 1) == (r.finish_reason == "stop")
        assert len(r.token_ids) == len(r.logprobs) <= 14
        assert r.finish_reason == "stop" or len(r.token_ids) == 14
        assert "<eos>" not in r.text
    assert sorted((r.prompt.id, r.sample) for r in done) == sorted((r.prompt.id, r.sample) for r in rollouts)


def test_sampling_follows_the_distribution(tiny):
    engine = engine_at(tiny.student)
    prompt = PROMPTS[3]
    n = 4000
    rollouts = engine.generate([prompt], samples=n, max_new_tokens=1, temperature=1.3, seed=5)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=24).double()
    logits = make_model(0).eval()(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].detach().double()
    p = (logits / 1.3).softmax(-1)
    chi_square = float(((counts - n * p).square() / (n * p)).sum())
    # 23 degrees of freedom: 60 is exceeded with probability 4e-5 if the sampler is right.
    assert chi_square < 60


def test_padding_rows_are_never_sampled(tiny):
    rollouts = sample(engine_at(tiny.padded, vocab_size=24), samples=20)
    assert max(max(r.token_ids) for r in rollouts) < 24


def test_logprobs_after_a_sync_match_the_learner_and_carry_the_version(tiny):
    """Tolerance: 2e-5 nats in float32."""
    engine = engine_at(tiny.student)
    before = sample(engine)
    learner = load_causal_lm(str(tiny.expert), dtype="float32", attention="sdpa", vocab_size=None).eval()
    engine.load_weights(learner.model.named_parameters(), 7)
    after = sample(engine)
    assert {r.version for r in before} == {0} and {r.version for r in after} == {7}
    tokens = pack([r.prompt.token_ids for r in after], [r.token_ids for r in after])
    with torch.no_grad():
        expected = learner.logprobs(tokens, temperature=1.0).logprob
    got = torch.cat([r.logprobs for r in after])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    stale = torch.cat([r.logprobs for r in before])
    assert len(stale) != len(got) or (stale - got).abs().max() > 0.1


def test_an_unknown_weight_is_refused(tiny):
    with pytest.raises(KeyError):
        engine_at(tiny.student).load_weights([("no.such.weight", torch.zeros(1))], 1)
