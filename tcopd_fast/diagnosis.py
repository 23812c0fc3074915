"""What was not finite in a step, and where it came from: for people who find a run stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.learner import UpdateResult
from tcopd_fast.rundir import write_atomically
from tcopd_fast.types import RewardedRollout

FILE = "diagnosis.json"
MAX_RESPONSES = 32
MAX_TOKENS = 8

Finding = dict[str, Any]


def check_finite(
    config: Config,
    world: World,
    step: int,
    metrics: Mapping[str, float],
    rewarded: Sequence[RewardedRollout],
    update: UpdateResult,
    say: Callable[[str], None],
) -> None:
    """Say where a skipped step's numbers went wrong. A collective.

    Raises UserError, leaving diagnosis.json, when learner.max_skipped_steps optimizer steps in a row were skipped or a
    weight is not finite.
    """
    if not update.skipped and update.weights_finite:
        return
    findings = [f for share in world.gather(non_finite(rewarded, update.old_logprobs)) for f in share]
    say(f"step {step}: {in_words(findings)}")
    if not update.weights_finite:
        reason = "the optimizer step left weights that are not finite"
    elif update.skipped_in_a_row >= config.learner.max_skipped_steps:
        reason = f"{update.skipped_in_a_row} optimizer steps in a row had a gradient that is not finite"
    else:
        return

    def give_up() -> None:
        path = write_diagnosis(config, step, reason, metrics, findings)
        raise UserError(
            f"step {step}: {reason}: {in_words(findings)}; see {path}. Earlier checkpoints are untouched: resume from "
            "the newest with other settings, or delete it to go further back"
        )

    world.on_main(give_up)


def non_finite(rewarded: Sequence[RewardedRollout], old_logprobs: Sequence[Tensor]) -> list[Finding]:
    """The responses of this rank with a number that is not finite, by the source of the number; at most 32 per source.

    Source is rollout, learner (its own logprobs), reference, `teacher NAME` or `base of NAME`; reward only where none
    of these explains it. A finding has source, prompt_id, domain, sample, count, and the first 8 such tokens.
    """
    findings: list[Finding] = []
    for item, old in zip(rewarded, old_logprobs, strict=True):
        own = [_finding(item, name, values) for name, values in _sources(item, old) if not _finite(values)]
        if not own and not _finite(item.reward):
            own = [_finding(item, "reward", item.reward)]
        findings += own
    counts: dict[str, int] = {}
    kept = []
    for finding in findings:
        counts[finding["source"]] = counts.get(finding["source"], 0) + 1
        if counts[finding["source"]] <= MAX_RESPONSES:
            kept.append(finding)
    return kept


def in_words(findings: Sequence[Finding]) -> str:
    """`teacher expert gave numbers that are not finite (3 responses, first prompt p1)`, for every source."""
    parts = []
    for source in dict.fromkeys(finding["source"] for finding in findings):
        own = [finding for finding in findings if finding["source"] == source]
        number = f"{len(own)} response{'s' if len(own) > 1 else ''}"
        parts.append(f"{source} gave numbers that are not finite ({number}, first prompt {own[0]['prompt_id']})")
    return "; ".join(parts) or "every logprob and reward is finite, so the gradient overflowed"


def write_diagnosis(
    config: Config, step: int, reason: str, metrics: Mapping[str, float], findings: Sequence[Finding]
) -> Path:
    """Write RUN/diagnosis.json: reason, metrics and findings of the step, and the configuration keys to look at."""
    record = {
        "step": step,
        "reason": reason,
        "explanation": in_words(findings),
        "look_at": {key: _value(config, key) for key in keys_to_look_at(findings)},
        "responses": list(findings),
        "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
    }
    path = Path(config.run_dir) / FILE
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return path


def keys_to_look_at(findings: Sequence[Finding]) -> list[str]:
    """Configuration keys that decide over the sources of the findings."""
    keys = []
    for source in dict.fromkeys(finding["source"] for finding in findings):
        kind, _, name = source.rpartition(" ")
        if kind:
            keys += [
                f"teachers.{name}.{key}" for key in ("path" if kind == "teacher" else "base", "dtype", "placement")
            ]
        elif source == "reference":
            keys += ["reference", "scoring.placement"]
        elif source == "rollout":
            keys += ["rollout.engine", "rollout.temperature"]
    if not keys or any(finding["source"] in ("learner", "reward") for finding in findings):
        keys += ["learner.lr", "learner.max_grad_norm", "learner.warmup_steps"]
        keys += ["objective.logratio_clamp", "objective.advantage_clamp", "objective.lambdas"]
    return [*keys, "model.path", "model.dtype"]


def _sources(item: RewardedRollout, old: Tensor) -> Iterator[tuple[str, Tensor]]:
    scored = item.scored
    yield "rollout", scored.rollout.logprobs
    yield "learner", old
    if scored.ref_logprob is not None:
        yield "reference", scored.ref_logprob
    for name, values in scored.teacher_logprobs.items():
        yield f"teacher {name}", values
    for name, values in scored.teacher_ref_logprobs.items():
        yield f"base of {name}", values


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _finding(item: RewardedRollout, source: str, values: Tensor) -> Finding:
    rollout = item.scored.rollout
    at = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    return {
        "source": source,
        "prompt_id": rollout.prompt.id,
        "domain": rollout.prompt.domain,
        "sample": rollout.sample,
        "count": len(at),
        "tokens": [
            {"position": t, "token_id": rollout.token_ids[t], "value": str(float(values[t]))} for t in at[:MAX_TOKENS]
        ],
    }


def _value(config: Config, key: str) -> Any:
    tree: Any = config.model_dump(mode="json")
    for part in key.split("."):
        tree = tree[part] if isinstance(tree, dict) else None
    return tree
