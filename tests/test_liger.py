"""Liger's kernels in Triton's interpreter: the same logprobs and gradients, in learner, frozen and streamed models.

In a process of its own: Liger replaces classes of transformers' modules, and Triton reads its switch when imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from running import ROOT, environment, write_config

from tcopd_fast.config import Config, EvalRunConfig
from tcopd_fast.config_io import validate
from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.liger import check_liger
from tcopd_fast.models import check_models

pytest.importorskip("liger_kernel")

# The interpreter neither wraps numbers as the compiler does nor knows CUDA's own rsqrt.
SHIM = """
import numpy, triton.language as tl, triton.runtime.interpreter as interpreter
wrap = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda value: (
    tl.tensor(interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32), tl.float32)
    if isinstance(value, float) else wrap(value)
)
import liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
"""
MODELS = (
    SHIM
    + """
import sys, torch
from tcopd_fast.models import load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.scoring.streamed import StreamedCausalLM
from tcopd_fast.scoring.weights import MappedWeights

tokens = pack([[3, 4, 5], [6, 7]], [[6, 7, 1], [8, 9, 4, 1]])
options = dict(dtype="float32", attention="sdpa", vocab_size=None)

def learn(**more):
    lm = load_causal_lm(sys.argv[1], **options, **more)
    out = lm.logprobs(tokens, temperature=0.7).logprob
    (out * torch.linspace(-1, 1, len(out))).sum().backward()
    return lm, out.detach(), {name: p.grad for name, p in lm.named_parameters()}

plain, expected, gradients = learn()
before = {type(m).__name__ for m in plain.modules()}
liger, found, own = learn(liger=True)
names = {m._get_name() for m in liger.modules()}
assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= names and not any("Liger" in name for name in before), names
assert liger.model.forward.__func__ is type(liger.model).forward, "Liger's fused cross-entropy would replace it"
torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
for name, gradient in gradients.items():
    torch.testing.assert_close(own[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
device = torch.device("cpu")
source = MappedWeights(sys.argv[1], torch.float32, device)
streamed = StreamedCausalLM(sys.argv[1], source, device=device, liger=True, **options)
assert "LigerRMSNorm" in {m._get_name() for layer in streamed.layers for m in layer.modules()}
torch.testing.assert_close(streamed.logprobs([tokens], temperature=0.7)[0].logprob, found, atol=1e-6, rtol=0)
print("equal")
"""
)
RUN = SHIM + "from tcopd_fast.train import main; sys.exit(main(sys.argv[1:]))"


def interpreted(script, *words):
    variables = {**environment(0, 1, free_port()), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "import sys\n" + script, *map(str, words)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_logprobs_and_gradients_agree(tiny):
    assert "equal" in interpreted(MODELS, tiny.student)


def test_a_run_with_an_adapter_and_a_streamed_teacher_passes_its_self_check(tiny, tmp_path):
    """The kernels are in the learner's frozen base, its adapted layers, and the teachers."""
    pytest.importorskip("peft")
    tree = tiny.tree(
        tmp_path / "run", steps=1, model={"liger": True, "lora": {"rank": 4}}, rollout={"prompts_per_step": 2},
        scoring={"placement": "offload"},
    )  # fmt: skip
    out = interpreted(RUN, "--config", write_config(tmp_path / "c.yaml", tree))
    line = next(line for line in out.splitlines() if line.startswith("self-check"))
    assert float(line.split(" by ")[1].split()[0]) < 1e-5, line
    assert "step 1/1" in out


def test_what_liger_cannot_run_is_refused_before_weights_are_read(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = validate(tiny.tree(tmp_path, model={"liger": True}), Config)
    with pytest.raises(UserError, match=r"model\.liger=true: Liger's kernels need a GPU, and none was found"):
        check_models(config)
    with pytest.raises(UserError, match=r"model X: Liger knows no model of type gpt2"):
        check_liger("X", "gpt2")
    assert "TRITON_INTERPRET" not in os.environ


def test_without_the_package_the_run_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tcopd_fast.config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.liger=true: needs the package liger_kernel"):
        validate(tiny.tree(tmp_path, model={"liger": True}), Config)


def test_evaluation_takes_no_liger(tiny):
    tree = {"model": {"path": str(tiny.student), "liger": True}, "data": {"train": [{"path": str(tiny.prompts)}]}}
    with pytest.raises(UserError, match=r"model\.liger=true: is for training"):
        validate(tree, EvalRunConfig)
