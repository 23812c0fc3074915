"""flash-attn's varlen kernels against packed SDPA on a GPU: the same logprobs and gradients, in bfloat16.

In a rehearsal SDPA takes the place of flash-attn, which has no CPU kernels.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_mode import DEVICE as DEVICE_TYPE
from gpu_mode import REHEARSAL, sized
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config

from tcopd_fast.models import load_causal_lm
from tcopd_fast.packing import pack

pytestmark = pytest.mark.skipif(
    not REHEARSAL and importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn"
)
DEVICE = torch.device(DEVICE_TYPE, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen3 of 4 layers with grouped-query attention and head width 64."""
    root = tmp_path_factory.mktemp("attention") / "model"
    shape = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(root)
    make_tokenizer().save_pretrained(root)
    return root


def learn(checkpoint, dtype, attention):
    """Logprobs and gradients of one packed row of sequences of unequal length, float32 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (7, 130, 1, 64, 33, 200)]
    tokens = pack(draw[:3], draw[3:]).to(DEVICE)
    lm = load_causal_lm(str(checkpoint), dtype=dtype, attention=attention, vocab_size=None).to(DEVICE)
    logprob_N = lm.logprobs(tokens, temperature=1.0).logprob
    (logprob_N * torch.linspace(-1, 1, len(logprob_N), device=DEVICE)).sum().backward()
    return logprob_N.detach().cpu(), {name: p.grad.float().cpu() for name, p in lm.named_parameters()}


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_flash_attention_is_as_near_the_truth_as_sdpa(checkpoint):
    """Against float32 with SDPA. Bounds: 0.02 nats per token in the mean; gradients' relative error 5 % for each
    parameter, and no more than twice SDPA's own in bfloat16 (plus 0.5 %)."""
    truth, gradients = learn(checkpoint, "float32", "sdpa")
    attentions = {"sdpa": "sdpa", "flash": sized("flash_attention_2", "sdpa")}
    results = {name: learn(checkpoint, "bfloat16", attention) for name, attention in attentions.items()}
    for name, (logprob_N, _) in results.items():
        assert (logprob_N - truth).abs().mean() < 0.02, name
    for name, expected in gradients.items():
        sdpa, flash = (error(results[kind][1][name], expected) for kind in attentions)
        assert flash < 0.05 and flash < 2 * sdpa + 0.005, (name, sdpa, flash)
