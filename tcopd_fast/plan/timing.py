"""Time of one step: operations and traffic divided by assumed speeds. Stages take turns, as in the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from tcopd_fast.config import Config
from tcopd_fast.models import DTYPES
from tcopd_fast.plan.devices import Cluster, Speed
from tcopd_fast.plan.memory import VLLM_WORKSPACE
from tcopd_fast.plan.shapes import Shape
from tcopd_fast.plan.workload import Frozen, Workload
from tcopd_fast.trainer import needs_old_logprobs


@dataclass(frozen=True)
class Cost:
    """One stage, or one model's part of it, on one rank and step.

    flops: operations. traffic: bytes by link (hbm, pcie, interconnect). seconds: predicted. bound: what decides it:
    compute, hbm, pcie or interconnect. break_even: tokens that have to share one pass over the weights so that
    computing takes as long as fetching them, None where nothing is fetched.
    """

    seconds: float
    bound: str
    flops: float = 0.0
    traffic: dict[str, float] = field(default_factory=dict)
    break_even: int | None = None


def forward_flops(shape: Shape, tokens: float, predicted: float, length: float) -> float:
    """One forward: 2 per weight and token, causal attention over sequences of `length`, the head at `predicted`."""
    attention = 2 * length * shape.layers * shape.heads * shape.head_dim
    return tokens * (2 * shape.multiplied + attention) + 2 * predicted * shape.head


def slowest(speed: Speed, flops: float, **traffic: float) -> Cost:
    """Everything at once: the slowest of computing and every link decides."""
    times = {"compute": flops / speed.flops} | {link: speed.seconds(size, link) for link, size in traffic.items()}
    bound = max(times, key=lambda name: times[name])
    return Cost(times[bound], bound, flops, {link: size for link, size in traffic.items() if size})


def rollout_cost(config: Config, student: Shape, work: Workload, cluster: Cluster, speed: Speed) -> Cost:
    """Prefill, then one decoding step per token of every batch: all weights and the batch's KV cache are read."""
    itemsize = DTYPES[config.model.dtype].itemsize
    kv = student.kv_bytes_per_token(itemsize)
    if config.rollout.engine == "vllm":
        room = config.rollout.vllm.gpu_memory_utilization * cluster.memory - student.weights * itemsize - VLLM_WORKSPACE
        fitting = max(1, int(room / (kv * (work.prompt + work.response))))
        rows = min(config.rollout.vllm.max_num_seqs, work.sequences, fitting)
        steps = work.sequences * work.response / rows
    else:
        rows = min(config.rollout.max_batch_size, work.sequences)
        steps = ceil(work.sequences / rows) * work.response
    length = work.prompt + work.response
    prefill = forward_flops(student, work.sequences * work.prompt, work.sequences, work.prompt)
    decoding = forward_flops(student, work.predicted, work.predicted, length)
    read = steps * (student.weights * itemsize + rows * (work.prompt + work.response / 2) * kv)
    first, then = slowest(speed, prefill), slowest(speed, decoding, hbm=read)
    return Cost(first.seconds + then.seconds, then.bound, prefill + decoding, then.traffic)


def scoring_cost(model: Frozen, work: Workload, cluster: Cluster, speed: Speed) -> Cost:
    """One frozen model over all sequences; its λ is taken to be non-zero for every sample."""
    if model.placement == "server":
        return Cost(0.0, "other processes")
    length = work.prompt + work.response
    flops = forward_flops(model.shape, work.tokens, work.predicted, length)
    trips = ceil(work.tokens / work.packed(work.trip_budget))
    if model.placement == "lora":
        # The base is read and the sum written once per trip, on the device.
        return slowest(speed, flops, hbm=trips * 2 * model.shape.weights * model.itemsize)
    if model.placement in ("offload", "delta"):
        cost = slowest(speed, flops, pcie=trips * model.nbytes)
        # The first layer of a trip is waited for.
        waiting = trips * speed.seconds(model.shape.layer * model.itemsize, "pcie")
        return Cost(
            cost.seconds + waiting, cost.bound, flops, cost.traffic, break_even(model.itemsize, speed, speed.pcie)
        )
    if model.placement == "sharded" and cluster.ranks > 1:
        forwards = ceil(work.tokens / work.packed(work.scoring_budget))
        gathered = forwards * model.nbytes * (cluster.ranks - 1) / cluster.ranks
        cost = slowest(speed, flops, interconnect=gathered)
        tokens = break_even(model.itemsize, speed, speed.interconnect)
        return Cost(cost.seconds, cost.bound, flops, cost.traffic, tokens)
    return slowest(speed, flops)


def break_even(itemsize: int, speed: Speed, link: float) -> int:
    """Tokens of one pass at which 2 FLOP per weight and token take as long as fetching the weight."""
    return ceil(itemsize / (link * 1e9 * speed.link_share) * speed.flops / 2)


def learner_costs(config: Config, student: Shape, work: Workload, cluster: Cluster, speed: Speed) -> dict[str, Cost]:
    """Stages loss and learner, and log π_old where it takes a forward of its own."""
    itemsize, stage = DTYPES[config.model.dtype].itemsize, config.learner.zero_stage
    length = work.prompt + work.response
    body = forward_flops(student, work.tokens, 0, length) * work.epochs
    head = 2 * work.predicted * student.head * work.epochs
    steps = work.minibatches * work.epochs
    passes = steps * work.microbatches
    others = (cluster.ranks - 1) / cluster.ranks
    gather = (student.weights if stage == 3 else student.trained) * itemsize * others
    # A sum over the ranks moves every byte twice, a reduce-scatter once; gradients travel in float32.
    summed = 4 * student.trained * others
    # Under an adapter only the inputs' gradients are products with the frozen weights; the adapter's own are small.
    products = (1 if student.adapter else 2) + (1 if config.model.gradient_checkpointing else 0)
    share = student.trained / cluster.ranks
    if config.learner.offload == "none" or cluster.on_cpu:
        # Gradient, weight and moments read; weight and moments written.
        update = slowest(speed, 0.0, hbm=steps * 28 * share)
    else:
        # Gradients go to the host, weights come back; what the host takes for AdamW itself is not known here.
        update = slowest(speed, 0.0, pcie=steps * (4 + itemsize) * share)
    fetched = {}
    if config.learner.offload == "optimizer_and_weights" and not cluster.on_cpu:
        fetched = {"pcie": passes * student.weights / cluster.ranks * itemsize}
    # The loss makes the head's gradients in its forward: 3 products in all, 2 for a frozen head.
    head_products = (2 if student.adapter else 3) * head
    if stage == 3:
        loss = slowest(speed, body + head_products, interconnect=passes * gather, **fetched)
        backward = slowest(speed, products * body, interconnect=passes * (gather + summed), **fetched)
        after = Cost(0.0, "compute")
    elif stage == 2:
        loss = slowest(speed, body + head_products)
        backward = slowest(speed, products * body, interconnect=passes * 2 * summed)
        after = slowest(speed, 0.0, interconnect=steps * gather)
    else:
        loss = slowest(speed, body + head_products)
        backward = slowest(speed, products * body)
        after = slowest(speed, 0.0, interconnect=steps * (2 * summed + gather))
    costs = {"loss": loss, "learner": _in_turn(backward, after, update)}
    if needs_old_logprobs(config):
        costs["scoring: log π_old"] = slowest(speed, (body + head) / work.epochs)
    return costs


def _in_turn(first: Cost, *others: Cost) -> Cost:
    """One after the other; bound as the longest of them."""
    costs = (first, *others)
    traffic: dict[str, float] = {}
    for cost in costs:
        for link, size in cost.traffic.items():
            traffic[link] = traffic.get(link, 0.0) + size
    longest = max(costs, key=lambda cost: cost.seconds)
    return Cost(sum(c.seconds for c in costs), longest.bound, sum(c.flops for c in costs), traffic)


def sync_cost(config: Config, student: Shape, cluster: Cluster, speed: Speed) -> Cost:
    """Stage weight_sync: gathered under ZeRO-3, then copied on the device."""
    size = student.weights * DTYPES[config.model.dtype].itemsize
    gathered = size * (cluster.ranks - 1) / cluster.ranks if config.learner.zero_stage == 3 else 0
    return slowest(speed, 0.0, hbm=2 * size, interconnect=gathered)


def step_costs(
    config: Config, student: Shape, frozen: Sequence[Frozen], work: Workload, cluster: Cluster, speed: Speed
) -> dict[str, Cost]:
    """Stage (and for scoring the model) -> cost, in the order of the stages. Data, reward, batch and judge: none."""
    learner = learner_costs(config, student, work, cluster, speed)
    scoring = {f"scoring: {', '.join(m.roles)}": scoring_cost(m, work, cluster, speed) for m in frozen}
    return {
        "rollout": rollout_cost(config, student, work, cluster, speed),
        **{name: cost for name, cost in learner.items() if name.startswith("scoring")},
        **scoring,
        **{name: cost for name, cost in learner.items() if not name.startswith("scoring")},
        "weight_sync": sync_cost(config, student, cluster, speed),
    }
