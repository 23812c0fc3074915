from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from tcopd_fast.models import PackedCausalLM
from tcopd_fast.packing import PACKED_SDPA, pack, split_by_tokens


def unpacked_logprobs(model, prompt, response, temperature):
    """The definition: one sequence at a time, plain attention, materialised logits, float64."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_logprobs_equal_unpacked(sliding_window, tied):
    model = make_model(5, tied=tied, sliding_window=sliding_window).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in (1, 7, 3, 12)]
    responses = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in (9, 1, 5, 2)]
    expected = torch.cat([unpacked_logprobs(model, p, r, 0.7) for p, r in zip(prompts, responses)])
    model.set_attn_implementation(PACKED_SDPA)
    with torch.no_grad():
        got = PackedCausalLM(model).logprobs(pack(prompts, responses), temperature=0.7).logprob
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)


def test_neighbours_in_a_pack_do_not_see_each_other():
    model = make_model(6).eval()
    model.set_attn_implementation(PACKED_SDPA)
    lm = PackedCausalLM(model)
    with torch.no_grad():
        first = lm.logprobs(pack([[3, 4], [5]], [[6, 7], [8, 9]]), temperature=1.0).logprob
        other = lm.logprobs(pack([[10, 11], [5]], [[12, 3], [8, 9]]), temperature=1.0).logprob
    torch.testing.assert_close(first[2:], other[2:], atol=1e-6, rtol=0)
    assert (first[:2] - other[:2]).abs().max() > 1e-3


def test_gradients_through_a_pack_equal_unpacked():
    model = make_model(7)
    prompts, responses = [[3, 4, 5], [6]], [[7, 8], [9, 10, 11]]
    loss = sum(
        model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)[range(len(r)), r].sum()
        for p, r in zip(prompts, responses)
    )
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(PACKED_SDPA)
    PackedCausalLM(model).logprobs(pack(prompts, responses), temperature=1.0).logprob.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=5e-5, rtol=1e-4, msg=name)


def test_the_last_token_is_not_run():
    tokens = pack([[3, 4]], [[5, 6]])
    assert tokens.input_ids.tolist() == [3, 4, 5]
    assert tokens.predict_at.tolist() == [1, 2]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        pack([[]], [[1]])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50))
def test_token_budget_groups_partition_the_sequences(lengths, budget):
    groups = split_by_tokens(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
