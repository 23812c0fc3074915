"""Rollouts from real vLLM servers on a CPU: weights over gloo, engines killed and hung in mid-generation."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from running import ROOT, lines, run, start
from safetensors.torch import load_file
from torch import Tensor

from tcopd_fast.config_sections import RolloutConfig, VllmConfig, VllmServerConfig
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_causal_lm, load_tokenizer, resolve_path
from tcopd_fast.packing import pack
from tcopd_fast.timeline import load
from tcopd_fast.types import Prompt, Rollout

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm"),
]

WORLD = World(0, 1, torch.device("cpu"))
NEW_TOKENS = 24


class Checkpoint:
    """Weights of a checkpoint on disk, as a learner's."""

    def __init__(self, path: str) -> None:
        self.tensors = load_file(Path(resolve_path(path)) / "model.safetensors")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("miniature:base")


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Prompt]:
    texts = [f"M:{a}+{b}-{c}+{d}=" for a, b, c, d in [(47, 38, 19, 12), (10, 20, 5, 6), (31, 4, 15, 9), (8, 7, 6, 5)]]
    return [Prompt(str(i), "math", tuple(tokenizer(t)["input_ids"]), t, None, "test") for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def engine(tokenizer, tmp_path_factory):
    from tcopd_fast.rollout.fleet import Fleet
    from tcopd_fast.rollout.vllm_server import ServerEngine

    # A hung engine is noticed after request_timeout_s; small buckets make several broadcasts per round.
    server = VllmServerConfig(engines=2, request_timeout_s=8.0, bucket_bytes=300_000, start_timeout_s=240)
    config = RolloutConfig(
        engine="vllm", vllm=VllmConfig(mode="server", kv_cache_memory_bytes=32 << 20, max_num_seqs=16, server=server)
    )
    fleet = Fleet(config, "miniature:base", "float32", 64, 0, tmp_path_factory.mktemp("engines"))
    engine = ServerEngine(fleet, tokenizer, world=WORLD, weights=Checkpoint("miniature:base"), config=config)
    yield engine
    engine.close()
    assert all(e.process is None for e in fleet.engines)


def sample(engine, prompts: list[Prompt], seed: int = 1, samples: int = 8, on_finished=None) -> list[Rollout]:
    return engine.generate(
        prompts, samples=samples, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=seed, on_finished=on_finished
    )


def largest_difference(model: str, rollouts: list[Rollout]) -> float:
    """Between the engine's logprobs and a float32 forward of the same weights, in nats."""
    lm = load_causal_lm(model, dtype="float32", attention="sdpa", vocab_size=None)
    tokens = pack([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts])
    with torch.no_grad():
        expected = lm.logprobs(tokens, temperature=1.0).logprob
    return float((torch.cat([r.logprobs for r in rollouts]) - expected).abs().max())


def pids(engine) -> list[int]:
    return [e.process.pid for e in engine._fleet.engines]


def test_weights_arrive_and_logprobs_are_theirs(engine, prompts):
    before = sample(engine, prompts)
    assert [r.version for r in before] == [0] * 32
    assert [(r.prompt.id, r.sample) for r in before] == [(p.id, s) for p in prompts for s in range(8)]
    assert largest_difference("miniature:base", before) < 1e-4
    engine.load_weights(Checkpoint("miniature:expert"), 1)
    finished: list[Rollout] = []
    after = sample(engine, prompts, on_finished=finished.append)
    assert {r.version for r in after} == {1} and len(finished) == 32
    assert largest_difference("miniature:expert", after) < 1e-4
    assert largest_difference("miniature:base", after) > 0.1
    again = sample(engine, prompts)
    assert [r.token_ids for r in again] == [r.token_ids for r in after]


def test_weights_change_under_running_requests(engine, prompts):
    engine.load_weights(Checkpoint("miniature:base"), 2)
    ticket = engine.submit(prompts * 20, samples=4, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=3)
    engine.load_weights(Checkpoint("miniature:expert"), 3)
    rollouts = engine.collect(ticket)
    assert len(rollouts) == 320 and {r.version for r in rollouts} <= {2, 3}


def forward(model: str, rollouts: list[Rollout]) -> tuple[Tensor, ...]:
    """float32 logprobs [L] of each rollout's tokens under a checkpoint."""
    lm = load_causal_lm(model, dtype="float32", attention="sdpa", vocab_size=None)
    tokens = pack([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts])
    with torch.no_grad():
        return lm.logprobs(tokens, temperature=1.0).logprob.split([len(r.token_ids) for r in rollouts])


def test_a_partial_batch_carries_its_slowest_on_with_the_logprobs_of_the_weights_that_made_them(engine, prompts):
    from tcopd_fast.rollout.ahead import Ahead

    config = RolloutConfig(
        engine="vllm", samples_per_prompt=4, max_new_tokens=NEW_TOKENS, staleness=1, partial_share=0.8
    )
    engine.load_weights(Checkpoint("miniature:base"), 4)
    # As at step 4 of a run, whose samples may be of version 3 or newer.
    ahead = Ahead(engine, config, lambda step: prompts * 60 if step == 4 else prompts, lambda step: step, steps=6)
    first = ahead.take(4, lambda rollout: None)
    assert 192 <= len(first) < 960 and {r.version for r in first} == {4}
    engine.load_weights(Checkpoint("miniature:expert"), 5)
    rest = ahead.take(5, lambda rollout: None)
    assert len(first) + len(rest) == 960 + 16 and ahead.metrics(5)["rollout/dropped_stale"] == 0
    carried = [r for r in rest if r.version == 4]
    mixed = 0
    for rollout, base, expert in zip(
        carried, forward("miniature:base", carried), forward("miniature:expert", carried), strict=True
    ):
        of_base = (rollout.logprobs - base).abs() < 1e-4
        of_expert = (rollout.logprobs - expert).abs() < 1e-4
        splits = [k for k in range(len(base) + 1) if bool(of_base[:k].all() and of_expert[k:].all())]
        assert splits, "the tokens before the sync have the old weights' logprobs, those after it the new ones'"
        mixed += 0 < splits[0] < len(base)
    assert mixed, "no response was under way at the sync"


def test_an_engine_that_dies_is_replaced_and_its_responses_asked_again(engine, prompts):
    engine.load_weights(Checkpoint("miniature:expert"), 6)
    old = pids(engine)
    ticket = engine.submit(prompts * 20, samples=4, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=4)
    os.killpg(old[0], signal.SIGKILL)
    rollouts = engine.collect(ticket)
    assert len(rollouts) == 320 and {r.version for r in rollouts} == {6}
    engine.load_weights(Checkpoint("miniature:base"), 7)
    assert pids(engine)[0] != old[0] and pids(engine)[1] == old[1]
    after = sample(engine, prompts, samples=16)
    assert {r.version for r in after} == {7} and largest_difference("miniature:base", after) < 1e-4


def test_all_engines_die_in_mid_generation(engine, prompts):
    old = pids(engine)
    ticket = engine.submit(prompts * 20, samples=4, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=5)
    for pid in old:
        os.killpg(pid, signal.SIGKILL)
    rollouts = engine.collect(ticket)
    assert not set(pids(engine)) & set(old)
    assert len(rollouts) == 320 and {r.version for r in rollouts} == {7}
    assert largest_difference("miniature:base", rollouts) < 1e-4


def test_an_engine_that_hangs_is_killed(engine, prompts):
    old = pids(engine)
    os.killpg(old[1], signal.SIGSTOP)
    rollouts = sample(engine, prompts, seed=6)
    assert len(rollouts) == 32
    engine.load_weights(Checkpoint("miniature:base"), 8)
    assert pids(engine)[0] == old[0] and pids(engine)[1] != old[1]


def engine_groups(trainer: int) -> list[int]:
    """Process groups of the engines that a trainer process started."""
    children = psutil.Process(trainer).children()
    return [c.pid for c in children if "tcopd_fast.rollout.leash" in c.cmdline()]


def test_a_run_generates_ahead_and_survives_its_engine(tmp_path):
    """Two ranks, one engine, one batch ahead; the engine is killed after the second step."""
    words = ["--config", str(ROOT / "configs" / "miniature.yaml"), f"run_dir={tmp_path / 'run'}", "steps=6"]
    words += ["rollout.engine=vllm", "rollout.vllm.mode=server", "rollout.staleness=1", "eval.data=[]"]
    words += ["rollout.prompts_per_step=24", "checkpoint.every=0", "logging.tensorboard=false", "learner.zero_stage=3"]
    words += [f"rollout.vllm.kv_cache_memory_bytes={32 << 20}"]
    processes = start(words, size=2)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and len(lines(metrics)) >= 2):
        assert time.monotonic() < end and processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    (group,) = engine_groups(processes[0].pid)
    os.killpg(group, signal.SIGKILL)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    rows = lines(metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["rollout/engine_restarts"] == 1
    # Step s trains weights s − 1 on samples of weights s − 2, or newer ones where they were asked for again.
    for row in rows:
        assert max(0, row["step"] - 2) <= row["rollout/version"] <= row["step"] - 1
        assert row["batch/tokens"] > 24 and abs(row["loss/mismatch_weight_mean"] - 1) < 0.2
    assert any(row["rollout/version"] == row["step"] - 2 for row in rows)
    assert not psutil.pid_exists(group)
    steps = load(tmp_path / "run")
    assert all(list(step.tracks) == ["rank 0", "rank 1", "engine 0"] for step in steps)
    # Every response is trained on, and the engine's track counts each once, whichever rank asked for it.
    returned = sum(span.tokens for step in steps for span in step.tracks["engine 0"])
    assert returned == sum(row["batch/tokens"] for row in rows)
    assert any(row["rollout/overlap_share"] for row in rows)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="binds two workers to two cores")
def test_both_workers_of_a_tensor_parallel_engine_get_their_part_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    words = ["--config", str(ROOT / "configs" / "miniature.yaml"), f"run_dir={tmp_path / 'run'}", "steps=3"]
    words += ["rollout.engine=vllm", "rollout.vllm.mode=server", "rollout.vllm.server.tensor_parallel_size=2"]
    words += ["rollout.prompts_per_step=24", f"rollout.vllm.kv_cache_memory_bytes={32 << 20}", "eval.data=[]"]
    run([*words, "checkpoint.every=0", "logging.tensorboard=false", "learner.lr=1e-3"])
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["rollout/version"] for row in rows] == [0, 1, 2]
    # exp(log π_old − log π_rollout) is 1 where the engine has the learner's weights.
    assert all(abs(row["loss/mismatch_weight_mean"] - 1) < 1e-4 for row in rows)


def test_engines_end_with_the_trainer(tmp_path):
    """A killed parent takes its engine's whole process group along."""
    import subprocess
    import sys

    script = (
        "import os, sys, time\n"
        "from tcopd_fast.rollout.fleet import spawn\n"
        "log = open(sys.argv[1], 'wb')\n"
        "child = spawn([sys.executable, '-c', 'import time; time.sleep(600)'], dict(os.environ), log)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError("the engine's process group outlived its trainer")


def test_an_engine_that_cannot_start_is_named(tmp_path):
    from tcopd_fast.rollout.fleet import Fleet

    server = VllmServerConfig(options="--no-such-option", start_timeout_s=120)
    config = RolloutConfig(engine="vllm", vllm=VllmConfig(mode="server", server=server))
    fleet = Fleet(config, "miniature:base", "float32", 64, 0, tmp_path)
    with pytest.raises(UserError, match=r"rollout engine 0 ended with status .* see .*rollout_engine_0.log"):
        fleet.start()
