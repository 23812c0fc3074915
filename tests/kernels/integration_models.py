"""Models, inputs and comparisons that the tests of the integrations share."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

import pytest
import torch
import transformers
from tiny import make_model
from torch import nn

VOCAB, BATCH, LENGTH = 512, 4, 16
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip


def make_other(name: str, seed: int = 0, sharpness: float = 1.0, **options) -> transformers.PreTrainedModel:
    """A small model of the family `name`, its embedding and head scaled up by `sharpness`."""
    torch.manual_seed(seed)
    family = getattr(transformers, f"{name}ForCausalLM")
    model = family(family.config_class(**SMALL, **options, pad_token_id=0, eos_token_id=1))
    model.get_output_embeddings().weight.data.mul_(sharpness)
    return model


def make_biased(seed: int):
    model = make_model(seed, VOCAB, tied=False)
    head = nn.Linear(32, VOCAB, bias=True)
    head.weight.data.normal_()
    head.bias.data.normal_()
    model.set_output_embeddings(head)
    return model


MODELS = {
    "tied": lambda: make_model(0, VOCAB, tied=True),
    "untied": lambda: make_model(0, VOCAB, tied=False),
    "biased": lambda: make_biased(0),
    # Sharp enough for the soft-cap to bend the logits.
    "softcapped": lambda: make_other("Gemma2", sharpness=30, head_dim=8, final_logit_softcapping=3.0),
    "softcapped, later family": lambda: make_other("Gemma3", sharpness=30, head_dim=8, final_logit_softcapping=3.0),
    "multiplied": lambda: make_other("Cohere", sharpness=30, logit_scale=0.25),
    "divided": lambda: make_other("Granite", sharpness=30, logits_scaling=8.0),
    "multiplied by what others divide by": lambda: make_other("HyperCLOVAX", sharpness=30, logits_scaling=0.5),
}


def installed(name: str) -> ModuleType:
    """The module `name`; skips where it is not installed, but not where it is and cannot be imported."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :5] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[2, :9] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def plain_statistics(model, inputs, temperature):
    """Loss, logprob and entropy [B, T−1] from the logits that the model itself returns."""
    outputs = model(**inputs)
    logp = (outputs.logits[:, :-1] / temperature).log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    logprob = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return outputs.loss, torch.where(kept, logprob, 0.0), torch.where(kept, entropy, 0.0)


def gradients(model, objective):
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(values, expected):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        scale = expected[name].abs().max().item()
        assert scale > 0, f"{name}: nothing to compare"
        close = {"rtol": 2e-4, "atol": 2e-5 * scale}
        torch.testing.assert_close(value, expected[name], **close, msg=lambda text, name=name: f"{name}: {text}")
