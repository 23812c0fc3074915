"""LoRA teachers: the weights of a base that is there anyway, and low-rank factors.

    W' = W + s·B A      A [r, D_in], B [D_out, r], s = α/r, or α/√r with use_rslora

A pass goes through the layers one at a time, as an offloaded model's does; each layer's sum is made when its turn comes
and dropped after it. Beside the base a teacher costs its factors and, while it scores, one layer. Adding B (A x) to
every layer's output instead would need no sums, but reads and writes every activation once more for every token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcopd_fast.config import Config
from tcopd_fast.errors import UserError
from tcopd_fast.models import (
    ADAPTER_CONFIG,
    base_path,
    frozen_models,
    is_adapter,
    local_folder,
    resolve_path,
    text_config,
)
from tcopd_fast.scoring.delta import is_delta
from tcopd_fast.scoring.streamed import empty_model
from tcopd_fast.scoring.weights import CheckpointFolder, WeightSource, same_checkpoint

WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it (peft: merge_and_unload) and give the merged checkpoint"
# Keys of adapter_config.json that do not change what a trained adapter computes; any other one that is set is refused.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
READ = {"peft_type", "bias", "init_lora_weights", "lora_alpha", "alpha_pattern", "use_rslora"}
# Other ways to initialise change the base's weights, so that the adapter does not fit the checkpoint it names.
PLAIN_INITS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight [D_out, D_in]: b @ a, with a [r, D_in] and b [D_out, r]; the scale is in b."""

    a: Tensor
    b: Tensor


class LowRankWeights:
    """The weights of an adapted model: a base's, with the sums made when they are asked for.

    base: in the compute dtype on the scoring device, like the factors, which go by the names of their weights.
    """

    def __init__(self, base: WeightSource, factors: Mapping[str, LowRank]) -> None:
        self.base, self.factors = base, factors

    def names(self) -> frozenset[str]:
        return self.base.names()

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._sum(name, weight) for name, weight in self.base.load(names).items()}

    def prefetch(self, names: Sequence[str]) -> None:
        self.base.prefetch(names)

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.base.rows(name, index)

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        terms = self.factors.get(name)
        return weight if terms is None else torch.addmm(weight, terms.b, terms.a)


def linear_shapes(model: Any) -> dict[str, torch.Size]:
    """[D_out, D_in] by name of every weight of a linear layer; a head that is tied to the embedding is left out."""
    tied = bool(getattr(text_config(model.config), "tie_word_embeddings", False))
    skipped = model.get_output_embeddings() if tied else None
    return {
        f"{name}.weight": module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not skipped
    }


def read_adapter(path: str, shapes: Mapping[str, torch.Size]) -> dict[str, LowRank]:
    """The factors of a peft LoRA folder by weight name, float32 on the CPU, scaled.

    shapes: of the base's linear layers. Raises UserError for anything but plain LoRA on these, and for other shapes.
    """
    folder = Path(resolve_path(path))
    settings = _settings(path)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter {path}: no {WEIGHTS} there; save it with safetensors (peft's default)")
    stored = CheckpointFolder(folder, WEIGHTS)
    out: dict[str, LowRank] = {}
    for key in sorted(stored.names()):
        layer, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        name = f"{layer}.weight"
        if name not in shapes or part not in ("A.weight", "B.weight"):
            raise UserError(
                f"adapter {path}: {key} is no LoRA factor of a linear layer of the base (embeddings, heads tied to "
                f"them and fully saved modules are not supported); give its own base as delta_base, or {MERGE}"
            )
        if part == "B.weight":
            continue
        other = f"{key.removesuffix('A.weight')}B.weight"
        if other not in stored.names():
            raise UserError(f"adapter {path}: has {key} but not {other}; save it again")
        a, b = (stored.tensors([k])[k].float() for k in (key, other))
        if (len(b), *a.shape[1:], *b.shape[1:]) != (*shapes[name], len(a)):
            raise UserError(
                f"adapter {path}: {layer} has factors {list(b.shape)} and {list(a.shape)}, but the base's weight is "
                f"{list(shapes[name])}; give its own base as delta_base"
            )
        out[name] = LowRank(a, b * _scale(settings, layer, rank=len(a)))
    if not out:
        raise UserError(f"adapter {path}: {WEIGHTS} holds no LoRA factors; save it again")
    return out


def _settings(path: str) -> dict[str, Any]:
    """adapter_config.json. Raises UserError when it asks for more than is computed here."""
    file = Path(resolve_path(path)) / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); save the adapter again") from error
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": PLAIN_INITS}
    for key, value in settings.items():
        known = value in plain[key] if key in plain else key in HARMLESS | READ or not value
        if not known:
            raise UserError(f"adapter {path}: {key}={value!r} in {ADAPTER_CONFIG} is not supported; {MERGE}")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise UserError(f"{file}: no number lora_alpha; save the adapter again")
    return settings


def _scale(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    # As peft matches its patterns: the first that the end of the layer's name fits.
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), settings["lora_alpha"])
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def check_adapters(config: Config) -> None:
    """Read every adapter against the shapes of its base, before any weights are loaded.

    Raises UserError when one cannot be used, or when the base it names is at hand and is not the one it would run on.
    """
    for field, spec in frozen_models(config):
        if not is_adapter(spec.path) or spec.placement == "server":
            continue
        model, base = config.model, base_path(config, spec)
        if spec.placement not in (None, "auto"):
            raise UserError(
                f"{field} {spec.path}: a LoRA adapter runs wherever its base is; leave out placement={spec.placement}, "
                f"and place the base ({base}) with reference.placement or scoring.placement"
            )
        if is_adapter(base):
            raise UserError(f"{field} {spec.path}: its base {base} is an adapter; give a checkpoint as delta_base")
        whole = empty_model(base, "float32", model.attention, model.trust_remote_code)
        read_adapter(spec.path, linear_shapes(whole))
        named = other_base(spec.path, base)
        if spec.delta_base is None and named and Path(named).is_dir() and not is_delta(base):
            raise UserError(
                f"{field} {spec.path}: its {ADAPTER_CONFIG} names {named} as base, which has other weights than "
                f"{base}; give the one it should run on as delta_base"
            )


def other_base(path: str, base: str) -> str:
    """What adapter_config.json names as the adapter's base, unless that is `base`: then, and without a name, "".

    It may be a hub id or a path of another machine, of which nothing more is known.
    """
    named: str = _settings(path).get("base_model_name_or_path") or ""
    same = named == base or (Path(named).is_dir() and same_checkpoint(named, local_folder(base)))
    return "" if same else named
