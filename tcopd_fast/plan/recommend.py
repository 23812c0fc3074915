"""Where every frozen model should live, and what to change when nothing fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from tcopd_fast.config import Config
from tcopd_fast.plan.devices import Cluster
from tcopd_fast.plan.memory import Memory, least_vllm, memory_of
from tcopd_fast.plan.shapes import Shape
from tcopd_fast.plan.workload import Frozen, Workload, workload_of

# Cheapest in time first.
ORDER = ("resident", "sharded", "offload")


@dataclass(frozen=True)
class Placed:
    """Frozen models with their placements and the memory that goes with them.

    tried: peak bytes of every combination looked at, the chosen one last. why: what is wrong, None when it fits.
    """

    frozen: tuple[Frozen, ...]
    memory: Memory
    tried: tuple[tuple[str, int], ...]
    why: str | None

    @property
    def fits(self) -> bool:
        return self.why is None


def place(config: Config, student: Shape, frozen: Sequence[Frozen], work: Workload, cluster: Cluster) -> Placed:
    """Resident for as many as fit; the rest sharded (with several ranks), and only then offloaded, the last ones first.

    Placements that the configuration gives are kept. When nothing fits the last combination is returned.
    """
    order = ORDER if cluster.ranks > 1 else tuple(kind for kind in ORDER if kind != "sharded")
    leaders = _leaders(frozen)
    free = [i for i, model in enumerate(frozen) if model.placement is None and i not in leaders]
    levels = dict.fromkeys(free, 0)
    tried: list[tuple[str, int]] = []
    while True:
        kinds = {i: order[level] for i, level in levels.items()}
        kinds = {i: kind if kind != "sharded" or frozen[i].shardable else "offload" for i, kind in kinds.items()}
        kinds |= {i: kinds[leader] for i, leader in leaders.items() if leader in kinds}
        chosen = tuple(replace(m, placement=kinds[i]) if i in kinds else m for i, m in enumerate(frozen))
        memory = memory_of(config, student, chosen, work, cluster)
        tried.append((_words(chosen), memory.peak))
        why = _why_not(config, student, work, memory, cluster)
        if why is None:
            return Placed(chosen, memory, tuple(tried), None)
        # Every model one level down before any goes two.
        lowest = min((levels[i] for i in free), default=len(order))
        movable = [i for i in free if levels[i] == lowest]
        if lowest + 1 >= len(order):
            return Placed(chosen, memory, tuple(tried), why)
        levels[movable[-1]] += 1


def _leaders(frozen: Sequence[Frozen]) -> dict[int, int]:
    """A teacher's own base is placed as its teacher is: index of the base -> index of the teacher."""
    found = {}
    for i, model in enumerate(frozen):
        role = model.roles[0]
        teacher = next((j for j, m in enumerate(frozen) if f"{m.roles[0]}.base" == role and not m.fixed), None)
        if model.placement is None and teacher is not None:
            found[i] = teacher
    return found


def _words(frozen: Sequence[Frozen]) -> str:
    kinds = [model.placement or "" for model in frozen]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "no frozen model"


def _why_not(config: Config, student: Shape, work: Workload, memory: Memory, cluster: Cluster) -> str | None:
    if memory.peak > cluster.memory:
        return f"{memory.fullest} needs {memory.peak / 1e9:.1f} GB of {cluster.memory / 1e9:.1f} GB"
    if cluster.host_memory is not None and memory.host_total > cluster.host_memory:
        return (
            f"{memory.host_total / 1e9:.1f} GB of pinned host memory per machine, of {cluster.host_memory / 1e9:.1f} GB"
        )
    if config.rollout.engine == "vllm" and not cluster.on_cpu:
        wanted, least = config.rollout.vllm.gpu_memory_utilization * cluster.memory, least_vllm(config, student, work)
        if wanted < least:
            return (
                f"vLLM's {wanted / 1e9:.1f} GB do not hold its weights and the longest sequence, {least / 1e9:.1f} GB"
            )
    return None


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration (`key=value` words) and what comes of it."""

    overrides: tuple[str, ...]
    config: Config
    placed: Placed


def remedies(
    config: Config, student: Shape, frozen: Sequence[Frozen], work: Workload, cluster: Cluster
) -> list[Remedy]:
    """Changes that make it fit, one at a time; when no single one does, all of them together."""
    changes = _changes(config, student, work, cluster)
    found = [_remedy(config, student, frozen, work, cluster, words, change) for words, change in changes]
    fitting = [remedy for remedy in found if remedy.placed.fits]
    if fitting or not changes:
        return fitting
    together: dict[str, dict[str, object]] = {}
    for _, change in changes:
        for section, values in change.items():
            together[section] = {**together.get(section, {}), **values}
    every = tuple(word for words, _ in changes for word in words)
    last = _remedy(config, student, frozen, work, cluster, every, together)
    return [last] if last.placed.fits else []


Change = Mapping[str, Mapping[str, object]]


def _changes(config: Config, student: Shape, work: Workload, cluster: Cluster) -> list[tuple[tuple[str, ...], Change]]:
    shortest = min(config.learner.max_tokens_per_microbatch, work.longest)
    score = min(config.scoring.max_tokens_per_forward, work.longest)
    changes: list[tuple[tuple[str, ...], Change]] = []

    def offer(section: str, key: str, value: object, prefix: str = "") -> None:
        old: object = getattr(config, section)
        for part in prefix.split(".") if prefix else ():
            old = getattr(old, part)
        if getattr(old, key) != value:
            name = f"{prefix}.{key}" if prefix else key
            nested: dict[str, object] = {key: value}
            if prefix:
                nested = {prefix: getattr(getattr(config, section), prefix).model_copy(update=nested)}
            changes.append(((f"{section}.{name}={str(value).lower()}",), {section: nested}))

    offer("model", "gradient_checkpointing", True)
    offer("learner", "zero_stage", 3)
    if config.learner.offload == "none":
        offer("learner", "offload", "optimizer")
    offer("learner", "max_tokens_per_microbatch", shortest)
    offer("scoring", "max_tokens_per_forward", score)
    if config.rollout.engine == "vllm":
        least = ceil(20 * least_vllm(config, student, work) / cluster.memory) / 20
        if least <= 1:
            offer("rollout", "gpu_memory_utilization", least, "vllm")
    else:
        offer("rollout", "max_batch_size", max(1, min(config.rollout.max_batch_size, work.sequences) // 4))
    if config.scoring.placement not in ("auto", "delta"):
        offer("scoring", "placement", "auto")
    return changes


def _remedy(
    config: Config,
    student: Shape,
    frozen: Sequence[Frozen],
    work: Workload,
    cluster: Cluster,
    words: tuple[str, ...],
    change: Change,
) -> Remedy:
    changed = config.model_copy(
        update={name: getattr(config, name).model_copy(update=dict(values)) for name, values in change.items()}
    )
    freed = "placement" in change.get("scoring", {})
    models = [replace(m, placement=None) if freed and not m.fixed else m for m in frozen]
    after = workload_of(changed, cluster.ranks, work.prompt, work.response)
    return Remedy(words, changed, place(changed, student, models, after, cluster))
