"""The cells of the mid-size benchmark: which there are, in which order, their configurations and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from midsize_models import SHAPES, Shape
from teacher_memory_models import LORA_RANK

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.plan.build import resident_logits
from tcopd_fast.plan.devices import GPUS, Cluster
from tcopd_fast.plan.memory import FRAGMENTATION, memory_of
from tcopd_fast.plan.shapes import student_shape
from tcopd_fast.plan.timing import step_costs
from tcopd_fast.plan.workload import frozen_models, shapes_of, workload_of

# The paper's way: every model resident, and the logits of every token made.
LOGITS = "logits"
# Placement -> (folder of teacher k, `scoring.placement`).
SERIES = {
    "resident": ("full", "resident"),
    LOGITS: ("full", "resident"),
    "offload": ("full", "offload"),
    "lora": ("lora", "auto"),
    "delta": ("delta", "auto"),
}
PLACEMENTS = ("resident", "offload", "delta", "lora")
STAGES = ("scoring", "reward", "batch", "loss", "learner")
# Those of them that a plan has figures of.
PREDICTED_STAGES = ("scoring", "loss", "learner")
# What `Memory.held` calls the rollout engine's copy of the student.
ENGINE = "rollout weights"
# Of a sequence's tokens.
PROMPT_SHARE = 1 / 32
SPEED = GPUS["h100"]


@dataclass(frozen=True)
class Cell:
    """One measurement: a student of a shape with K teachers in one placement, or the paper's way."""

    shape: str
    teachers: int
    placement: str

    @property
    def name(self) -> str:
        return f"{self.shape}_{self.placement}_{self.teachers}"

    @property
    def kind(self) -> str:
        """Checkpoints that have to be there beside the base: a KIND of midsize_models."""
        return "delta" if self.placement == "delta" else "base"


def plan(shapes: Sequence[str], counts: Sequence[int], placements: Sequence[str]) -> list[Cell]:
    """Every cell, the most telling first: fewest and most teachers before those between, and on each side the paper's
    way and whole teachers before small ones. Deltas only of shapes that allow them."""
    ends = [k for k in counts if k in (counts[0], counts[-1])]
    between = [k for k in counts if k not in ends]
    whole = [name for name in SERIES if name == LOGITS or (name in placements and SERIES[name][0] == "full")]
    small = [name for name in SERIES if name in placements and name not in whole]
    return [
        Cell(shape, count, name)
        for some, names in ((ends, whole), (ends, small), (between, whole), (between, small))
        for shape in shapes
        for count in some
        for name in names
        if name != "delta" or SHAPES[shape].deltas
    ]


def lengths(tokens: int) -> tuple[int, int]:
    """(prompt, response) tokens of sequences that pack into `tokens` each: the last token needs no forward."""
    prompt = max(1, int(tokens * PROMPT_SHARE))
    return prompt, tokens - prompt + 1


def config_tree(folder: Path, cell: Cell, tokens: int) -> dict[str, Any]:
    """The configuration of a cell. Teachers share a reward of Σλ = 1; without small teachers the reference is placed
    as they are, and under a LoRA student it is the student's own frozen weights."""
    shape = SHAPES[cell.shape]
    kind, placement = SERIES[cell.placement]
    prompt, response = lengths(tokens)
    base, models = str(folder / "base"), folder
    names = [f"teacher_{k}" for k in range(1, cell.teachers + 1)]
    tree: dict[str, Any] = {
        "run_dir": str(folder / "unused"),
        "steps": 1,
        "model": {"path": base, "dtype": shape.dtype, "gradient_checkpointing": True},
        "teachers": {name: {"path": str(models / f"{kind}_{k}")} for k, name in enumerate(names, 1)},
        "data": {"train": [{"path": "miniature:train"}], "max_prompt_tokens": prompt},
        "rollout": {"prompts_per_step": shape.sequences, "max_new_tokens": response},
        "scoring": {"placement": placement, "max_tokens_per_forward": tokens},
        "objective": {"lambdas": dict.fromkeys(names, 1 / cell.teachers), "normalizer": "none"},
        "learner": {"zero_stage": 1, "lr": 1e-6, "max_tokens_per_microbatch": tokens},
    }
    if shape.lora:
        tree["model"]["lora"] = {"rank": LORA_RANK}
    elif placement == "auto":
        # What deltas and adapters build on.
        tree["reference"] = {"path": base, "placement": "resident"}
    return tree


def predict(tree: dict[str, Any], cell: Cell, memory: int | None) -> dict[str, Any]:
    """What `tcopd plan` says of a cell: bytes by stage, without allowances for fragments and context; whether it fits
    with them; pinned host memory; and seconds by stage on an H100.

    Of the paper's way it says the bytes of the fullest stage, and the seconds are those of the same products: moving
    logits is not in them. memory: bytes of the GPU; None for a process on a CPU, of which no time is predicted.
    """
    config = validate(tree, Config)
    cluster = Cluster(1, memory or 1 << 50, on_cpu=memory is None)
    shapes = shapes_of(config, {})
    student = student_shape(shapes[config.model.path], config.model.lora)
    work = workload_of(config, 1, float(config.data.max_prompt_tokens), float(config.rollout.max_new_tokens))
    frozen = frozen_models(config, shapes)
    whole = memory_of(config, student, frozen, work, cluster)
    # There is neither a rollout engine, which would hold a copy of the student, nor weight_sync.
    found = replace(
        whole,
        held={name: size for name, size in whole.held.items() if name != ENGINE},
        stages={stage: whole.stages[stage] for stage in PREDICTED_STAGES},
    )
    stages = {stage: found.stage_peak(stage) for stage in found.stages}
    predicted: dict[str, Any] = {"peak_bytes": max(stages.values()), "stage_bytes": stages}
    with_allowances = found.peak
    if cell.placement == LOGITS:
        share = FRAGMENTATION if found.reserve else 0.0
        engine = whole.held.get(ENGINE, 0)
        with_allowances = resident_logits(config, student, frozen, work, cluster) - int((1 + share) * engine)
        predicted = {"peak_bytes": int((with_allowances - found.reserve) / (1 + share))}
    predicted |= {"fits": with_allowances <= cluster.memory, "host_bytes": found.host_total}
    if memory is not None:
        costs = step_costs(config, student, frozen, work, cluster, SPEED)
        predicted["stage_seconds"] = {
            stage: sum(cost.seconds for name, cost in costs.items() if name.partition(":")[0] == stage)
            for stage in PREDICTED_STAGES
        }
    return predicted


def sizes(shape: Shape, tokens: int) -> dict[str, int]:
    """Tokens of a step, for the record."""
    _, response = lengths(tokens)
    return {
        "sequences": shape.sequences,
        "packed_tokens": shape.sequences * tokens,
        "response_tokens": shape.sequences * response,
    }
