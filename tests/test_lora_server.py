"""A LoRA student whose rollouts come one batch ahead from a vLLM server: its engine samples from the merged weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from forked import context, end_all, started
from running import write_config

from tcopd_fast.cli import main
from tcopd_fast.models import load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.types import Rollout

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm"),
]
STEPS = 4


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def train_and_keep(config: Path, log: Path, out: Path) -> None:
    """A training run that keeps the rollouts of every step, to be called in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    from tcopd_fast import trainer
    from tcopd_fast.config_io import load_config

    kept: list[list[Rollout]] = []
    generate = trainer.generate
    trainer.generate = lambda *words: kept.append(generate(*words)) or kept[-1]
    trainer.train(load_config(str(config), []))
    torch.save(kept, out)


def logprobs(model: Path, rollouts: list[Rollout]) -> tuple[torch.Tensor, ...]:
    """float32 [L] of each rollout under a checkpoint, by the trainer's own forward."""
    lm = load_causal_lm(str(model), dtype="float32", attention="sdpa", vocab_size=None)
    tokens = pack([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts])
    with torch.no_grad():
        return lm.logprobs(tokens, temperature=1.0).logprob.split([len(r.token_ids) for r in rollouts])


def test_every_token_has_the_logprob_of_the_merged_weights_that_sampled_it(tiny, tmp_path):
    """Within 1e-4 nats of the checkpoints, each merged by `tcopd export`; a sync may fall into a response."""
    engine = {"engine": "vllm", "staleness": 1, "vllm": {"mode": "server", "kv_cache_memory_bytes": 1 << 25}}
    tree = tiny.tree(
        tmp_path / "run", steps=STEPS, model={"lora": {"rank": 4, "alpha": 8}}, learner={"lr": 0.05},
        rollout={**engine, "prompts_per_step": 16}, checkpoint={"every": 1, "keep_last": STEPS},
    )  # fmt: skip
    config, log, out = write_config(tmp_path / "c.yaml", tree), tmp_path / "log", tmp_path / "rollouts.pt"
    process = context().Process(target=train_and_keep, args=(config, log, out))
    process.start()
    started.append(process)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    students = [tiny.student]
    for step in range(1, STEPS):
        students.append(tmp_path / f"step{step}")
        assert main(["export", str(tmp_path / "run"), "--step", str(step), "--out", str(students[-1])]) == 0
    steps: list[list[Rollout]] = torch.load(out, weights_only=False)
    assert [len(rollouts) for rollouts in steps] == [16] * STEPS
    for step, rollouts in enumerate(steps):
        assert {r.version for r in rollouts} <= {max(0, step - 1), step}
        under = [logprobs(folder, rollouts) for folder in students]
        for i, rollout in enumerate(rollouts):
            before = (rollout.logprobs - under[rollout.version][i]).abs() < 1e-4
            after = (rollout.logprobs - under[min(rollout.version + 1, step)][i]).abs() < 1e-4
            cuts = range(len(before) + 1)
            assert any(before[:k].all() and after[k:].all() for k in cuts), (step, i, rollout)
    old, new = (torch.cat(logprobs(folder, steps[-1])) for folder in students[-2:])
    assert float((old - new).abs().max()) > 0.1, "a step must change what is sampled for a missed sync to show"
    assert any(r.version == step - 1 for step, rollouts in enumerate(steps) for r in rollouts)
    assert max(r.version for r in steps[-1]) >= 2, "and be sampled from"
