"""The loop: data → rollout → scoring → reward → batch → loss → learner → weight_sync.

`train` is the whole of it; everything else here prepares or reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcopd_fast import checkpoints, evaluate, rundir
from tcopd_fast.alarm import Alarms, advantage_shares, first_entropy
from tcopd_fast.batch import build_minibatches, shard
from tcopd_fast.config import Config, longest_sequence
from tcopd_fast.data import load_eval_sets, load_prompts
from tcopd_fast.diagnosis import check_finite
from tcopd_fast.dist import World, init_world
from tcopd_fast.errors import UserError
from tcopd_fast.judges import Judges
from tcopd_fast.learner import Learner
from tcopd_fast.metrics import routing_metrics, step_metrics, token_samples
from tcopd_fast.models import ModelSet, check_models
from tcopd_fast.monitor import MetricsLog, Progress, StageClock
from tcopd_fast.order import batch_for_step, weighted_prompts
from tcopd_fast.reward import compute_reward, lambdas_at
from tcopd_fast.rollout import RolloutEngine
from tcopd_fast.rollout.build import build_engine
from tcopd_fast.scoring import ModelKey, Scorer
from tcopd_fast.scoring.lora import check_adapters
from tcopd_fast.stop import Stop, StopRequested
from tcopd_fast.types import Prompt, Rollout, ScoredRollout
from tcopd_fast.weight_sync import LearnerWeights, sync_weights

if TYPE_CHECKING:
    # Engines in processes of their own need vllm.
    from tcopd_fast.rollout.ahead import Ahead


@dataclass(frozen=True)
class Inputs:
    """What was read and checked before any weight was loaded.

    domains: every domain of the training prompts, sorted. eval_sets: name -> held-out problems.
    """

    models: ModelSet
    prompts: tuple[Prompt, ...]
    dropped_overlong: int
    domains: tuple[str, ...]
    eval_sets: Mapping[str, tuple[Prompt, ...]]

    @cached_property
    def fingerprint(self) -> str:
        """Of the training prompts: a run resumes only with the data it began with."""
        return checkpoints.fingerprint(self.prompts)


@dataclass(frozen=True)
class Parts:
    """The long-lived pieces of a run."""

    world: World
    learner: Learner
    engine: RolloutEngine
    ahead: Ahead | None
    scorer: Scorer
    judges: Judges
    clock: StageClock
    log: MetricsLog
    progress: Progress
    alarms: Alarms
    stop: Stop


def read_inputs(config: Config, world_size: int = 1) -> Inputs:
    """Read configs, tokenizers and prompts and refuse whatever could not work. Raises UserError."""
    if config.rollout.prompts_per_step < world_size:
        raise UserError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: fewer than the {world_size} ranks; raise it"
        )
    models = check_models(config)
    check_adapters(config)
    loaded = load_prompts(config.data.train, models.tokenizer, config.data)
    prompts = weighted_prompts(loaded.prompts, config.data.domain_weights)
    domains = tuple(sorted({prompt.domain for prompt in prompts}))
    tables = config.lambda_tables()
    if None not in tables and set(domains) - set(tables):
        unknown = sorted(set(domains) - set(tables))[0]
        raise UserError(
            f"objective.lambdas: training prompts have the domain {unknown!r} but the table only has "
            f"{', '.join(map(str, tables))}; add it or set data.train[].domain"
        )
    sets = load_eval_sets(config.eval.data, models.tokenizer, config.data)
    with Judges(config.judge) as judges:
        judges.check(chain(prompts, *sets.values()))
    longest = longest_sequence(config)
    if longest > models.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}: the models hold "
            f"{models.max_position_embeddings} positions; lower one of them"
        )
    checkpoints.check(config.checkpoint, sets)
    return Inputs(models, prompts, loaded.dropped_overlong, domains, sets)


def train(config: Config, resume: bool = False, stop: Stop | None = None) -> None:
    """Run or continue a training run, until it is done or `stop` says so. Every rank calls it."""
    world = init_world(config.learner.rank_timeout_s)
    inputs = read_inputs(config, world.size)
    with (
        world.watching_ranks(),
        rundir.opened(config, world, inputs.fingerprint, resume) as start,
        _assemble(config, inputs, world, start, resume, stop or Stop()) as run,
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


def sampling_seed(seed: int, step: int) -> int:
    """Seed of one step's sampling: a function of run seed and step, so that a resumed run samples alike."""
    return (seed * 1_000_003 + step) & 0x7FFFFFFF


def prompts_of_step(config: Config, inputs: Inputs, step: int) -> list[Prompt]:
    """The step's prompts over all ranks; a prompt met twice in one step gets its own id, hence its own samples."""
    chosen = batch_for_step(
        inputs.prompts,
        step,
        config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        weights=config.data.domain_weights,
    )
    seen: dict[str, int] = {}
    out = []
    for prompt in chosen:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        out.append(prompt if seen[prompt.id] == 1 else replace(prompt, id=f"{prompt.id}@{seen[prompt.id]}"))
    return out


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


def evaluate_now(config: Config, inputs: Inputs, parts: Parts, step: int) -> dict[str, float]:
    """Evaluate every held-out set with the current student: mean@k of each, on rank 0, which writes the records."""
    world = parts.world
    means: dict[str, float] = {}
    for name, prompts in inputs.eval_sets.items():
        mine = shard(prompts, world)
        local = evaluate.evaluate(
            parts.engine,
            mine,
            parts.judges,
            samples=config.eval.samples,
            temperature=config.eval.temperature,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            seed=sampling_seed(config.seed, -1),
            on_finished=counter(parts.progress, f"evaluating {name}", len(mine) * config.eval.samples),
        )
        kl = reverse_kl(config, parts, local.rollouts)
        shares = world.gather_to_main(local)
        if shares is None:
            continue
        merged = evaluate.merge(shares)
        record = {
            "step": step,
            "set": name,
            "domain": prompts[0].domain,
            "temperature": config.eval.temperature,
            **merged.summary(),
            "reverse_kl": kl,
        }
        record |= evaluate.accuracy_change(record, evaluate.read_records(Path(config.run_dir) / "eval.jsonl"))
        evaluate.write_samples(merged, Path(config.run_dir) / "eval" / f"step_{step:06d}_{name}.parquet")
        parts.log.log_eval(record)
        parts.progress.evaluation(record)
        means[name] = record["mean_at_k"]
    return means


def counter(progress: Progress, label: str, total: int) -> Callable[[Rollout], None]:
    """An `on_finished` that shows how many responses are done."""
    done = 0

    def count(_: Rollout) -> None:
        nonlocal done
        done += 1
        progress.phase(label, done, total)

    return count


def reverse_kl(config: Config, parts: Parts, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Monte-Carlo KL(student ‖ teacher) per sampled token, in nats, for every loaded teacher.

    Taken at the evaluation temperature with the sampler's logprobs; empty for greedy evaluation, where samples
    do not follow the student's distribution.
    """
    if config.eval.temperature == 0:
        return {}
    wanted = {
        role: key
        for role, key in parts.scorer.roles.items()
        if not (role.endswith(".base") and role.removesuffix(".base") in config.teachers)
    }
    kl: dict[ModelKey, float] = {}
    for key in dict.fromkeys(wanted.values()):
        scores = parts.scorer.logprobs(key, rollouts, range(len(rollouts)), config.eval.temperature)
        sums = parts.world.sum(
            {
                "kl": float(sum((r.logprobs - scores[i]).double().sum() for i, r in enumerate(rollouts))),
                "tokens": float(sum(len(r.token_ids) for r in rollouts)),
            }
        )
        kl[key] = sums["kl"] / sums["tokens"]
    return {role: kl[key] for role, key in wanted.items()}


class _Run:
    """Owner of a run's parts: builds them in the order that works, reports, checkpoints, closes them."""

    def __init__(self, config: Config, inputs: Inputs, parts: Parts) -> None:
        self.config = config
        self.inputs = inputs
        self.parts = parts
        self.saver = checkpoints.Saver(
            config, parts.world, parts.learner.save, inputs.fingerprint, parts.progress.message
        )

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.progress.close()
        self.parts.log.close()
        self.parts.judges.close()
        self.parts.engine.close()

    def report_step(self, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Log one step; times and memory are the slowest and largest over the ranks."""
        metrics |= self.parts.world.max(self.parts.clock.collect())
        flags, warnings = self.parts.alarms.check(step, metrics)
        metrics |= flags
        metrics["learner/failed_saves"] = self.saver.failed
        self.parts.log.log_tokens(samples)
        self.parts.log.log(step, metrics)
        self.parts.progress.step(step, metrics)
        if metrics["learner/skipped_steps"]:
            self.parts.progress.message(
                f"step {step}: {metrics['learner/skipped_steps']:.0f} optimizer step(s) skipped, gradient not finite"
            )
        for warning in warnings:
            self.parts.progress.message(warning)

    def stopped(self, step: int) -> bool:
        """Whether some rank was asked to stop; the student after `step` steps is then saved. A collective."""
        parts = self.parts
        if not parts.world.max({"stop": float(parts.stop.requested is not None)})["stop"]:
            return False
        if step and not parts.world.on_main(lambda: step in checkpoints.checkpoint_steps(self.config.run_dir)):
            self.saver.save(step, must=True)
        saved = f"saved after step {step} of {self.config.steps}" if step else "nothing trained yet"
        parts.progress.message(f"stopped as asked: {saved}; go on with `tcopd train --resume {self.config.run_dir}`")
        return True

    def finish_step(self, step: int) -> None:
        """Evaluate and save when it is time to."""
        last = step == self.config.steps
        every = self.config.eval.every
        score = None
        if last or (every and step % every == 0):
            means = evaluate_now(self.config, self.inputs, self.parts, step)
            score = self.parts.world.on_main(lambda: checkpoints.score_of(self.config, means))
        every = self.config.checkpoint.every
        due = last or bool(every and step % every == 0)
        if due or self.parts.world.on_main(lambda: checkpoints.is_among_best(self.config, score)):
            self.saver.save(step, score, must=last)

    def self_check(self, scored: Sequence[ScoredRollout], old_logprobs: Sequence[Tensor]) -> None:
        """Compare the learner's first logprobs with the same weights as a frozen model. Raises UserError.

        Nothing is compared when the reference is another model or was not needed.
        """
        if self.config.reference is not None:
            return
        differences = [
            (item.ref_logprob - old).abs().double()
            for item, old in zip(scored, old_logprobs, strict=True)
            if item.ref_logprob is not None
        ]
        world = self.parts.world
        sums = world.sum(
            {"sum": float(sum(d.sum() for d in differences)), "tokens": float(sum(len(d) for d in differences))}
        )
        if not sums["tokens"]:
            return
        mean = sums["sum"] / sums["tokens"]
        largest = world.max({"max": max((float(d.max()) for d in differences), default=0.0)})["max"]
        self.parts.progress.message(
            f"self-check: learner and frozen copy of the student differ by {mean:.1e} nats per token "
            f"(at most {largest:.1e})"
        )
        if not mean <= self.config.scoring.self_check_tolerance:
            raise UserError(
                f"scoring.self_check_tolerance={self.config.scoring.self_check_tolerance}: the student as a frozen "
                f"model differs from the learner by {mean:.1e} nats per token; check model.dtype and model.attention"
            )


def _assemble(config: Config, inputs: Inputs, world: World, start: int, resume: bool, stop: Stop) -> _Run:
    torch.manual_seed(config.seed)
    learner = Learner(config, inputs.models, world)
    engine = build_engine(
        config.model,
        config.rollout,
        inputs.models.tokenizer,
        max_model_len=longest_sequence(config),
        vocab_size=inputs.models.vocab_size,
        seed=config.seed + world.rank,
        world=world,
        weights=LearnerWeights(learner),
        run_dir=config.run_dir,
    )
    # An engine may reseed the global generator while it starts.
    torch.manual_seed(config.seed)
    scorer = Scorer(config, inputs.models, world)
    if start:
        learner.load(checkpoints.checkpoint_dir(config.run_dir, start))
        sync_weights(learner, engine, start)
    if not learner.weights_finite():
        raise world.agreed(f"model.path {config.model.path}: holds weights that are not finite; use another model")
    parts = Parts(
        world=world,
        learner=learner,
        engine=engine,
        ahead=_ahead(config, inputs, world, engine),
        scorer=scorer,
        judges=Judges(config.judge),
        clock=StageClock(world.device),
        log=MetricsLog(
            Path(config.run_dir),
            config.logging,
            # Before the first checkpoint everything is done again, the evaluation at step 0 included.
            (start or -1) if resume else None,
            enabled=world.is_main,
            run_config=config.model_dump(mode="json"),
        ),
        progress=Progress(config.steps, start, enabled=world.is_main),
        alarms=Alarms(config, first_entropy(Path(config.run_dir)) if start else None),
        stop=stop,
    )
    return _Run(config, inputs, parts)


def _ahead(config: Config, inputs: Inputs, world: World, engine: RolloutEngine) -> Ahead | None:
    """Generation of later batches beside the learner; None when every batch waits for the last one's weights."""
    if not config.rollout.staleness:
        return None
    from tcopd_fast.rollout.ahead import Ahead
    from tcopd_fast.rollout.vllm_server import ServerEngine

    assert isinstance(engine, ServerEngine), "checked by Config"
    return Ahead(
        engine,
        config.rollout,
        prompts_of=lambda step: shard(prompts_of_step(config, inputs, step), world),
        seed_of=lambda step: sampling_seed(config.seed, step),
        steps=config.steps,
    )
