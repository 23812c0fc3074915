"""A run's long-lived parts: built in the order that works, evaluated with, saved, closed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcopd_fast import checkpoints, evaluate
from tcopd_fast.alarm import Alarms, first_entropy
from tcopd_fast.batch import shard
from tcopd_fast.clock import StageClock
from tcopd_fast.config import Config, longest_sequence
from tcopd_fast.dist import World
from tcopd_fast.inputs import Inputs, prompts_of_step, sampling_seed
from tcopd_fast.judges import Judges
from tcopd_fast.learner import Learner
from tcopd_fast.metrics import token_samples
from tcopd_fast.monitor import MetricsLog, Progress
from tcopd_fast.rollout import RolloutEngine
from tcopd_fast.rollout.build import build_engine
from tcopd_fast.scoring import ModelKey, Scorer
from tcopd_fast.stop import Stop, StopRequested
from tcopd_fast.timeline import TOKEN_METRICS, StepTimeline, throughput_metrics, tracks_of
from tcopd_fast.types import Prompt, RewardedRollout, Rollout, ScoredRollout
from tcopd_fast.weight_sync import LearnerWeights, sync_weights

if TYPE_CHECKING:
    # Engines in processes of their own need vllm.
    from tcopd_fast.rollout.ahead import Ahead


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


class Run:
    """Owner of a run's parts: builds them in the order that works, reports, checkpoints, closes them."""

    def __init__(self, config: Config, inputs: Inputs, origin: checkpoints.Origin, parts: Parts) -> None:
        self.config = config
        self.inputs = inputs
        self.parts = parts
        self.saver = checkpoints.Saver(config, parts.world, parts.learner.save, origin, parts.progress.message)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.progress.close()
        self.parts.log.close()
        self.parts.judges.close()
        self.parts.engine.close()

    def report_step(
        self, step: int, metrics: dict[str, Any], rewarded: Sequence[RewardedRollout], old_logprobs: Sequence[Tensor]
    ) -> None:
        """Log one step; times and memory are the slowest and largest over the ranks. A collective.

        rewarded, old_logprobs: this rank's, in the same order; the first are kept as token samples.
        """
        metrics |= self._times(step, metrics)
        flags, warnings = self.parts.alarms.check(step, metrics)
        metrics |= flags
        metrics["learner/failed_saves"] = self.saver.failed
        decode, kept = self.inputs.models.tokenizer.decode, self.config.logging.token_samples
        self.parts.log.log_tokens(token_samples(self.config, step, rewarded, old_logprobs, decode, kept))
        self.parts.log.log(step, metrics)
        self.parts.progress.step(step, metrics)
        if metrics["learner/skipped_steps"]:
            self.parts.progress.message(
                f"step {step}: {metrics['learner/skipped_steps']:.0f} optimizer step(s) skipped, gradient not finite"
            )
        for warning in warnings:
            self.parts.progress.message(warning)

    def _times(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """A step's times and memory over all ranks; the main process adds rates and logs the timeline. A collective."""
        parts = self.parts
        own = parts.clock.collect()
        times = parts.world.max(own.metrics | {"end": own.end})
        end = times.pop("end")
        ranks = parts.world.gather_to_main((own, parts.engine.spans(until=end)))
        if ranks is None:
            return times
        timeline = StepTimeline(
            step=step,
            start=min(rank.start for rank, _ in ranks),
            end=end,
            tokens={stage: int(metrics[key]) for stage, key in TOKEN_METRICS.items()},
            tracks=tracks_of([rank.spans for rank, _ in ranks], [engines for _, engines in ranks]),
        )
        parts.log.log_timeline(timeline)
        return times | throughput_metrics(timeline)

    def stopped(self, step: int) -> bool:
        """Whether some rank was asked to stop; the student after `step` steps is then saved. A collective."""
        parts = self.parts
        if not asked_to_stop(parts):
            return False
        if step and not parts.world.on_main(lambda: step in checkpoints.checkpoint_steps(self.config.run_dir)):
            self.saver.save(step, must=True)
        saved = f"saved after step {step} of {self.config.steps}" if step else "nothing trained yet"
        parts.progress.message(f"stopped as asked: {saved}; go on with `tcopd train --resume {self.config.run_dir}`")
        return True

    def catch_up(self, start: int) -> None:
        """Evaluate what should have been evaluated by step `start` and was not: a stop may have cut it short."""
        if start == 0:
            if self.config.eval.at_start:
                self._evaluate(0)
            return
        if not self._evaluation_due(start) or not self.inputs.eval_sets:
            return
        path = Path(self.config.run_dir) / "eval.jsonl"
        world = self.parts.world
        done = world.on_main(
            lambda: {r["set"]: r["mean_at_k"] for r in evaluate.read_records(path) if r["step"] == start}
        )
        if set(self.inputs.eval_sets) <= set(done):
            return
        means = self._evaluate(start, done)
        if means is not None:
            score = world.on_main(lambda: checkpoints.score_of(self.config, done | means))
            world.on_main(lambda: checkpoints.record_score(self.config.run_dir, start, score))

    def finish_step(self, step: int) -> None:
        """Evaluate and save when it is time to. A stop that cuts the evaluation short saves, here or in `stopped`."""
        last = step == self.config.steps
        score = None
        if self._evaluation_due(step):
            means = self._evaluate(step)
            if means is None:
                return
            score = self.parts.world.on_main(lambda: checkpoints.score_of(self.config, means))
        every = self.config.checkpoint.every
        due = last or bool(every and step % every == 0)
        if due or self.parts.world.on_main(lambda: checkpoints.is_among_best(self.config, score)):
            self.saver.save(step, score, must=last)

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.steps or bool(every and step % every == 0)

    def _evaluate(self, step: int, done: Collection[str] = ()) -> dict[str, float] | None:
        means = evaluate_now(self.config, self.inputs, self.parts, step, done)
        if means is None and step == self.config.steps:
            self.stopped(step)  # no step comes after this one to ask
        return means

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
            raise world.agreed(
                f"scoring.self_check_tolerance={self.config.scoring.self_check_tolerance}: the student as a frozen "
                f"model differs from the learner by {mean:.1e} nats per token; check model.dtype and model.attention"
            )


def assemble(
    config: Config, inputs: Inputs, world: World, origin: checkpoints.Origin, start: int, resume: bool, stop: Stop
) -> Run:
    """Build a run's parts, the learner first: its process group is what vLLM joins. A collective. Raises UserError."""
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
    scorer = Scorer(config, inputs.models, world, learner.frozen_base())
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
    return Run(config, inputs, origin, parts)


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


def asked_to_stop(parts: Parts) -> bool:
    """Whether some rank was. A collective."""
    return bool(parts.world.max({"stop": float(parts.stop.requested is not None)})["stop"])


def evaluate_now(
    config: Config, inputs: Inputs, parts: Parts, step: int, done: Collection[str] = ()
) -> dict[str, float] | None:
    """Evaluate every held-out set that is not `done` with the current student: mean@k of each, on rank 0, which writes
    the records. None on every rank when some rank was asked to stop meanwhile: the set under way is abandoned."""
    world = parts.world
    means: dict[str, float] = {}
    for name, prompts in inputs.eval_sets.items():
        if name in done:
            continue
        sampled = _sampled(config, parts, name, shard(prompts, world))
        if asked_to_stop(parts):
            return None
        local = evaluate.judged(sampled, parts.judges, config.eval.samples, sampling_seed(config.seed, -1))
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


def _sampled(config: Config, parts: Parts, name: str, prompts: Sequence[Prompt]) -> list[Rollout]:
    """This rank's answers to its share of a held-out set; none when it is asked to stop meanwhile."""
    count = counter(parts.progress, f"evaluating {name}", len(prompts) * config.eval.samples)

    def finished(rollout: Rollout) -> None:
        count(rollout)
        parts.stop.check()

    try:
        return parts.engine.generate(
            prompts,
            samples=config.eval.samples,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            temperature=config.eval.temperature,
            seed=sampling_seed(config.seed, -1),
            on_finished=finished,
        )
    except StopRequested:
        return []


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
