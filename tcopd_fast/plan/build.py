"""From a configuration and a cluster to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tcopd_fast.config import Config
from tcopd_fast.errors import UserError
from tcopd_fast.models import DTYPES
from tcopd_fast.plan.devices import Cluster, Speed
from tcopd_fast.plan.memory import memory_of
from tcopd_fast.plan.recommend import Placed, Remedy, place, remedies
from tcopd_fast.plan.shapes import Shape, student_shape
from tcopd_fast.plan.timing import Cost, step_costs
from tcopd_fast.plan.workload import Frozen, Workload, frozen_models, shapes_of, workload_of


@dataclass(frozen=True)
class Plan:
    """Everything that is predicted of a run.

    resident_logits: peak bytes with every frozen model resident and the logits of a micro-batch made in float32, as
    trainers do that are built on materialised logits. remedies: what would help when nothing fits.
    """

    config: Config
    cluster: Cluster
    speed: Speed
    student: Shape
    work: Workload
    placed: Placed
    costs: Mapping[str, Cost]
    resident_logits: int
    remedies: tuple[Remedy, ...]

    @property
    def seconds(self) -> float:
        """Of one step, without data, reward, batch and judge."""
        return sum(cost.seconds for cost in self.costs.values())


def make_plan(
    config: Config,
    cluster: Cluster,
    speed: Speed,
    *,
    folders: Mapping[str, str] | None = None,
    teachers: int | None = None,
    prompt: float | None = None,
    response: float | None = None,
) -> Plan:
    """folders, teachers, prompt, response: see `shapes_of`, `frozen_models`, `workload_of`. Raises UserError."""
    if config.rollout.prompts_per_step < cluster.ranks:
        raise UserError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: fewer than the {cluster.ranks} ranks; "
            "raise it"
        )
    shapes = shapes_of(config, folders or {})
    student = student_shape(shapes[config.model.path], config.model.lora)
    work = workload_of(config, cluster.ranks, prompt, response)
    frozen = frozen_models(config, shapes, teachers)
    placed = place(config, student, frozen, work, cluster)
    return Plan(
        config,
        cluster,
        speed,
        student,
        work,
        placed,
        step_costs(config, student, placed.frozen, work, cluster, speed),
        resident_logits(config, student, placed.frozen, work, cluster),
        () if placed.fits else tuple(remedies(config, student, frozen, work, cluster)),
    )


def resident_logits(
    config: Config, student: Shape, frozen: tuple[Frozen, ...], work: Workload, cluster: Cluster
) -> int:
    """Peak bytes of the conventional way: resident models, float32 logits of every predicted token of a forward.

    A reference that is the frozen base of a LoRA student is no second copy there either.
    """
    resident = [m if m.placement == "student" else replace(m, placement="resident") for m in frozen]
    memory = memory_of(config, student, resident, work, cluster)
    itemsize = DTYPES[config.model.dtype].itemsize
    scored = work.predicted_of(work.packed(work.scoring_budget))
    learnt = work.predicted_of(work.microbatch)
    # Logits, their float32 copy where they are shorter, and the log-softmax; with gradients also that of the logits.
    copies = 4 + (0 if itemsize == 4 else itemsize)
    extra = {
        "scoring": {"logits": max((m.shape.vocab for m in frozen), default=0) * scored * (copies + 4)},
        "loss": {"logits": student.vocab * learnt * (copies + 8)},
    }
    stages = {name: {**parts, **extra.get(name, {})} for name, parts in memory.stages.items()}
    return replace(memory, stages=stages).peak
