"""More prompt tokens at once than one step of vLLM takes: no seeded request may be cut there on a CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from running import environment

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import free_port
from tcopd_fast.rollout.server_command import EngineSpec, command

PROGRAM = """
from tcopd_fast.config_sections import RolloutConfig, VllmConfig
from tcopd_fast.dist import init_world
from tcopd_fast.models import load_tokenizer
from tcopd_fast.rollout.vllm_engine import VllmEngine
from tcopd_fast.types import Prompt

world = init_world()
tokenizer = load_tokenizer("miniature:base")
config = RolloutConfig(engine="vllm", vllm=VllmConfig(kv_cache_memory_bytes=64 << 20, max_num_seqs=512))
engine = VllmEngine(
    "miniature:base", tokenizer, config=config, dtype="float32", max_model_len=64, seed=0, device=world.device
)
ids = tuple(tokenizer("M:47+38-19+12=")["input_ids"])
prompts = [Prompt(str(i), "d", ids, "", None, "test") for i in range(600)]
rollouts = engine.generate(prompts, samples=1, max_new_tokens=4, temperature=1.0, seed=1)
print("sampled", len(rollouts), "of", len(ids) * len(prompts), "prompt tokens")
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm")
def test_a_large_batch_of_seeded_prompts():
    variables = environment(0, 1, free_port())
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=False)
    assert "sampled 600 of 8400 prompt tokens" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_engines_apart_get_the_same_setting(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = EngineSpec.of_run(RolloutConfig(engine="vllm"), "miniature:base", "float32", 64, 0, False)
    assert "--no-enable-chunked-prefill" in command(spec, "127.0.0.1", 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "--no-enable-chunked-prefill" not in command(spec, "127.0.0.1", 1)
