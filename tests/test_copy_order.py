"""The order of copies and computation in `PinnedWeights`, on a machine without a GPU.

Streams are vector clocks, and memory is handed out again the moment it is dropped, as CUDA's allocator does within one
stream. Every copy and every operation on a weight is an access; two accesses to one block of memory of which one writes
must be ordered by the streams' waits, else a GPU could run them in either order.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_models import CPU, rollouts
from torch.utils._pytree import tree_map

from tcopd_fast.models import load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.scoring import weights
from tcopd_fast.scoring.streamed import StreamedCausalLM

COMPUTING, COPYING = "computing", "copying"


class Stream:
    """What has happened before the next operation here: per stream the number of its operations."""

    def __init__(self, gpu, name):
        self.gpu, self.name, self.clock = gpu, name, Counter()

    def wait_stream(self, other):
        if (self.name, other.name) not in self.gpu.deaf:
            self.clock |= other.clock


class Gpu:
    """Stands in for `torch` in the module under test: its streams and its memory. deaf: waits that do not work."""

    def __init__(self, deaf=()):
        self.deaf = set(deaf)
        self.computing = self.active = Stream(self, COMPUTING)
        self.free = defaultdict(list)
        self.blocks = self.in_use = self.most_in_use = 0
        self.accesses = defaultdict(list)
        self.races = []
        self.cuda = SimpleNamespace(
            Stream=lambda device: Stream(self, COPYING),
            current_stream=lambda device: self.active,
            stream=self.running_on,
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    @contextmanager
    def running_on(self, stream):
        before, self.active = self.active, stream
        yield
        self.active = before

    def empty_like(self, host, device):
        sizes = self.free[host.nbytes]
        block = sizes.pop() if sizes else self.new_block()
        self.in_use += host.nbytes
        self.most_in_use = max(self.most_in_use, self.in_use)
        tensor = torch.full_like(host, float("nan")).as_subclass(OnGpu)
        tensor.gpu, tensor.block = self, block
        weakref.finalize(tensor, self.give_back, host.nbytes, block)
        return tensor

    def new_block(self):
        self.blocks += 1
        return self.blocks

    def give_back(self, size, block):
        self.free[size].append(block)
        self.in_use -= size

    def access(self, block, writes):
        stream = self.active
        stream.clock[stream.name] += 1
        for other, time, wrote in self.accesses[block]:
            if (writes or wrote) and stream.clock[other] < time:
                self.races.append((block, other, stream.name))
        self.accesses[block].append((stream.name, stream.clock[stream.name], writes))


class OnGpu(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name not in ("__get__", "__set__", "as_subclass"):
            found = []
            tree_map(lambda x: found.append(x) if isinstance(x, OnGpu) else None, (args, kwargs or {}))
            for tensor in found:
                tensor.gpu.access(tensor.block, writes=name == "copy_")
        plain = tree_map(lambda x: x.as_subclass(torch.Tensor) if isinstance(x, OnGpu) else x, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*plain[0], **plain[1])


@pytest.fixture
def machine(monkeypatch):
    def make(deaf=()):
        gpu = Gpu(deaf)
        monkeypatch.setattr(weights, "torch", gpu)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        return gpu

    return make


def models(tiny):
    return [
        StreamedCausalLM(
            str(path), weights.PinnedWeights(path, torch.float32, CPU), dtype="float32", attention="sdpa",
            vocab_size=None, device=CPU,
        )
        for path in (tiny.expert, tiny.anti)
    ]  # fmt: skip


def batches():
    return [pack([r.prompt.token_ids], [r.token_ids]) for r in rollouts()]


def test_two_models_in_turn_race_nowhere_and_hold_two_groups(tiny, machine):
    gpu = machine()
    lms = models(tiny)
    for _ in range(3):
        found = [[out.logprob for out in lm.logprobs(batches(), temperature=1.0)] for lm in lms]
    assert not gpu.races and sum(map(len, gpu.accesses.values())) > 500
    for path, got in zip((tiny.expert, tiny.anti), found, strict=True):
        whole = load_causal_lm(str(path), dtype="float32", attention="sdpa", vocab_size=None).eval()
        with torch.inference_mode():
            expected = [whole.logprobs(tokens, temperature=1.0).logprob for tokens in batches()]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    groups = [[lms[0].source.host[name].nbytes for name in layer.values()] for layer in lms[0].layer_names]
    assert gpu.most_in_use == 2 * sum(groups[0]), "one layer computes, one is copied; two models take no more"
    assert gpu.in_use == 0


@pytest.mark.parametrize("deaf", [(COMPUTING, COPYING), (COPYING, COMPUTING)])
def test_each_wait_is_needed(tiny, machine, deaf):
    gpu = machine([deaf])
    for lm in models(tiny):
        lm.logprobs(batches(), temperature=1.0)
    assert gpu.races


def test_the_next_layer_is_copied_while_the_present_one_computes(tiny, machine):
    gpu = machine()
    source = weights.PinnedWeights(tiny.expert, torch.float32, CPU)
    first, second, third = ([f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1, 0))
    held = source.load(first)
    source.prefetch(second)
    begun = source.stream.clock[COMPUTING]
    (held[first[0]] + 1).sum()
    assert source.stream.clock[COMPUTING] == begun, "the copy does not wait for this computation"
    held = source.load(second)
    source.prefetch(third)
    assert source.stream.clock[COMPUTING] > begun, "the copy into the first group's memory does"
    assert not gpu.races


def test_a_group_that_was_announced_and_not_asked_for_is_given_back_in_order(tiny, machine):
    gpu = machine()
    source = weights.PinnedWeights(tiny.expert, torch.float32, CPU)
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(2) for part in ("up", "gate")]
    for name in names * 2:
        source.prefetch(names[:1])
        source.prefetch([name])
        # Takes the memory that the first of them gave back.
        scratch = gpu.empty_like(source.host[name], CPU)
        scratch.copy_(source.host[name])
        loaded = source.load(names[1:2])
        assert torch.equal(loaded[names[1]] + 0, source.host[names[1]])
    assert not gpu.races
