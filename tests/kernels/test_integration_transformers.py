"""The switch for transformers: same numbers as before the switch, and no logits."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from integration_models import (
    BATCH,
    LENGTH,
    MODELS,
    TOLERANCE,
    VOCAB,
    assert_same,
    batch,
    gradients,
    installed,
    plain_statistics,
)
from oracle import Allocations
from tcopd_kernels import linear_logprob
from tcopd_kernels.integrations.transformers import with_logprobs, without_logprobs
from tiny import make_model
from torch import nn


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_switched_model_gives_the_same_statistics_and_gradients(small_tiles, kind, temperature):
    model, inputs = MODELS[kind](), batch()
    upstream = torch.randn(2, BATCH, LENGTH - 1)

    def objective(logprob, entropy):
        return (upstream[0] * logprob).sum() + (upstream[1] * entropy).sum()

    loss, logprob, entropy = plain_statistics(model, inputs, temperature)
    before = gradients(model, objective(logprob, entropy))

    assert with_logprobs(model, temperature=temperature, entropy=True) is model
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.logprobs, logprob, **TOLERANCE)
    torch.testing.assert_close(outputs.entropy, entropy, **TOLERANCE)
    if temperature == 1.0:
        torch.testing.assert_close(outputs.loss, loss, **TOLERANCE)
    assert_same(gradients(model, objective(outputs.logprobs, outputs.entropy)), before)


def test_loss_and_its_gradient_equal_those_of_the_model_itself():
    model, inputs = MODELS["tied"](), batch()
    for count in (None, 100):
        loss = model(**inputs, num_items_in_batch=count).loss
        before = gradients(model, loss)
        switched = with_logprobs(model)(**inputs, num_items_in_batch=count).loss
        torch.testing.assert_close(switched, loss, **TOLERANCE)
        assert_same(gradients(model, switched), before)
        without_logprobs(model)


def test_switched_model_makes_no_logits(small_tiles):
    model, inputs = MODELS["untied"](), batch()
    logits = BATCH * (LENGTH - 1) * VOCAB
    with Allocations() as seen:
        model(**inputs).loss.backward()
    assert max(seen.sizes) >= logits

    with_logprobs(model, entropy=True)
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    with Allocations() as seen:
        model(**inputs).loss.backward()
    assert not calls
    assert max(seen.sizes) == model.lm_head.weight.numel() < logits


def test_calls_without_labels_generation_and_undo_are_the_original():
    model, inputs = MODELS["tied"]().eval(), batch()
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**prompt).logits
    text = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "forward" not in vars(model)
    signature = inspect.signature(model.forward)
    with_logprobs(with_logprobs(model), temperature=2.0)
    assert inspect.signature(model.forward) == signature  # generate checks its arguments against it
    assert torch.equal(model(**prompt).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), text)
    assert model(**inputs).logprobs is not None
    assert without_logprobs(without_logprobs(model)) is model
    assert "forward" not in vars(model)
    assert torch.equal(model(**inputs).logits, logits)


def test_shift_labels_score_packed_rows_like_separate_sequences():
    model = with_logprobs(MODELS["tied"](), entropy=True)
    sequences = [torch.randint(3, VOCAB, (length,)) for length in (5, 1, 9)]
    separate = [model(s[None], labels=s[None]) for s in sequences]
    packed = model(
        torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences])[None],
        shift_labels=torch.cat([torch.cat([s[1:], s.new_tensor([-100])]) for s in sequences])[None],
    )
    for name in ("logprobs", "entropy"):
        expected = torch.cat([torch.cat([o[name], torch.zeros(1, 1)], 1) for o in separate], 1)
        torch.testing.assert_close(packed[name], expected, **TOLERANCE)


def test_autocast_computes_in_the_dtype_of_autocast(monkeypatch):
    model, inputs = MODELS["untied"](), batch()
    dtypes = []

    def spy(hidden, weight, *args, **kwargs):
        dtypes.append((hidden.dtype, weight.dtype))
        return linear_logprob(hidden, weight, *args, **kwargs)

    monkeypatch.setattr("tcopd_kernels.integrations.transformers.linear_logprob", spy)
    with torch.autocast("cpu", torch.bfloat16):
        _, logprob, _ = plain_statistics(model, inputs, 1.0)
        outputs = with_logprobs(model)(**inputs)
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] and outputs.logprobs.dtype == torch.float32
    # One bf16 rounding of logits of this size: 2⁻⁸ · |z|.
    torch.testing.assert_close(outputs.logprobs, logprob.float(), rtol=2**-7, atol=2**-5)
    outputs.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


class Adapted(nn.Module):
    """A low-rank adapter around the head, as LoRA libraries put it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, VOCAB, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


def test_heads_that_are_more_than_a_linear_are_refused():
    for wrap in (Adapted, nn.utils.parametrizations.weight_norm):
        model = make_model(0, VOCAB, tied=False)
        model.lm_head = wrap(model.lm_head)
        with pytest.raises(TypeError, match=r"output head of Qwen3ForCausalLM is .*merge adapters"):
            with_logprobs(model)

    adapted_later = with_logprobs(make_model(0, VOCAB, tied=False))
    adapted_later.lm_head = Adapted(adapted_later.lm_head)
    with pytest.raises(TypeError, match=r"output head of Qwen3ForCausalLM is test_integration_transformers.Adapted;"):
        adapted_later(**batch())

    replaced = make_model(0, VOCAB, tied=False)
    replaced.lm_head.forward = lambda hidden: 2 * nn.functional.linear(hidden, replaced.lm_head.weight)
    with pytest.raises(TypeError, match="Linear with a replaced forward"):
        with_logprobs(replaced)


def test_logits_changed_in_a_way_the_config_does_not_name_are_refused():
    model = make_model(0, VOCAB)
    model.__class__ = ScaledQwen3
    with pytest.raises(ValueError, match=r"the logits of ScaledQwen3 are not softcap\(scale·linear"):
        with_logprobs(model)

    model = MODELS["divided"]()
    model.get_output_embeddings().weight.data.zero_()  # every factor would fit
    with pytest.raises(ValueError, match=r"a scale among \[1.0, 8.0, 0.125\], or the head is all zero"):
        with_logprobs(model)


class ScaledQwen3(transformers.Qwen3ForCausalLM):
    """A model whose config says nothing of what its forward does to the logits."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 1.1 * outputs.logits
        return outputs


def test_other_misuse_is_refused_by_name():
    model, inputs = MODELS["tied"](), batch()
    with pytest.raises(TypeError, match=r"must be a transformers.PreTrainedModel, got Linear"):
        with_logprobs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="meta device"):
        with_logprobs(make_model(0, VOCAB).to("meta"))
    with_logprobs(model)
    for wrong, message in (
        ({"logits_to_keep": 3}, "logits_to_keep cannot be combined"),
        ({"return_dict": False}, "return_dict=False is not supported"),
        ({"output_router_logits": True}, "router loss"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **wrong)
    with pytest.raises(ValueError, match=r"labels give \[4, 10\] targets"):
        model(inputs["input_ids"], labels=inputs["labels"][:, :11])
    without_logprobs(model)
    model.forward = types.MethodType(lambda self, **kwargs: None, model)
    with pytest.raises(ValueError, match="already replaced on this instance"):
        with_logprobs(model)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_lora_on_the_head_is_refused_before_and_after_the_switch(kind):
    peft = installed("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    adapted = peft.get_peft_model(MODELS[kind](), config).get_base_model()
    with pytest.raises(TypeError, match=r"is peft.tuners.lora.layer.Linear; only a plain torch.nn.Linear"):
        with_logprobs(adapted)

    switched = with_logprobs(MODELS[kind]())
    peft.get_peft_model(switched, config)
    with pytest.raises(TypeError, match=r"merge adapters first, or leave the head out"):
        switched(**batch())


@pytest.mark.parametrize("adapters_first", [True, False])
@pytest.mark.parametrize("kind", ["tied", "untied", "softcapped", "divided"])
def test_adapters_in_the_decoder_and_a_saved_head_are_honoured(small_tiles, kind, adapters_first):
    """The copy of the head that PEFT trains is used, with its gradient; without adapters the original is."""
    peft = installed("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], r=2)
    inputs, results = batch(), []
    for switched in (False, True):
        model = MODELS[kind]()
        if switched and not adapters_first:
            with_logprobs(model, entropy=True)
        adapted = peft.get_peft_model(model, config)
        if switched and adapters_first:
            with_logprobs(model, entropy=True)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.add_(0.1 * noise)

        def statistics(adapted=adapted, switched=switched):
            if not switched:
                return plain_statistics(adapted, inputs, 1.0)[1:]
            outputs = adapted(**inputs)
            return outputs.logprobs, outputs.entropy

        logprob, entropy = statistics()
        grads = torch.autograd.grad((logprob + 0.3 * entropy).sum(), list(trained.values()))
        with adapted.disable_adapter():
            values = [logprob, entropy, *statistics()]
        results.append((values, dict(zip(trained, grads, strict=True))))
    (expected, expected_grads), (values, grads) = results
    assert not torch.allclose(values[0], values[2], atol=1e-2)
    for value, true in zip(values, expected, strict=True):
        torch.testing.assert_close(value, true, **TOLERANCE)
    assert any("lm_head" in name for name in grads) and any("lora" in name for name in grads)
    assert_same(grads, expected_grads)


def test_importing_the_kernels_imports_neither_library():
    code = "import sys, tcopd_kernels; print({'transformers', 'trl', 'datasets', 'accelerate'} & sys.modules.keys())"
    root = Path(inspect.getfile(with_logprobs)).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
