"""The loop: data → rollout → scoring → reward → batch → loss → learner → weight_sync.

`train` is the whole of it; what it needs is read in `inputs` and built in `run`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tcopd_fast import rundir
from tcopd_fast.alarm import advantage_shares
from tcopd_fast.batch import build_minibatches, shard
from tcopd_fast.config import Config
from tcopd_fast.diagnosis import check_finite
from tcopd_fast.dist import World, init_world
from tcopd_fast.inputs import Inputs, prompts_of_step, read_inputs, sampling_seed
from tcopd_fast.metrics import routing_metrics, step_metrics, token_samples
from tcopd_fast.reward import compute_reward, lambdas_at
from tcopd_fast.run import Parts, assemble, counter, evaluate_now
from tcopd_fast.stop import Stop, StopRequested
from tcopd_fast.types import Prompt, Rollout
from tcopd_fast.weight_sync import sync_weights


def train(config: Config, resume: bool = False, stop: Stop | None = None) -> None:
    """Run or continue a training run, until it is done or `stop` says so. Every rank calls it."""
    world = init_world(config.learner.rank_timeout_s)
    inputs = read_inputs(config, world.size)
    with (
        world.watching_ranks(),
        rundir.opened(config, world, inputs.fingerprint, resume) as start,
        assemble(config, inputs, world, start, resume, stop or Stop()) as run,
    ):
        parts = run.parts
        parts.progress.message(describe(config, inputs, parts, start))
        for line in parts.scorer.placements():
            parts.progress.message(f"scoring by {line}")
        if routing := parts.scorer.routing(inputs.domains):
            parts.progress.message(f"routing by λ: {routing}")
        if start == 0 and config.eval.at_start:
            evaluate_now(config, inputs, parts, step=0)
        for step in range(start, config.steps):
            if run.stopped(step):
                break
            clock = parts.clock
            with clock.stage("data"):
                prompts = shard(prompts_of_step(config, inputs, step), world)
                lambdas = [
                    lambdas_at(config, p.domain, step)
                    for p in prompts
                    for _ in range(config.rollout.samples_per_prompt)
                ]
            with clock.stage("rollout"):
                rollouts = generate(config, parts, prompts, step)
            parts.engine.sleep()
            if run.stopped(step):
                break
            with clock.stage("scoring"):
                old = parts.learner.logprobs(rollouts) if needs_old_logprobs(config) else None
                scored = parts.scorer.score(rollouts, lambdas, old)
            with clock.stage("reward"):
                correct = parts.judges.rollouts(rollouts)
                rewarded = compute_reward(config, scored, lambdas, correct, mean_verdict(world, correct))
            with clock.stage("batch"):
                minibatches = build_minibatches(rewarded, config, world)
            update = parts.learner.update(minibatches, len(rollouts), clock)  # stages loss and learner
            with clock.stage("weight_sync"):
                version = sync_weights(parts.learner, parts.engine, step + 1)
            if step == 0:
                run.self_check(scored, update.old_logprobs)
            metrics = step_metrics(config, world, inputs.domains, rewarded, minibatches, update)
            metrics |= routing_metrics(config, world, parts.scorer.needs(lambdas), rewarded)
            metrics |= advantage_shares(config, world, rewarded, update.old_logprobs)
            metrics |= parts.engine.metrics()
            metrics |= {"data/dropped_overlong": inputs.dropped_overlong, "weight_sync/version": version}
            decode = inputs.models.tokenizer.decode
            samples = token_samples(
                config, step + 1, rewarded, update.old_logprobs, decode, config.logging.token_samples
            )
            run.report_step(step + 1, metrics, samples)
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


def needs_old_logprobs(config: Config) -> bool:
    """False when the single optimizer step of a batch is strictly on-policy: its own forward gives log π_old."""
    return config.learner.minibatches * config.learner.epochs > 1


def generate(config: Config, parts: Parts, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
    """This rank's responses of a step, showing how many are done; none when this rank is asked to stop meanwhile."""
    count = counter(parts.progress, "rollout", len(prompts) * config.rollout.samples_per_prompt)

    def finished(rollout: Rollout) -> None:
        count(rollout)
        parts.stop.check()

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
