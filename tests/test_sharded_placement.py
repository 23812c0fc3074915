"""ZeRO-3 inference of frozen models: same scores as resident ones, a share of the weights on every rank."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from running import environment, learning, lines, run, write_config
from transformers import AutoModelForCausalLM, LlamaConfig

from tcopd_fast.dist import free_port


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True])
def test_a_run_with_sharded_teachers_equals_one_with_resident_teachers(tiny, tmp_path, host):
    """Uneven shares, a teacher that only some domains use (so that ranks need it at different times), evaluation."""
    rows = {}
    for placement in ("resident", "sharded"):
        tree = tiny.tree(
            tmp_path / placement,
            objective={"lambdas": {"even": {"expert": 1.5}, "odd": {"expert": 1.0, "anti": -0.5}}},
            rollout={"prompts_per_step": 3},
            scoring={"placement": placement, "max_tokens_per_forward": 20, "shards_on_host": host},
            eval={"data": [{"path": str(tiny.prompts), "limit": 3}]},
            learner={"zero_stage": 3},
        )
        words = ["--config", str(write_config(tmp_path / f"{placement}.yaml", tree))]
        output = run(words, size=2)
        assert f"scoring by expert: {placement} (configured)" in output
        rows[placement] = [learning(row) for row in lines(tmp_path / placement / "metrics.jsonl")]
        rows[placement] += lines(tmp_path / placement / "eval.jsonl")
    assert len(rows["sharded"]) == len(rows["resident"]) > 2
    for got, expected in zip(rows["sharded"], rows["resident"], strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert (
                got[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) if isinstance(value, float) else True
            )


MEMORY = """
import json, sys
from tcopd_fast.dist import init_world
from tcopd_fast.packing import pack
from tcopd_fast.scoring.sharded import ShardedLM
world = init_world()
lms = [ShardedLM(path, world, dtype="float32", host=False, attention="sdpa", vocab_size=None) for path in sys.argv[1:]]
for lm in lms:
    lm([pack([[3, 4, 5]], [[6, 7]])], 1.0)
held = sum(p.ds_tensor.numel() * 4 for lm in lms for p in lm.engine.module.parameters())
print("RESULT", json.dumps(held), flush=True)
world.leave()
"""


@pytest.mark.slow
def test_the_weights_that_a_rank_holds_fall_with_the_ranks(tmp_path):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "m")
    weights = (tmp_path / "m" / "model.safetensors").stat().st_size

    def measure(size):
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", MEMORY, str(tmp_path / "m")],
                env=environment(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=300) for process in processes]
        assert all(process.returncode == 0 for process in processes), outputs
        found = [json.loads(line[7:]) for out, _ in outputs for line in out.splitlines() if line.startswith("RESULT")]
        assert len(found) == size
        return max(found)

    assert measure(1) == pytest.approx(weights, rel=0.02)
    assert measure(2) == pytest.approx(weights / 2, rel=0.02)
