"""What `tcopd plan` counts: weights, operations, activations, workspaces, and ZeRO's shares of them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from tcopd_fast.packing import PACKED_SDPA, pack
from tcopd_fast.plan import activations
from tcopd_fast.plan.activations import LiveBytes, forward_bytes, learn_bytes
from tcopd_fast.plan.head import HeadBytes, chunk_rows, head_bytes
from tcopd_fast.plan.shapes import shape_of
from tcopd_fast.plan.timing import forward_flops
from tcopd_fast.plan.zero import BUCKET, sharded_bytes, zero_bytes

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
