"""The loop: data → rollout → scoring → reward → batch → loss → learner → weight_sync.

`loop` is the whole of it; what it needs is read in `inputs` and built in `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

from tcopd_fast import rundir
from tcopd_fast.alarm import advantage_shares
from tcopd_fast.balance import Share, balance
from tcopd_fast.batch import build_minibatches, shard
from tcopd_fast.config import Config
from tcopd_fast.diagnosis import check_finite
from tcopd_fast.dist import World, init_world
from tcopd_fast.inputs import Inputs, origin_of, prompts_of_step, read_inputs, sampling_seed
from tcopd_fast.learner import UpdateResult
from tcopd_fast.metrics import generation_metrics, routing_metrics, step_metrics
from tcopd_fast.reward import compute_reward, lambdas_at
from tcopd_fast.run import Parts, assemble, counter
from tcopd_fast.scoring.early import Early
from tcopd_fast.stop import Stop, StopRequested
from tcopd_fast.types import Batch, Prompt, RewardedRollout, Rollout
from tcopd_fast.weight_sync import sync_weights


def train(config: Config, resume: bool = False, stop: Stop | None = None) -> None:
    """Run or continue a training run, until it is done or `stop` says so. Every rank calls it."""
    world = init_world(config.learner.rank_timeout_s)
    inputs = world.together(lambda: read_inputs(config, world.size))
    with world.watching_ranks():
        loop(config, inputs, world, resume, stop or Stop())
        world.leave()


def loop(config: Config, inputs: Inputs, world: World, resume: bool, stop: Stop) -> None:
    """Every step that is left of a run. A collective."""
    with (
        nullcontext(origin_of(config, inputs, world)) as origin,
        rundir.opened(config, world, origin, resume) as start,
        assemble(config, inputs, world, origin, start, resume, stop) as run,
    ):
        parts = run.parts
        parts.progress.message(describe(config, inputs, parts, start))
        for line in parts.scorer.placements():
            parts.progress.message(f"scoring by {line}")
        if routing := parts.scorer.routing(inputs.domains):
            parts.progress.message(f"routing by λ: {routing}")
        run.catch_up(start)
        for step in range(start, config.steps):
            if run.stopped(step):
                break
            clock = parts.clock
            with clock.stage("data"):
                prompts = shard(prompts_of_step(config, inputs, step), world)
                early = Early(parts.scorer, partial(lambdas_of, config, step), clock, parts.engine.apart)
            with clock.stage("rollout"):
                sampled = generate(config, parts, prompts, step, early)
            parts.engine.sleep()
            if run.stopped(step):
                break
            with clock.stage("scoring"):
                share = balance(sampled, early.scores(sampled), config, world)
                rollouts = share.rollouts
                lambdas = [lambdas_of(config, step, rollout) for rollout in rollouts]
                old = parts.learner.logprobs(rollouts) if needs_old_logprobs(config) else None
                scored = parts.scorer.score(rollouts, lambdas, old, share.scores)
            with clock.stage("reward"):
                correct = parts.judges.rollouts(rollouts)
                rewarded = compute_reward(config, scored, lambdas, correct, mean_verdict(world, correct))
            with clock.stage("batch"):
                minibatches = build_minibatches(rewarded, share.minibatches, config, world)
            update = parts.learner.update(minibatches, len(rollouts), clock)  # stages loss and learner
            with clock.stage("weight_sync"):
                version = sync_weights(parts.learner, parts.engine, step + 1)
            if step == 0:
                run.self_check(scored, update.old_logprobs)
            metrics = measure(config, inputs, parts, step, share, lambdas, rewarded, minibatches, update)
            metrics |= {"weight_sync/version": version}
            run.report_step(step + 1, metrics, rewarded, update.old_logprobs)
            check_finite(config, world, step + 1, metrics, rewarded, update, parts.progress.message)
            run.finish_step(step + 1)


def describe(config: Config, inputs: Inputs, parts: Parts, start: int) -> str:
    """The line that opens a run's output."""
    dropped = f", {inputs.dropped_overlong} dropped as too long" if inputs.dropped_overlong else ""
    return (
        f"{'resuming after' if start else 'starting at'} step {start} of {config.steps}: {len(inputs.prompts)} prompts"
        f"{dropped}, {len(parts.scorer.models)} frozen models, {parts.world.size} rank(s), "
        f"{config.rollout.engine} rollout"
    )


def lambdas_of(config: Config, step: int, rollout: Rollout) -> dict[str, float]:
    """λ of every teacher for one response trained on in `step`."""
    return lambdas_at(config, rollout.prompt.domain, step)


def measure(
    config: Config,
    inputs: Inputs,
    parts: Parts,
    step: int,
    share: Share,
    lambdas: Sequence[Mapping[str, float]],
    rewarded: Sequence[RewardedRollout],
    minibatches: Sequence[Sequence[Batch]],
    update: UpdateResult,
) -> dict[str, float]:
    """Every metric of a step but times, memory and the weights' version. A collective; equal on every rank."""
    world, needs = parts.world, parts.scorer.needs(lambdas)
    return {
        "data/dropped_overlong": float(inputs.dropped_overlong),
        **generation_metrics(world, share, needs, parts.ahead.metrics(step) if parts.ahead else {}),
        **parts.engine.metrics(),
        **routing_metrics(config, world, needs, rewarded),
        **step_metrics(config, world, inputs.domains, rewarded, minibatches, update),
        **advantage_shares(config, world, rewarded, update.old_logprobs),
    }


def needs_old_logprobs(config: Config) -> bool:
    """False when the single optimizer step of a batch is strictly on-policy: its own forward gives log π_old."""
    return config.learner.minibatches * config.learner.epochs > 1


def generate(config: Config, parts: Parts, prompts: Sequence[Prompt], step: int, early: Early) -> list[Rollout]:
    """This rank's responses of a step, showing how many are done; none when this rank is asked to stop meanwhile.

    Meanwhile models score what has finished, where they have the time.
    """
    count = counter(parts.progress, "rollout", len(prompts) * config.rollout.samples_per_prompt)

    def finished(rollout: Rollout) -> None:
        count(rollout)
        parts.stop.check()
        early.add(rollout)

    try:
        if parts.ahead is not None:
            return parts.ahead.take(step, finished)
        return parts.engine.generate(
            prompts,
            samples=config.rollout.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            seed=sampling_seed(config.seed, step),
            on_finished=finished,
        )
    except StopRequested:
        return []


def mean_verdict(world: World, correct: Sequence[bool | None]) -> float:
    """Share of correct answers among the judged ones of all ranks (0 when none is judged)."""
    judged = [c for c in correct if c is not None]
    sums = world.sum({"correct": float(sum(judged)), "judged": float(len(judged))})
    return sums["correct"] / sums["judged"] if sums["judged"] else 0.0
