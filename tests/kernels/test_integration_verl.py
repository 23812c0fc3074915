"""The switch for verl, through its actor's own training step: same numbers as before the switch, and no logits."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from integration_models import BATCH, LENGTH, MODELS, TOLERANCE, VOCAB, assert_same, batch, gradients, installed
from oracle import Allocations, assert_no_worse_than_torch, leaves, make_problem, plain_logprob
from ranks import run_ranks
from tcopd_kernels import linear_logprob

PROMPTS, RESPONSES = (3, 2, 4), (6, 4, 1)
TOKENS = sum(PROMPTS) + sum(RESPONSES)


@pytest.fixture
def ours():
    """The verl switch, undone at the end whatever the test did."""
    installed("verl")
    from tcopd_kernels.integrations import verl as switch

    yield switch
    switch.unpatch_verl()


@pytest.fixture
def kernel_calls(ours, monkeypatch):
    """Numbers of rows for which verl asked linear_logprob."""
    rows: list[int] = []

    def spy(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return linear_logprob(hidden, *args, **kwargs)

    monkeypatch.setattr(ours, "linear_logprob", spy)
    return rows


def fused(model, implementation="torch"):
    """`model` with verl's fused forward, which verl puts on the class: here on a class of this model alone."""
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    model.__class__ = type(type(model).__name__, (type(model),), {})
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=implementation)
    return model


def micro_batch(remove_padding):
    from verl.utils import tensordict_utils

    def jagged(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    generator = torch.Generator().manual_seed(5)
    lengths = list(zip(PROMPTS, RESPONSES, strict=True))
    rows = [torch.randint(3, VOCAB, (p + r,), generator=generator) for p, r in lengths]
    tensors = {
        "input_ids": jagged(rows),
        "position_ids": jagged([torch.arange(len(row)) for row in rows]),
        "prompts": jagged([row[:p] for row, p in zip(rows, PROMPTS, strict=True)]),
        "responses": jagged([row[p:] for row, p in zip(rows, PROMPTS, strict=True)]),
        "response_mask": jagged([torch.ones(r, dtype=torch.long) for r in RESPONSES]),
        "old_log_probs": jagged([-6 + 0.3 * torch.randn(r, generator=generator) for r in RESPONSES]),
        "advantages": jagged([torch.randn(r, generator=generator) for r in RESPONSES]),
    }
    settings = {
        "temperature": 0.7, "use_fused_kernels": True, "use_remove_padding": remove_padding, "calculate_entropy": True,
        "dp_size": 1, "batch_num_tokens": sum(RESPONSES), "global_batch_size": len(rows),
    }  # fmt: skip
    return tensordict_utils.get_tensordict(tensors, non_tensor_dict=settings)


def actor_step(model, monkeypatch, remove_padding=True, dtype=torch.float32):
    """Logprobs, entropies, loss and gradients of one micro-batch of verl's FSDP actor, on one process and a CPU."""
    from verl.workers.config import ActorConfig
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.utils.losses import ppo_loss

    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    engine = object.__new__(transformer_impl.FSDPEngineWithLMHead)  # without FSDP, which wants an accelerator
    engine.module, engine._autocast_dtype = model, dtype
    engine.use_ulysses_sp, engine.ulysses_device_mesh, engine.pad_to_length = False, None, False
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, entropy_coeff=0.3)
    loss, output = engine.forward_step(micro_batch(remove_padding), functools.partial(ppo_loss, config), False)
    values = (output["model_output"][name].values() for name in ("log_probs", "entropy"))
    return *values, loss.detach(), gradients(model, loss)


@pytest.mark.parametrize(
    ("implementation", "before", "remove_padding"),
    [("torch", "torch", True), ("torch", "torch", False), ("liger", "liger", True), ("triton", "torch", True)],
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_actor_step_gives_the_same_loss_and_gradients(
    ours, kernel_calls, small_tiles, monkeypatch, kind, implementation, before, remove_padding
):
    """verl's Triton kernel needs a GPU, so what takes its place is compared with verl's torch implementation.

    Without the removal of padding verl reads a second dimension of that kernel's result, which has one.
    """
    expected = actor_step(fused(MODELS[kind](), before), monkeypatch, remove_padding)
    assert not kernel_calls
    model = fused(MODELS[kind](), implementation)
    ours.patch_verl()
    values = actor_step(model, monkeypatch, remove_padding)
    assert kernel_calls == [TOKENS if remove_padding else 3 * 9]
    for value, true in zip(values[:3], expected[:3], strict=True):
        assert value.dtype == true.dtype
        torch.testing.assert_close(value, true, **TOLERANCE)
    assert_same(values[3], expected[3])


def test_actor_step_in_bf16_is_near_that_of_verl(ours, kernel_calls, monkeypatch):
    model = fused(MODELS["untied"]().bfloat16())
    expected = actor_step(model, monkeypatch, dtype=torch.bfloat16)
    ours.patch_verl()
    values = actor_step(model, monkeypatch, dtype=torch.bfloat16)
    assert kernel_calls == [TOKENS]
    for value, true in zip(values[:3], expected[:3], strict=True):
        assert value.dtype == true.dtype
        torch.testing.assert_close(value, true, rtol=2**-6, atol=2**-6)
    for name, grad in values[3].items():
        difference = (grad.double() - expected[3][name].double()).norm() / expected[3][name].double().norm()
        assert difference < 2**-5, f"{name}: {difference}"


def run_head(implementation, dtype, upstream, problem):
    """(logprob, entropy, their gradients in hidden and weight) of verl's head, [B, T] tokens."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight, targets = problem
    inputs = leaves((hidden.view(2, -1, hidden.shape[1]), weight), dtype)
    outputs = FusedLinearForPPO(impl_backend=implementation)(*inputs, targets.view(2, -1), 0.7)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs)])]


@pytest.mark.parametrize("implementation", ["torch", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_is_no_less_accurate_than_that_of_verl(ours, implementation, dtype):
    hidden, weight, _, targets = make_problem(26, 301, 24)
    upstream = torch.randn(2, 2, 13).bfloat16()
    expected = run_head(implementation, dtype, upstream, (hidden, weight, targets))
    ours.patch_verl()
    values = run_head(implementation, dtype, upstream, (hidden, weight, targets))
    exact = leaves((hidden.to(dtype), weight.to(dtype)), torch.float64)
    logprob, _, entropy = plain_logprob(*exact, targets, temperature=0.7)
    truth = [logprob, entropy, *torch.autograd.grad((logprob, entropy), exact, upstream.double().view(2, -1).unbind())]
    for name, value, verls, true in zip(("logprob", "entropy", "dH", "dW"), values, expected, truth, strict=True):
        assert value.dtype == verls.dtype and value.shape == verls.shape
        assert_no_worse_than_torch(value, verls, true.detach().view(value.shape), name)


def test_verls_forward_makes_no_logits(ours, small_tiles):
    model, inputs = fused(MODELS["untied"]()), batch()
    del inputs["labels"]

    def largest_allocation():
        with Allocations() as seen:
            outputs = model(**inputs, temperature=0.7, return_dict=True)
            (outputs.log_probs + outputs.entropy).sum().backward()
        return max(seen.sizes)

    logits = BATCH * LENGTH * VOCAB
    assert largest_allocation() >= logits
    ours.patch_verl()
    assert largest_allocation() == model.lm_head.weight.numel() < logits


def test_triton_function_keeps_its_shapes_reductions_and_errors(ours):
    from verl.utils.kernel import linear_cross_entropy as module

    ours.patch_verl()
    hidden, weight, _, targets = make_problem(6, 301, 24)
    logprob, _, entropy = plain_logprob(hidden, weight, targets, temperature=0.5)
    arguments = hidden.view(3, 2, 24), weight, targets.view(3, 2), 0.5
    for reduction, true in (("none", logprob), ("Sum", logprob.sum()), ("mean", logprob.mean())):
        value = module.linear_cross_entropy(*arguments, reduction, None)
        torch.testing.assert_close(value, (true, entropy), rtol=1e-5, atol=1e-5)
    assert module.linear_cross_entropy(hidden[:0], weight, targets[:0])[0].shape == (0,)
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'max'"):
        module.linear_cross_entropy(*arguments, "max")
    with pytest.raises(ValueError, match=r"\[5\] labels do not fit hidden states of shape \[6, 24\]"):
        module.linear_cross_entropy(hidden, weight, targets[:5])


SHARD_UPSTREAM = torch.linspace(-1, 2, 28).view(2, 14)


def run_sharded_function():
    """Logprob, entropy and their gradients in hidden and in this rank's half of the head."""
    from tcopd_kernels.integrations.verl import patch_verl
    from verl.utils.kernel import linear_cross_entropy as module

    patch_verl()
    hidden, weight, _, targets = make_problem(14, 302, 24)
    inputs = leaves((hidden.view(2, 7, 24), weight.chunk(2)[dist.get_rank()]), torch.float32)
    outputs = module.linear_cross_entropy(*inputs, targets.view(2, 7), 0.7, "none", dist.group.WORLD)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, SHARD_UPSTREAM.unbind())]


def test_vocabulary_parallel_ranks_hold_parts_of_the_gradient(ours, tmp_path):
    """As in Megatron, whose sequence-parallel region sums the gradient of the hidden states over the ranks."""
    ranks = run_ranks(run_sharded_function, 2, tmp_path)
    hidden, weight, _, targets = make_problem(14, 302, 24)
    inputs = leaves((hidden, weight), torch.float32)
    logprob, _, entropy = plain_logprob(*inputs, targets, temperature=0.7)
    grad_hidden, grad_weight = torch.autograd.grad((logprob, entropy), inputs, SHARD_UPSTREAM.unbind())
    for own_logprob, own_entropy, _, _ in ranks:
        torch.testing.assert_close(own_logprob, logprob, **TOLERANCE)
        torch.testing.assert_close(own_entropy, entropy, **TOLERANCE)
    torch.testing.assert_close(sum(rank[2] for rank in ranks).view(14, 24), grad_hidden, **TOLERANCE)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), grad_weight, **TOLERANCE)


def test_patch_reaches_everything_that_holds_the_originals_and_is_idempotent(ours, monkeypatch):
    from verl.models.transformers import dense_common, qwen3_vl
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as triton_head

    importer = types.ModuleType("verl.models.mcore.importer")  # as Megatron's modules import the function
    importer.fused = triton_head.linear_cross_entropy
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    earlier, early_reader = fused(MODELS["tied"](), "torch"), fused(MODELS["tied"](), "triton")

    def everything():
        return (
            FusedLinearForPPO.forward, triton_head.linear_cross_entropy, importer.fused,
            dense_common.forward_with_torch_backend, qwen3_vl.forward_with_triton_backend,
            type(earlier).forward, type(early_reader).forward,
        )  # fmt: skip

    original = everything()
    ours.patch_verl()
    ours.patch_verl(backend="reference")
    assert not set(original) & set(everything())
    assert importer.fused is triton_head.linear_cross_entropy
    assert type(earlier).forward is dense_common.forward_with_torch_backend
    later = fused(MODELS["tied"]())
    assert type(later).forward.__wrapped__ is original[3]
    with monkeypatch.context() as patch:
        patch.setattr(ours, "linear_logprob", lambda *args, **kwargs: pytest.fail(str(kwargs)))
        with pytest.raises(pytest.fail.Exception, match=r"'backend': 'reference', 'grad_tol': 0\.0"):
            importer.fused(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]))
    ours.unpatch_verl()
    ours.unpatch_verl()
    assert everything() == original
    assert type(later).forward is original[3]


def test_a_worker_can_switch_on_through_an_external_module(ours, tmp_path):
    """verl imports the modules named in VERL_USE_EXTERNAL_MODULES while it is itself being imported."""
    (tmp_path / "switch_on.py").write_text(
        "from tcopd_kernels.integrations.verl import patch_verl\npatch_verl(grad_tol=0.01)\n"
    )
    code = (
        "import verl\nfrom verl.utils.experimental.torch_functional import FusedLinearForPPO as head\n"
        "print(head.forward.__module__)"
    )
    paths = [str(tmp_path), *sys.path]
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "switch_on", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == ours.__name__


def test_what_verls_forward_would_skip_is_refused(ours, monkeypatch):
    peft = installed("peft")
    ours.patch_verl()
    for kind, message in (
        ("softcapped", r"Gemma2ForCausalLM would leave out config.final_logit_softcapping=3.0; set use_fused"),
        ("multiplied", r"CohereForCausalLM would leave out config.logit_scale=0.25"),
        ("divided", r"GraniteForCausalLM would leave out config.logits_scaling=8.0"),
        ("biased", r"would leave out the bias of lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            actor_step(fused(MODELS[kind]()), monkeypatch)
    for implementation in ("torch", "triton"):
        model = fused(MODELS["untied"](), implementation)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
        with pytest.raises(TypeError, match=r"lm_head of Qwen3ForCausalLM is peft.tuners.lora.layer.Linear; .* skip"):
            actor_step(model, monkeypatch)


def test_adapters_in_the_decoder_and_a_saved_head_are_honoured(ours, kernel_calls, small_tiles, monkeypatch):
    peft = installed("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], r=2)
    model = peft.get_peft_model(fused(MODELS["untied"]()), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    *expected, expected_grads = actor_step(model, monkeypatch)
    ours.patch_verl()
    *values, grads = actor_step(model, monkeypatch)
    assert kernel_calls == [TOKENS]
    for value, true in zip(values, expected, strict=True):
        torch.testing.assert_close(value, true, **TOLERANCE)
    assert any("lm_head" in name for name in grads) and any("lora" in name for name in grads)
    assert_same(grads, expected_grads)


def test_sharded_heads_are_refused(ours):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    ours.patch_verl()
    weight = torch.randn(12, 8)
    weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"):
        FusedLinearForPPO()(torch.randn(3, 8), weight, torch.tensor([0, 5, 11]))


def test_unknown_versions_of_verl_are_refused_by_version(ours, monkeypatch):
    import verl
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    original = FusedLinearForPPO.forward
    changes = [((verl, "__version__", version), "an unknown version") for version in ("0.7.1", "0.10.0", "1.0.0")]
    changes += [
        ((FusedLinearForPPO, "forward", lambda self, hidden: hidden), r"FusedLinearForPPO.forward takes .*expected"),
        ((LinearCrossEntropy, "forward", lambda ctx, hidden: hidden), r"LinearCrossEntropy.forward takes .*expected"),
    ]
    for change, message in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            with pytest.raises(
                RuntimeError, match=f"does not support verl .*: {message}.*; it was written for 0.8 <= "
            ):
                ours.patch_verl()
        assert FusedLinearForPPO.forward is original
