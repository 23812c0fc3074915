"""Memory of one rank: what is always held, what each stage adds, and its peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tcopd_fast.config import Config
from tcopd_fast.models import DTYPES
from tcopd_fast.plan.activations import LearnBytes, forward_bytes, learn_bytes
from tcopd_fast.plan.devices import Cluster
from tcopd_fast.plan.head import head_bytes
from tcopd_fast.plan.shapes import Shape
from tcopd_fast.plan.workload import Frozen, Workload
from tcopd_fast.plan.zero import ZeroBytes, sharded_bytes, zero_bytes
from tcopd_fast.trainer import needs_old_logprobs

# CUDA context, cuBLAS and NCCL buffers, loaded kernels, outside torch's allocator: an allowance, not a measurement.
CONTEXT_BYTES = 2 * 2**30
# Share of torch's memory that its allocator may lose to fragments.
FRAGMENTATION = 0.05
# Of vLLM's share of a GPU, what is neither weights nor KV cache: an allowance.
VLLM_WORKSPACE = 3 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    held: by name, always there. stages: stage -> what it adds, by name. reserve: outside torch's allocator.
    host: of one machine, by name.
    """

    held: Mapping[str, int]
    stages: Mapping[str, Mapping[str, int]]
    reserve: int
    host: Mapping[str, int]

    @property
    def always(self) -> int:
        return sum(self.held.values())

    def stage_peak(self, stage: str) -> int:
        """Held and the stage's own, without the reserve."""
        return self.always + sum(self.stages[stage].values())

    @property
    def fullest(self) -> str:
        return max(self.stages, key=self.stage_peak)

    @property
    def peak(self) -> int:
        """The fullest stage, with fragmentation and the reserve."""
        if not self.reserve:
            return self.stage_peak(self.fullest)
        return int(self.stage_peak(self.fullest) * (1 + FRAGMENTATION)) + self.reserve

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def memory_of(config: Config, student: Shape, frozen: Sequence[Frozen], work: Workload, cluster: Cluster) -> Memory:
    """Prediction for the configuration as it is; every frozen model has a placement."""
    dtype = DTYPES[config.model.dtype]
    zero = zero_bytes(
        student,
        config.learner.zero_stage,
        dtype.itemsize,
        cluster.ranks,
        accumulating=work.microbatches > 1,
        on_cpu=cluster.on_cpu,
        offload=config.learner.offload,
    )
    learn = _learner_bytes(config, student, work, zero, cluster)
    learner = {f"learner: {name}": size for name, size in zero.held.items()}
    engine_held, rollout = _rollout_bytes(config, student, work, cluster)
    frozen_held, scoring = _scoring_bytes(config, student, frozen, work, zero, cluster)
    stages: dict[str, dict[str, int]] = {
        "rollout": rollout,
        "scoring": scoring,
        "loss": _fullest(
            {
                "gathered weights": zero.gathered,
                "gradients": zero.accumulated,
                "activations and head": learn.forward,
            },
            {
                "gathered weights": zero.gathered,
                "weights arriving": zero.arriving,
                "gradients": zero.accumulated,
                "activations": learn.trunk,
            },
        ),
        "learner": _fullest(
            {
                "gathered weights": zero.gathered,
                "gradients": zero.accumulated,
                "buckets": zero.backward,
                "activations and gradients": learn.backward,
            },
            {"gathered weights": zero.gathered, "gradients and their reduction": zero.reduce},
            {"gradients and Adam's temporaries": zero.update},
        ),
        # A sleeping vLLM wakes while it gets its weights.
        "weight_sync": {"gathered weights": zero.sync, "vLLM": rollout.get("vLLM", 0)},
    }
    return Memory(
        held=learner | engine_held | frozen_held,
        stages={name: {k: v for k, v in parts.items() if v} for name, parts in stages.items()},
        reserve=0 if cluster.on_cpu else CONTEXT_BYTES,
        host={f"learner: {name}": size * cluster.ranks_here for name, size in zero.host.items()}
        | _host_bytes(config, frozen, cluster),
    )


def _fullest(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def _learner_bytes(config: Config, student: Shape, work: Workload, zero: ZeroBytes, cluster: Cluster) -> LearnBytes:
    dtype, tokens = DTYPES[config.model.dtype], work.microbatch
    predicted = work.predicted_of(tokens)
    return learn_bytes(
        student,
        config.model.dtype,
        tokens,
        predicted,
        checkpointing=config.model.gradient_checkpointing,
        head=head_bytes(predicted, student.vocab, student.hidden, dtype, cluster.on_cpu),
        kept_per_gradient=zero.per_gradient,
        lora=None if config.model.lora is None else config.model.lora.model_dump_json(),
    )


def _rollout_bytes(
    config: Config, student: Shape, work: Workload, cluster: Cluster
) -> tuple[dict[str, int], dict[str, int]]:
    """(held, added while sampling)."""
    itemsize = DTYPES[config.model.dtype].itemsize
    if config.rollout.engine == "vllm":
        settings = config.rollout.vllm
        if settings.mode == "server":
            return {}, {}
        if cluster.on_cpu:
            return {"vLLM": settings.kv_cache_memory_bytes + student.weights * itemsize}, {}
        # vLLM takes its share of the whole GPU: weights, KV cache and its own workspace.
        share = {"vLLM": int(settings.gpu_memory_utilization * cluster.memory)}
        return ({}, share) if settings.sleep else (share, {})
    rows = min(config.rollout.max_batch_size, work.sequences)
    length = int(work.prompt + work.response)
    cache = rows * length * student.kv_bytes_per_token(itemsize)
    # One layer's keys and values are copied to be extended, and repeated for every query head.
    layer = rows * length * 2 * (student.kv_heads + student.heads) * student.head_dim * itemsize
    # float32 logits and logprobs, float64 probabilities and their running sum.
    sampling = rows * student.vocab * (4 + 4 + 8 + 8 + (itemsize if itemsize < 4 else 0))
    return {"rollout weights": student.weights * itemsize}, {"KV cache": cache + layer, "sampling": sampling}


def least_vllm(config: Config, student: Shape, work: Workload) -> int:
    """Bytes below which vLLM cannot work: weights, workspace, and the KV cache of one longest sequence."""
    itemsize = DTYPES[config.model.dtype].itemsize
    return student.weights * itemsize + VLLM_WORKSPACE + work.longest * student.kv_bytes_per_token(itemsize)


def _scoring_bytes(
    config: Config, student: Shape, frozen: Sequence[Frozen], work: Workload, zero: ZeroBytes, cluster: Cluster
) -> tuple[dict[str, int], dict[str, int]]:
    """(held per model, the fullest moment of scoring)."""
    held: dict[str, int] = {}
    moments: list[dict[str, int]] = [{}]
    if needs_old_logprobs(config):
        tokens = work.packed(work.learner_budget)
        activations = forward_bytes(student, config.model.dtype, tokens, work.predicted_of(tokens))
        moments.append({"gathered weights": zero.gathered, "activations of log π_old": activations})
    tokens = work.packed(work.scoring_budget)
    for model in frozen:
        name = ", ".join(model.roles)
        parts: dict[str, int] = {}
        if model.placement == "server":
            continue
        parts[f"activations of {name}"] = forward_bytes(model.shape, model.dtype, tokens, work.predicted_of(tokens))
        if model.placement == "resident":
            held[f"{name}: weights"] = model.nbytes
        elif model.placement == "sharded":
            held[f"{name}: share of weights"], parts["gathered weights"] = sharded_bytes(
                model.shape, model.itemsize, cluster.ranks
            )
        else:
            trip = work.packed(work.trip_budget)
            parts["hidden states of a trip"] = trip * model.shape.hidden * model.itemsize
            if model.placement == "student":
                # The learner's own layers, where they are.
                moments.append(parts)
                continue
            if model.placement == "lora":
                held[f"{name}: factors"] = model.nbytes
            if model.placement in ("delta", "lora"):
                parts["a layer and its base's"] = 2 * model.group
            elif cluster.on_cpu:
                parts["a layer, or the head"] = model.group
            else:
                # While one group computes the next one is copied: two layers, or the last one and the head.
                parts["a layer and the next"] = model.shape.layer * model.itemsize + model.group
        moments.append(parts)
    return held, _fullest(*moments)


def _host_bytes(config: Config, frozen: Sequence[Frozen], cluster: Cluster) -> dict[str, int]:
    """Of one machine: what its ranks pin. Page cache, data and Python itself are not counted."""
    if cluster.on_cpu:
        return {}
    host = {}
    for model in frozen:
        name = ", ".join(model.roles)
        if model.placement == "offload":
            # Every rank pins its own copy, and torch rounds every pinned tensor up to a power of two.
            pinned = sum(1 << (n * model.itemsize - 1).bit_length() for n in model.shape.tensors)
            host[f"{name}: pinned"] = pinned * cluster.ranks_here
        elif model.placement == "sharded" and config.scoring.shards_on_host:
            host[f"{name}: shards"] = -(-model.nbytes // cluster.ranks) * cluster.ranks_here
    return host
