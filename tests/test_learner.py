"""The learner under real DeepSpeed, in a process of its own (DeepSpeed and torch.distributed are process-wide)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from running import environment, write_config

from tcopd_fast.dist import free_port

SCRIPT = """
import sys, torch
from tcopd_fast.config_io import load_config
from tcopd_fast.dist import init_world
from tcopd_fast.learner import Learner
from tcopd_fast.models import check_models

world, config = init_world(), load_config(sys.argv[1])
learner = Learner(config, check_models(config), world)
buffers = {name.split(".")[-1]: buffer.dtype for name, buffer in learner.lm.named_buffers()}
assert buffers["inv_freq"] == torch.float32, buffers
weights = dict(learner.named_weights())
assert {w.dtype for w in weights.values()} == {torch.bfloat16}
assert all(name.startswith("model.") for name in weights), "tied head: embeddings only, Hugging Face names"
print("whole", sum(w.numel() for w in weights.values()))
world.leave()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_keeps_rope_in_float32_and_gives_whole_weights(tiny, tmp_path, stage):
    """RoPE frequencies rounded to bfloat16 would shift logprobs more with every position."""
    tree = tiny.tree(tmp_path / "run", model={"dtype": "bfloat16"}, learner={"zero_stage": stage})
    config = write_config(tmp_path / "c.yaml", tree)
    command = [sys.executable, "-c", SCRIPT, str(config)]
    done = subprocess.run(command, env=environment(0, 1, free_port()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from tiny import make_model

    expected = sum(p.numel() for p in make_model(0).parameters())
    assert f"whole {expected}" in done.stdout
