"""The switch for TRL, against a real GRPOTrainer: same numbers as before the switch, and no logits."""

from __future__ import annotations

import pytest
import torch
from integration_models import BATCH, MODELS, TOLERANCE, VOCAB, assert_same, batch, gradients, installed
from oracle import Allocations
from tcopd_kernels import linear_logprob
from tiny import make_tokenizer


@pytest.fixture
def ours():
    """The TRL switch, undone at the end whatever the test did."""
    installed("trl")
    from tcopd_kernels.integrations import trl as switch

    yield switch
    switch.unpatch_trl()


@pytest.fixture
def kernel_calls(ours, monkeypatch):
    """Numbers of rows for which TRL asked linear_logprob."""
    rows: list[int] = []

    def spy(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return linear_logprob(hidden, *args, **kwargs)

    monkeypatch.setattr(ours, "linear_logprob", spy)
    return rows


def make_trainer(model, folder, peft_config=None, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_generations=BATCH, max_completion_length=12,
        temperature=0.9, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **options,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1", "2+3"]}),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def grpo_inputs() -> dict[str, torch.Tensor]:
    prompt, completion = batch()["input_ids"].split([4, 12], dim=1)
    prompt_mask, completion_mask = torch.ones_like(prompt), torch.ones_like(completion)
    prompt_mask[1, :2] = 0
    completion_mask[2, 7:] = 0
    generator = torch.Generator().manual_seed(9)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "advantages": torch.randn(BATCH, generator=generator),
        "old_per_token_logps": -6 + torch.randn(BATCH, 12, generator=generator),
        "num_items_in_batch": completion_mask.sum(),
    }


def grpo_step(trainer):
    """Logprobs, entropies, loss and gradients of one microbatch, as the trainer computes them."""
    inputs = grpo_inputs()
    trainer.current_gradient_accumulation_steps = 1
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, attention_mask, 12, batch_size=3, compute_entropy=True
        )
    loss = trainer.compute_loss(trainer.model, inputs)
    return logps, entropies, loss.detach(), gradients(trainer.model, loss)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tied", {}),
        ("untied", {"entropy_coef": 0.3}),
        ("softcapped", {}),
        ("softcapped, later family", {}),
        ("multiplied", {"entropy_coef": 0.3}),
        ("divided", {}),
        ("multiplied by what others divide by", {}),
        ("biased", {"cast_lm_head_to_fp32": True}),
    ],
)
def test_grpo_trainer_gives_the_same_loss_and_gradients(ours, kernel_calls, small_tiles, tmp_path, kind, options):
    trainer = make_trainer(MODELS[kind](), tmp_path, **options)
    before = grpo_step(trainer)
    assert not kernel_calls
    ours.patch_trl()
    after = grpo_step(trainer)
    # Two calls to score 4 sequences three at a time, one for the loss; a CPU scores every position.
    assert kernel_calls == [3 * 15, 15, 4 * 15]
    for value, expected in zip(after[:3], before[:3], strict=True):
        torch.testing.assert_close(value, expected, **TOLERANCE)
    assert_same(after[3], before[3])


@pytest.mark.parametrize("kind", ["untied", "softcapped"])
def test_adapters_in_the_decoder_and_a_saved_head_are_honoured(ours, kernel_calls, small_tiles, tmp_path, kind):
    peft = installed("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], r=2)
    trainer = make_trainer(MODELS[kind](), tmp_path, peft_config=config)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    before = grpo_step(trainer)
    ours.patch_trl()
    after = grpo_step(trainer)
    assert kernel_calls
    for value, expected in zip(after[:3], before[:3], strict=True):
        torch.testing.assert_close(value, expected, **TOLERANCE)
    assert any("lm_head" in name for name in after[3]) and any("lora" in name for name in after[3])
    assert_same(after[3], before[3])


def test_lora_on_the_head_is_refused(ours, tmp_path):
    """TRL refuses it itself; should a version stop doing so, the adapter must not be skipped in silence."""
    peft = installed("peft")
    ours.patch_trl()
    with pytest.raises(ValueError, match="lm_head` is not supported"):
        make_trainer(MODELS["untied"](), tmp_path, peft_config=peft.LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_patched_grpo_makes_no_logits(ours, small_tiles, tmp_path):
    trainer = make_trainer(MODELS["untied"](), tmp_path)
    logits = BATCH * 12 * VOCAB
    with Allocations() as seen:
        grpo_step(trainer)
    assert max(seen.sizes) >= logits

    ours.patch_trl()
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    with Allocations() as seen:
        grpo_step(trainer)
    assert not calls
    assert max(seen.sizes) == trainer.model.lm_head.weight.numel() < logits


def test_a_whole_grpo_training_step_is_the_same(ours, kernel_calls, tiny, tmp_path):
    weights = []
    for patch in (False, True):
        if patch:
            ours.patch_trl()
        trainer = make_trainer(
            str(tiny.student), tmp_path, max_steps=1, learning_rate=0.1, optim="sgd", beta=0.1, seed=4,
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert len(kernel_calls) == 2  # the reference model and the policy
    assert any(not torch.equal(start[name], value) for name, value in weights[1].items())
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][name], **TOLERANCE)


def test_patch_is_idempotent_and_can_be_undone(ours):
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction
    ours.patch_trl()
    ours.patch_trl(backend="reference")
    assert utils._ChunkedLogProbFunction.original is original
    assert utils._ChunkedLogProbFunction.backend == "reference"
    ours.unpatch_trl()
    ours.unpatch_trl()
    assert utils._ChunkedLogProbFunction is original


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logit_scale_bias_softcap_and_empty_batches_mean_what_they_mean_in_trl(ours, softcap):
    from trl.trainer import utils

    leaves = [torch.randn(shape, requires_grad=True) for shape in ((7, 16), (33, 16), (33,))]
    targets = torch.randint(33, (7,))
    for rows in (7, 0):
        results = []
        for patched in (False, True):
            if patched:
                ours.patch_trl()
            hidden, weight, bias = leaves
            logprob, entropy, *rest = utils._ChunkedLogProbFunction.apply(
                hidden[:rows], weight, bias, targets[:rows], 0.7, 10, softcap, 0.3, ("log_probs", "entropy")
            )
            grads = torch.autograd.grad((logprob + 2 * entropy).sum(), leaves)
            results.append([logprob, entropy, *grads])
            assert rest == [None, None, None]
        ours.unpatch_trl()
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_other_statistics_stay_with_trl_and_sharded_heads_are_refused(ours, kernel_calls):
    from trl.trainer import utils

    hidden, weight, targets = torch.randn(3, 8), torch.randn(12, 8), torch.tensor([0, 5, 11])
    arguments = (hidden, weight, None, targets, 1.0, 12, None, 1.0)
    expected = utils._ChunkedLogProbFunction.apply(*arguments, ("log_probs", "is_top1"))
    ours.patch_trl()
    values = utils._ChunkedLogProbFunction.apply(*arguments, ("log_probs", "is_top1"))
    assert not kernel_calls and torch.equal(values[0], expected[0]) and torch.equal(values[4], expected[4])
    with pytest.raises(ValueError, match=r"logit scale must be positive, got -1.0"):
        utils._ChunkedLogProbFunction.apply(*arguments[:7], -1.0, ("log_probs",))
    weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"):
        utils._ChunkedLogProbFunction.apply(*arguments, ("log_probs",))


def test_versions_of_trl_with_other_functions_are_refused_by_version(ours, monkeypatch):
    import trl
    from trl.trainer import grpo_trainer, utils

    original = utils._ChunkedLogProbFunction

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return hidden

    for owner, name, value, message in (
        (utils, "_ChunkedLogProbFunction", Changed, r"forward takes \('ctx', 'hidden', 'weight', 'targets'\)"),
        (utils, "_ChunkedLogProbFunction", None, "_ChunkedLogProbFunction is None"),
        (utils, "add_fused_lm_head", lambda model: model, "add_fused_lm_head does not call"),
        (grpo_trainer.GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, model: model, "takes .*self"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trl, "__version__", "0.9.9")
            patch.setattr(owner, name, value)
            with pytest.raises(RuntimeError, match=f"does not support trl 0.9.9: .*{message}"):
                ours.patch_trl()
        assert utils._ChunkedLogProbFunction is original
