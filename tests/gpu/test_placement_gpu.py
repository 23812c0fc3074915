"""Streamed, rebuilt and adapted models on a GPU: equal to resident ones, whichever stream is late, in flat memory."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from gpu_mode import DEVICE as DEVICE_TYPE
from gpu_mode import REHEARSAL, sized
from safetensors.torch import save_file
from test_models import config_for, rollouts
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config

from tcopd_fast.dist import World
from tcopd_fast.models import check_models
from tcopd_fast.scoring import Scorer, delta, placement
from tcopd_fast.scoring.streamed import StreamedCausalLM
from tcopd_fast.scoring.weights import MappedWeights, PinnedWeights

DEVICE = torch.device(DEVICE_TYPE, 0)
HIDDEN, INTERMEDIATE, VOCAB, LAYERS = sized((1024, 4096, 4096, 8), (64, 128, 64, 3))
LENGTHS = sized((100, 300, 170, 250, 40, 390, 220, 10), (10, 30, 17, 25, 4, 39, 22, 1))
PER_FORWARD, PER_TRIP = sized((500, 1200), (60, 130))
# About 10 ms on a GPU: much longer than a layer's copy or computation here.
LATE = 20_000_000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three bfloat16 models of 8 layers, about 250 MB each, and a small bfloat16 change of the first as a delta."""
    root = tmp_path_factory.mktemp("checkpoints")
    shape = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, head_dim=HIDDEN // 8, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    for seed, name in enumerate(("student", "expert", "anti")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    model = AutoModelForCausalLM.from_pretrained(root / "student", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        changed = torch.rand(parameter.shape, generator=generator) < 0.02
        parameter.data[changed] *= 1.5
    model.save_pretrained(root / "tuned")
    make_tokenizer().save_pretrained(root / "tuned")
    delta.make(str(root / "student"), str(root / "tuned"), root / "delta")
    return root


@pytest.fixture(autouse=REHEARSAL)
def pinned_without_a_gpu(monkeypatch):
    """In a rehearsal offloaded models take the weights of a GPU, in memory that is called pinned."""

    def source(folder, dtype, device):
        return (MappedWeights if dtype is None else PinnedWeights)(folder, dtype, device)

    monkeypatch.setattr(placement, "MappedWeights", source)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def scorer_of(tiny, tmp_path, checkpoints, place="resident", student="student", expert="expert", **options):
    """options: of the expert."""
    config = config_for(
        tiny,
        tmp_path,
        model={"path": str(checkpoints / student), "dtype": "bfloat16"},
        teachers={
            "expert": {"path": str(checkpoints / expert), **options},
            "anti": {"path": str(checkpoints / "anti")},
        },
        scoring={"placement": place, "max_tokens_per_forward": PER_FORWARD, "max_tokens_per_trip": PER_TRIP},
    )
    return Scorer(config, check_models(config), World(0, 1, DEVICE))


def scores(scorer, lambdas=None):
    items = scorer.score(rollouts(LENGTHS), [lambdas or {"expert": 1.5, "anti": -0.5}] * len(LENGTHS))
    return [t for item in items for t in (item.ref_logprob, *item.teacher_logprobs.values())]


def poison():
    """Fill memory that the allocator will hand out next with NaN, so that a read before its copy shows."""
    blocks = [torch.full((HIDDEN, INTERMEDIATE), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(64)]
    blocks += [torch.full((HIDDEN, HIDDEN), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(64)]
    del blocks


def late_copies(monkeypatch):
    stream = torch.cuda.stream

    @contextmanager
    def late(chosen):
        with stream(chosen):
            torch.cuda._sleep(LATE)
            yield

    monkeypatch.setattr(torch.cuda, "stream", late)


def late_computation(monkeypatch):
    plan = StreamedCausalLM._plan

    def planned(self, model, path):
        plan(self, model, path)
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE))

    monkeypatch.setattr(StreamedCausalLM, "_plan", planned)


@pytest.mark.parametrize("late", [None, late_copies, late_computation])
def test_offloaded_models_in_turn_equal_resident_ones_in_every_pass(tiny, tmp_path, checkpoints, monkeypatch, late):
    """Three models, several trips of several micro-batches each, with either stream held back."""
    expected = scores(scorer_of(tiny, tmp_path, checkpoints))
    assert all(t.isfinite().all() for t in expected) and not torch.equal(expected[0], expected[1])
    if late:
        late(monkeypatch)
    scorer = scorer_of(tiny, tmp_path, checkpoints, "offload")
    for _ in range(3):
        poison()
        found = scores(scorer)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_group_that_was_announced_and_not_asked_for_spoils_nothing(checkpoints, monkeypatch):
    late_copies(monkeypatch)
    source = PinnedWeights(checkpoints / "expert", torch.bfloat16, DEVICE)
    assert all(tensor.is_pinned() for tensor in source.host.values())
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(LAYERS) for part in ("up", "gate")]
    for name in names:
        source.prefetch(names[:1])
        source.prefetch([name])
        # Takes the memory of the first; a copy still under way would change it.
        scratch = [torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
        loaded = source.load([name])
        assert torch.equal(loaded[name].cpu(), source.host[name])
        torch.cuda.synchronize(DEVICE)
        assert not any(t.any() for t in scratch)


def test_a_delta_equals_its_checkpoint(tiny, tmp_path, checkpoints):
    """With the base resident, and with the base read from its files."""
    expected = scores(scorer_of(tiny, tmp_path, checkpoints, expert="tuned"))
    assert not torch.equal(expected[0], expected[1]), "base and teacher must differ"
    found = scores(scorer_of(tiny, tmp_path, checkpoints, "auto", expert="delta"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    base = {"delta_base": str(checkpoints / "student")}
    found = scores(scorer_of(tiny, tmp_path, checkpoints, "auto", student="anti", expert="delta", **base))
    assert all(torch.equal(a, b) for a, b in zip(found[1::3], expected[1::3], strict=True))


def test_an_adapter_scores_alike_on_a_resident_and_an_offloaded_base(tiny, tmp_path, checkpoints):
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for i in range(LAYERS):
        for name, rows, columns in (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.down_proj", HIDDEN, INTERMEDIATE)):
            key = f"base_model.model.model.layers.{i}.{name}"
            factors[f"{key}.lora_A.weight"] = torch.randn(8, columns, generator=generator) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.02
    folder = checkpoints / "adapter"
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    resident = scores(scorer_of(tiny, tmp_path, checkpoints, "resident", expert="adapter"))
    poison()
    offload = scores(scorer_of(tiny, tmp_path, checkpoints, "offload", expert="adapter"))
    assert all(torch.equal(a, b) for a, b in zip(offload, resident, strict=True))
    assert (resident[0] - resident[1]).abs().max() > 0.01, "the adapter must matter"


def test_offloaded_models_take_the_memory_of_two_layers_however_many_they_are(tiny, tmp_path, checkpoints):
    weights = (checkpoints / "student" / "model.safetensors").stat().st_size
    scorer = scorer_of(tiny, tmp_path, checkpoints, "offload")
    one, three = {"expert": 0.0, "anti": 0.0}, {"expert": 1.5, "anti": -0.5}
    scores(scorer, three)

    def peak(lambdas):
        torch.cuda.synchronize(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        scores(scorer, lambdas)
        return torch.cuda.max_memory_allocated(DEVICE) - before

    assert weights > sized(200 << 20, 100 << 10)
    assert peak(one) < 0.5 * weights
    assert peak(three) < peak(one) + 0.01 * weights
