"""The student as a LoRA adapter (`model.lora`): peft's layers on frozen weights, and the sums of the two.

    W' = W + s·B A      W frozen [D_out, D_in], A [r, D_in], B [D_out, r], s = alpha / rank

Training runs peft's layers as they are. Whoever needs whole weights (rollout engines, exports) gets W' under W's own
Hugging Face name: summed in float32 and rounded once to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tcopd_fast.config import Config, nearest
from tcopd_fast.config_sections import LoraConfig
from tcopd_fast.errors import UserError
from tcopd_fast.scoring.lora import WEIGHTS
from tcopd_fast.scoring.streamed import empty_model
from tcopd_fast.scoring.weights import ResidentWeights

# peft's name of an adapter that got none.
ADAPTER = "default"


@dataclass(frozen=True)
class StudentTensor:
    """One tensor of the student under its Hugging Face name: a parameter, or with a and b the sum W + scale · B A."""

    name: str
    weight: nn.Parameter
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0

    def parameters(self) -> list[nn.Parameter]:
        """What has to be whole for `whole`."""
        return [p for p in (self.weight, self.a, self.b) if p is not None]

    def whole(self) -> Tensor:
        """The tensor in the compute dtype."""
        if self.a is None or self.b is None:
            return self.weight.detach()
        return merged(self.weight.detach(), self.a.detach(), self.b.detach(), self.scale)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B A, computed in float32, in W's dtype."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def check_targets(config: Config) -> None:
    """Refuse `model.lora.target_modules` that are no linear layers of the student. Reads its config.json alone."""
    lora = config.model.lora
    if lora is None or lora.target_modules == "all-linear":
        return
    check_names(
        empty_model(config.model.path, config.model.dtype, config.model.attention, config.model.trust_remote_code),
        lora,
    )


def check_names(model: nn.Module, lora: LoraConfig) -> None:
    """Raises UserError for a target that is no linear layer of the model, naming those that there are."""
    linear = linear_layers(model)
    valid = sorted({name.rpartition(".")[2] for name in linear})
    for target in lora.target_modules:
        fitting = [name for name, _ in model.named_modules() if is_target(name, [target])]
        if not fitting or not set(fitting) <= set(linear):
            kind = "is no linear layer of the decoder" if fitting else "no layer of the student has this name"
            raise UserError(
                f"model.lora.target_modules: {target}: {kind}; give all-linear or some of {', '.join(valid)}"
                f"{nearest(target, valid) if len(valid) > 1 and not fitting else ''}"
            )


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The layers that can have an adapter, by name: every linear one but the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether peft puts an adapter on a layer of this name: it is a target, or ends in one."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def factor_sizes(model: nn.Module, lora: LoraConfig) -> tuple[int, ...]:
    """Elements of A and of B for every target of a plain model, in its order. Raises UserError as `check_names`."""
    if lora.target_modules != "all-linear":
        check_names(model, lora)
    adapted = [
        layer
        for name, layer in linear_layers(model).items()
        if lora.target_modules == "all-linear" or is_target(name, lora.target_modules)
    ]
    return tuple(lora.rank * width for layer in adapted for width in (layer.in_features, layer.out_features))


def add_adapter(model: Any, lora: LoraConfig, seed: int) -> None:
    """Freeze a transformers model and put a LoRA layer at every target: B zero, A drawn from `seed` on every rank."""
    from peft import inject_adapter_in_model

    # The generator of this process stays as it was, so that nothing else depends on whether there is an adapter.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(lora), model, ADAPTER)


def peft_config(lora: LoraConfig, **more: Any) -> Any:
    """peft's own settings object. more: what else it takes."""
    from peft import LoraConfig as PeftLora

    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return PeftLora(r=lora.rank, lora_alpha=alpha, **{"target_modules": lora.target_modules} | more)  # type: ignore[arg-type]


def student_tensors(model: nn.Module) -> Iterator[StudentTensor]:
    """Every parameter of the student (with or without an adapter) once, in the model's order; nothing is gathered."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if is_factor(name):
            continue
        if not owner.endswith(".base_layer"):
            yield StudentTensor(name, parameter)
        elif leaf == "weight":
            layer: Any = model.get_submodule(owner.removesuffix(".base_layer"))
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            yield StudentTensor(base_name(name), parameter, a, b, layer.scaling[ADAPTER])
        else:
            yield StudentTensor(base_name(name), parameter)


def base_weights(model: nn.Module) -> ResidentWeights:
    """The frozen weights below the adapter: the model's own tensors, no copy. They are what the student started from.

    model: with an adapter, whole on the scoring device.
    """
    return ResidentWeights({base_name(name): t for name, t in model.state_dict().items() if not is_factor(name)})


def is_factor(name: str) -> bool:
    """Whether a parameter of the adapted model is an A or a B."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The Hugging Face name of a parameter of the adapted model."""
    return name.replace(".base_layer.", ".")


def merge_into(model: nn.Module, trained: Mapping[str, Tensor], lora: LoraConfig) -> None:
    """Add a trained adapter to the plain student it started from, in place.

    trained: A and B of every layer under the adapted model's names (`is_factor`). Raises KeyError when one is missing.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, a in trained.items():
            if ".lora_A." in name:
                weight = weights[f"{name.partition('.lora_A.')[0]}.weight"]
                a, b = (t.to(weight.device, weight.dtype) for t in (a, trained[name.replace(".lora_A.", ".lora_B.")]))
                weight.copy_(merged(weight, a, b, lora.alpha / lora.rank))


def write_adapter(folder: Path, trained: Mapping[str, Tensor], lora: LoraConfig, base: str) -> None:
    """Write adapter_config.json and the factors as peft does. trained: as in `merge_into`."""
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    targets = lora.target_modules if lora.target_modules != "all-linear" else sorted(layers)
    more = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base}
    peft_config(lora, target_modules=targets, **more).save_pretrained(folder)
    tensors = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": t.contiguous() for name, t in trained.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
