"""The loss of a packed micro-batch and its gradient against the written formula, in float64, with whole logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_reward import config_with
from tiny import make_model

from tcopd_fast.config_sections import LossConfig
from tcopd_fast.loss import policy_loss
from tcopd_fast.models import PackedCausalLM
from tcopd_fast.packing import PACKED_SDPA, pack
from tcopd_fast.types import Batch

PROMPTS, RESPONSES = [[3, 4], [5], [6, 7, 8]], [[9, 10, 1], [11, 12, 3, 4], [13]]
LENGTHS = (3, 4, 1)


def numbers(seed: int) -> torch.Tensor:
    return -torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(seed)) * 4


def batch(old: torch.Tensor | None) -> Batch:
    weights = torch.full((sum(LENGTHS),), 1 / sum(LENGTHS))
    return Batch((0, 1, 2), LENGTHS, pack(PROMPTS, RESPONSES), numbers(1) + 2, numbers(2), numbers(3), old, weights)


def written_formula(model, config, old) -> torch.Tensor:
    """−mean_t w_t · PPO(ρ_t, A_t), one sequence at a time."""
    objective, temperature = config.objective, config.rollout.temperature
    logprobs = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    logprob = torch.cat(logprobs)
    reward, ref, rollout = (numbers(i).double() + shift for i, shift in ((1, 2), (2, 0), (3, 0)))
    before = logprob.detach() if old is None else old.double()
    advantage = reward - (before - ref)
    ratio = (logprob - before).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage)
    gain = torch.where(advantage < 0, torch.maximum(gain, objective.dual_clip * advantage), gain)
    weight = (before - rollout).exp().clamp(max=objective.is_cap)
    return -(weight * gain).mean()


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_equal_the_written_formula(on_policy, tied, temperature):
    config = config_with({"a": 1.0}, ("a",))
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": temperature})})
    exact = make_model(4, tied=tied).double()
    old = None if on_policy else written_old(exact, temperature)
    expected = written_formula(exact, config, old)
    expected.backward()

    model = make_model(4, tied=tied)
    model.set_attn_implementation(PACKED_SDPA)
    loss, metrics, scored = policy_loss(PackedCausalLM(model), batch(old), config)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
    largest = max(float(p.grad.abs().max()) for p in exact.parameters())
    for (name, got), want in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=2e-5 * largest, rtol=1e-3, msg=name)
    assert float(metrics["token_count"]) == sum(LENGTHS)
    assert (float(metrics["clipped_count"]) > 0) != on_policy
    assert scored.entropy.min() > 0


def written_old(model, temperature) -> torch.Tensor:
    """log π_old near log π_θ, on both sides of the clip range."""
    with torch.no_grad():
        logprob = torch.cat(
            [
                (model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1] / temperature)
                .log_softmax(-1)
                .gather(1, torch.tensor(r)[:, None])[:, 0]
                for p, r in zip(PROMPTS, RESPONSES, strict=True)
            ]
        )
    shift = torch.tensor([0.5, -0.5, 0.05, -0.05, 1.5, -1.5, 0.1, 0.0])
    return (logprob + shift).float()


def test_masked_tokens_take_no_part():
    config = config_with({"a": 1.0}, ("a",))
    model = make_model(4)
    model.set_attn_implementation(PACKED_SDPA)
    whole = batch(None)
    weights = whole.weights.clone()
    weights[3:7] = 0
    poisoned = whole.reward.clone()
    poisoned[3:7] = float("nan")
    loss, metrics, _ = policy_loss(PackedCausalLM(model), replace(whole, weights=weights, reward=poisoned), config)
    loss.backward()
    assert torch.isfinite(loss) and float(metrics["token_count"]) == 4
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("grad_tol", [1e-9, 0.2])
def test_tolerance_reaches_the_head_and_is_accounted_for(grad_tol):
    exact_config = config_with({"a": 1.0}, ("a",))
    config = exact_config.model_copy(update={"loss": LossConfig(grad_tol=grad_tol)})
    grads = []
    for settings in (exact_config, config):
        model = make_model(4)
        model.set_attn_implementation(PACKED_SDPA)
        lm = PackedCausalLM(model)
        loss, metrics, _ = policy_loss(lm, batch(None), settings)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float(metrics["grad_row_count"]) == sum(LENGTHS)
    assert float(metrics["column_sum"]) == sum(LENGTHS) * len(lm.head().weight) >= float(metrics["kept_column_sum"])
    assert float(metrics["dropped_mass_max"]) <= grad_tol
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert error < (1e-4 if grad_tol < 1e-6 else 0.5)
