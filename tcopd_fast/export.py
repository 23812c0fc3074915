"""`tcopd export`: a checkpoint's student as a Hugging Face folder, or its LoRA adapter as a peft folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tcopd_fast import checkpoints, rundir
from tcopd_fast.adapter import is_factor, merge_into, write_adapter
from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.inputs import checkpoint_fingerprint
from tcopd_fast.models import DTYPES, load_tokenizer, resolve_path


def run_export(run_dir: Path, out: Path | None, step: int | None, best: bool = False, adapter: bool = False) -> int:
    """Write a checkpoint's student as a plain Hugging Face folder (safetensors) that transformers and vLLM load.

    step: which; without it the one with the best evaluation (best) or the newest. adapter: write a LoRA student's
    adapter alone, as peft does; without it, it is merged.
    """
    config = rundir.open_run(run_dir)
    if adapter and config.model.lora is None:
        raise UserError(f"--adapter: {run_dir} trained all weights (no model.lora); leave it out")
    chosen = _chosen_step(run_dir, step, best)
    folder = out or run_dir / ("adapter" if adapter else "export")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: not empty; give another folder")
    files = checkpoints.checkpoint_dir(run_dir, chosen)
    if config.model.lora is not None and not adapter:
        base = checkpoint_fingerprint(config.model.path, World(0, 1, torch.device("cpu")))
        if problem := checkpoints.other_base(files, base, config.model.path):
            raise UserError(problem)
    weights = checkpoint_weights(files, config.learner.zero_stage, adapter=config.model.lora is not None)
    if adapter:
        _write_whole(folder, config, lambda partial: _save_adapter(config, weights, partial))
    else:
        model = _student(config, weights, f"{run_dir}: checkpoint {chosen}")
        _write_whole(folder, config, model.save_pretrained)
    print(f"exported step {chosen}: {folder}")
    return 0


def _chosen_step(run_dir: Path, step: int | None, best: bool) -> int:
    steps = checkpoints.checkpoint_steps(run_dir)
    newest = steps[-1] if steps else None
    chosen = step if step is not None else checkpoints.best_step(run_dir) if best else newest
    if best and chosen is None:
        raise UserError(f"{run_dir}: no checkpoint was evaluated; set checkpoint.keep_best, or give --step")
    if chosen is None or chosen not in steps:
        raise UserError(f"{run_dir}: no checkpoint at step {chosen}; there are {steps or 'none'}")
    return chosen


def checkpoint_weights(folder: Path, zero_stage: int, adapter: bool = False) -> dict[str, Tensor]:
    """Parameter name -> whole tensor: float32 masters gathered from the shards at stage 3, the module's below.

    adapter: of a LoRA student, whose checkpoint holds the factors alone, under the adapted model's names.
    """
    if zero_stage == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=checkpoints.FILES, exclude_frozen_parameters=adapter
        )
    else:
        # DeepSpeed's own file; it holds more than tensors, which is why resuming and exporting need a trusted run.
        file = folder / checkpoints.FILES / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if is_factor(name)} if adapter else named


def _student(config: Config, weights: dict[str, Tensor], source: str) -> AutoModelForCausalLM:
    """The student with these weights, or with this adapter merged in. Raises UserError naming what `source` lacks."""
    model = AutoModelForCausalLM.from_pretrained(
        resolve_path(config.model.path),
        dtype=DTYPES[config.model.dtype],
        use_safetensors=True,
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.model.lora is not None:
        merge_into(model, weights, config.model.lora)
        return model
    own = dict(model.named_parameters())
    missing = sorted(set(own) - set(weights))
    if missing:
        raise UserError(f"{source} lacks {missing[0]}; it is damaged, use an earlier --step")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return model


def _save_adapter(config: Config, weights: dict[str, Tensor], folder: Path) -> None:
    assert config.model.lora is not None, "checked by run_export"
    dtype = DTYPES[config.model.dtype]
    write_adapter(
        folder, {name: t.to(dtype) for name, t in weights.items()}, config.model.lora, resolve_path(config.model.path)
    )


def _write_whole(folder: Path, config: Config, save: Callable[[Path], None]) -> None:
    """Write what `save` writes and the tokenizer into `folder`, all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        save(Path(partial))
        load_tokenizer(config.model.path, config.model.trust_remote_code).save_pretrained(partial)
        folder.mkdir(exist_ok=True)
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)
