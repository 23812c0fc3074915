"""Stage 7, learner: DeepSpeed ZeRO 1-3 around the packed student."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcopd_fast.adapter import add_adapter, base_weights, student_tensors
from tcopd_fast.checkpoints import FILES, FileSum, write_file
from tcopd_fast.clock import StageClock
from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.loss import policy_loss
from tcopd_fast.models import HfZero3, ModelSet, PackedCausalLM, first_line, load_causal_lm
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.scoring.weights import WeightSource
from tcopd_fast.types import Batch, Rollout


@dataclass(frozen=True)
class UpdateResult:
    """What one rollout batch taught.

    sums: summable loss metrics of this rank (tcopd_kernels.tcopd_policy_loss names, plus loss and entropy sums).
    maxima: the metrics named *_max on this rank. old_logprobs: float32 [L] per rollout of this rank, the learner's
    own before its first optimizer step on that rollout. grad_norm: of the last optimizer step, before clipping.
    skipped: optimizer steps not taken because the gradient was not finite; skipped_in_a_row: the last so many, those
    of earlier batches included. weights_finite: whether all weights are finite after the update.
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    old_logprobs: list[Tensor]
    grad_norm: float
    lr: float
    skipped: int
    skipped_in_a_row: int
    weights_finite: bool


class Learner:
    """The student under DeepSpeed: logprobs, update, weights, checkpoint."""

    def __init__(self, config: Config, models: ModelSet, world: World) -> None:
        import deepspeed

        self.config = config
        self.world = world
        self.steps_taken = 0
        self.skipped_in_a_row = 0
        settings = deepspeed_config(config)
        with _sharded_loading(settings, config.learner.zero_stage):
            lm = load_causal_lm(
                config.model.path,
                dtype=config.model.dtype,
                attention=config.model.attention,
                vocab_size=models.vocab_size,
                trust_remote_code=config.model.trust_remote_code,
                liger=config.model.liger,
            )
        if config.model.lora is not None:
            add_adapter(lm.model, config.model.lora, config.seed)
        if config.model.gradient_checkpointing:
            lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()
        trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        if config.model.lora is not None:
            # DeepSpeed's buffers for the gradients under way are else made for 500 million weights.
            settings["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in trained)
        optimizer = torch.optim.AdamW(
            trained,
            lr=config.learner.lr,
            betas=config.learner.betas,
            eps=config.learner.eps,
            weight_decay=config.learner.weight_decay,
            # One vectorised pass on the host's cores; torch's plain loop makes several.
            fused=True if config.learner.offload != "none" else None,
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=lm, optimizer=optimizer, config=settings)

    @property
    def lm(self) -> PackedCausalLM:
        """The student; under ZeRO-3 its parameters are whole only inside a forward."""
        return self.engine.module

    @torch.no_grad()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Logprob of every sampled token under the current weights: float32 [L] per rollout, on the CPU."""
        lengths = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts]
        groups = split_by_tokens(lengths, self.config.learner.max_tokens_per_microbatch)
        most = int(self.world.max({"groups": float(len(groups))})["groups"])
        out: dict[int, Tensor] = {}
        for group in groups + [[]] * (most - len(groups)):
            rows = [rollouts[i] for i in group]
            tokens = pack([r.prompt.token_ids for r in rows] or [[0]], [r.token_ids for r in rows] or [[0]])
            scored = self.engine(
                PackedCausalLM.logprobs, tokens.to(self.world.device), temperature=self.config.rollout.temperature
            )
            parts = scored.logprob.cpu().split([len(r.token_ids) for r in rows] or [1])
            out.update((i, part.clone()) for i, part in zip(group, parts, strict=False))
        return [out[i] for i in range(len(rollouts))]

    def update(self, minibatches: Sequence[Sequence[Batch]], rollouts: int, clock: StageClock) -> UpdateResult:
        """Optimizer steps on one rollout batch: one per minibatch and epoch.

        rollouts: how many this rank holds. Stages "loss" (forward) and "learner" (backward, step) are timed apart.
        """
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        skipped, lr = 0, 0.0
        old: dict[int, Tensor] = {}
        for _ in range(self.config.learner.epochs):
            for batches in minibatches:
                for batch in batches:
                    metrics = self._forward_backward(batch, old, clock)
                    for key, value in metrics.items():
                        if key.endswith("_max"):
                            maxima[key] = max(maxima.get(key, 0.0), value)
                        else:
                            sums[key] = sums.get(key, 0.0) + value
                with clock.stage("learner"):
                    lr = self._set_lr()
                    self.engine.step()
                    self.steps_taken += 1
                    applied = self.engine.was_step_applied()
                    skipped += not applied
                    self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        norm = self.engine.get_global_grad_norm()
        # DeepSpeed has no norm, or a stale one, for a step it skipped.
        grad_norm = float("nan") if norm is None or not self.engine.was_step_applied() else float(norm)
        return UpdateResult(
            sums,
            maxima,
            [old[i] for i in range(rollouts)],
            grad_norm,
            lr,
            skipped,
            self.skipped_in_a_row,
            self.weights_finite(),
        )

    def _forward_backward(self, batch: Batch, old: dict[int, Tensor], clock: StageClock) -> dict[str, float]:
        device = self.world.device
        moved = replace(
            batch,
            tokens=batch.tokens.to(device),
            reward=batch.reward.to(device),
            ref_logprob=batch.ref_logprob.to(device),
            rollout_logprob=batch.rollout_logprob.to(device),
            old_logprob=None if batch.old_logprob is None else batch.old_logprob.to(device),
            weights=batch.weights.to(device),
        )
        with clock.stage("loss"):
            loss, metrics, scored = self.engine(policy_loss, moved, self.config)
        with clock.stage("learner"):
            self.engine.backward(loss, scale_wrt_gas=False)
        metrics |= {"loss": loss.detach() / self.world.size, "entropy_sum": scored.entropy.sum()}
        # One transfer for all numbers; a filler has none of its own.
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        out = {key: value if batch.indices else 0.0 for key, value in zip(metrics, values, strict=True)}
        if batch.indices:
            before = batch.old_logprob if batch.old_logprob is not None else scored.logprob.cpu()
            for i, part in zip(batch.indices, before.split(batch.lengths), strict=True):
                old.setdefault(i, part.clone())
        return out

    def _set_lr(self) -> float:
        warmup = self.config.learner.warmup_steps
        scale = min(1.0, (self.steps_taken + 1) / warmup) if warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learner.lr * scale
        return self.config.learner.lr * scale

    @torch.no_grad()
    def weights_finite(self) -> bool:
        """Whether every weight is finite; under ZeRO-3 every rank looks at its shards. A collective."""
        extremes: list[Tensor] = []
        for parameter in self.lm.parameters():
            shard = getattr(parameter, "ds_tensor", parameter).detach().flatten()
            if hasattr(parameter, "ds_numel"):
                # The last shards are padded with whatever was in memory.
                own = parameter.ds_numel - self.world.rank * shard.numel()
                shard = shard[: max(0, own)]
            if shard.numel():
                extremes += shard.aminmax()
        finite = bool(torch.stack(extremes).isfinite().all()) if extremes else True
        return self.world.max({"broken": float(not finite)})["broken"] == 0

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, tied ones once, adapters merged; see `student_tensors`.

        Under ZeRO-3 they are gathered one after another, each with its own factors.
        """
        for tensor in student_tensors(self.lm.model):
            with self._gathered(tensor.parameters()):
                yield tensor.name, tensor.whole()

    def frozen_base(self) -> WeightSource | None:
        """What a LoRA student started from, where it is whole in this process: under ZeRO 1 and 2."""
        if self.config.model.lora is None or self.config.learner.zero_stage == 3:
            return None
        return base_weights(self.lm.model)

    def _gathered(self, parameters: list[Any]) -> Any:
        if self.config.learner.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def save(self, folder: Path) -> dict[str, FileSum]:
        """Write model, optimizer and counters into `folder`; the sums of this rank's files. A collective.

        Raises OSError after the last collective, so that a rank with a full disk leaves no other waiting.
        """
        sums: dict[str, FileSum] = {}
        errors: list[OSError] = []

        # A frozen base is what model.path holds; it is the same in every checkpoint.
        frozen = self._frozen()

        def write(state_dict: Any, path: str) -> None:
            if "module" in state_dict:
                # DeepSpeed leaves out a tied tensor under one of its names only.
                module = state_dict["module"]
                state_dict = {**state_dict, "module": {n: t for n, t in module.items() if n not in frozen}}
            try:
                sums[str(Path(path).relative_to(folder))] = write_file(Path(path), partial(torch.save, state_dict))
            except OSError as error:
                errors.append(error)

        self.engine.checkpoint_engine.save = write
        # A script of DeepSpeed's beside the files; `tcopd export` does what it does.
        self.engine._copy_recovery_script = lambda folder: None
        # Under a key of our own: DeepSpeed keeps counters of its own beside the client state.
        state = {"tcopd": {"steps_taken": self.steps_taken}}
        self.engine.save_checkpoint(
            str(folder),
            tag=FILES,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=bool(frozen),
        )
        if errors:
            raise errors[0]
        return sums

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, at the same number of ranks. Raises UserError when it cannot be read."""
        try:
            path, state = self.engine.load_checkpoint(str(folder), tag=FILES, custom_load_fn=self._load_module)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"checkpoint {folder}: damaged ({first_line(error)}); delete it to resume from the one before"
            ) from error
        if path is None:
            raise UserError(f"checkpoint {folder}: incomplete; delete it to resume from the one before")
        self.steps_taken = state["tcopd"]["steps_taken"]

    def _load_module(self, src: dict[str, Tensor], dst: PackedCausalLM) -> None:
        """What DeepSpeed calls with a checkpoint's tensors; only frozen ones may be missing. Raises RuntimeError."""
        found = dst.load_state_dict(src, strict=False)
        if wrong := sorted(set(found.missing_keys) - self._frozen()) + found.unexpected_keys:
            raise RuntimeError(f"it does not fit the student: {wrong[0]}")

    def _frozen(self) -> set[str]:
        """Names of all parameters that are not trained, a tied one under both of its names."""
        return {name for name, p in self.lm.named_parameters(remove_duplicate=False) if not p.requires_grad}


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings for a run. Micro-batches vary in number, so `step()` is the accumulation boundary."""
    zero: dict[str, Any] = {"stage": config.learner.zero_stage, "overlap_comm": config.learner.zero_stage == 2}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.learner.offload != "none":
        zero["offload_optimizer"] = host
    if config.learner.offload == "optimizer_and_weights":
        zero["offload_param"] = host
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.learner.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    if config.model.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        # RoPE frequencies rounded to bfloat16 shift logprobs more with every position.
        settings["data_types"] = {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq"]}
        settings["communication_data_type"] = "fp32"
    return settings


def _sharded_loading(settings: dict[str, Any], stage: int) -> Any:
    """Under ZeRO-3 transformers loads straight into shards while an HfDeepSpeedConfig is alive."""
    if stage < 3:
        return nullcontext()
    return HfZero3(settings)
