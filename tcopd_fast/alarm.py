"""Alarms for negative λ: anti-experts that drown out the other teachers, and an entropy that collapses.

What teacher k adds to the advantage of token t, and its share over all tokens of a step and all ranks, from 0 to 1:

    c_k,t = (λ_k/K) · clamp(log π_k − log π_ref)        share_k = Σ_t |c_k,t| / Σ_t Σ_j |c_j,t|

The student's own part, −[log π_old − log π_ref], is left out: it answers the teachers, and grows as the student follows
them, so that with it in the denominator the share of an anti-expert would fall while a run goes astray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.dist import World
from tcopd_fast.metrics import contribution
from tcopd_fast.types import RewardedRollout

GUARDS = (
    "objective.ref_kl_coef, advantage_clamp, logratio_clamp and lambda_warmup_steps are the guards "
    "(docs/safety.md says what each does)"
)


def advantage_shares(
    config: Config, world: World, rewarded: Sequence[RewardedRollout], old: Sequence[Tensor]
) -> dict[str, float]:
    """`reward/<teacher>/advantage_share` of every teacher and `reward/negative_share`. A collective.

    The latter counts only tokens where the teacher's λ is below 0, over all such teachers. A teacher with a base of its
    own is measured against it; where the reference cancelled and was not run, log π_old stands in for it. NaN when
    nothing contributes, or when a logprob is not finite.

    rewarded and old (float32 [L] each, log π_old) are this rank's, in the same order.
    """
    sums = {f"teacher/{name}": 0.0 for name in config.teachers} | {"negative": 0.0}
    for item, old_logprob in zip(rewarded, old, strict=True):
        for name, value in item.lambdas.items():
            if value:
                size = float(contribution(config, item, name, old_logprob).double().abs().sum())
                sums[f"teacher/{name}"] += size
                sums["negative"] += size if value < 0 else 0.0
    sums = world.sum(sums)
    total = sum(sums[f"teacher/{name}"] for name in config.teachers)
    shares = {key: value / total if total else math.nan for key, value in sums.items()}
    metrics = {f"reward/{name}/advantage_share": shares[f"teacher/{name}"] for name in config.teachers}
    return metrics | {"reward/negative_share": shares["negative"]}


class Alarms:
    """Compares every step with its bounds and words one warning per kind.

    first_entropy: mean entropy of the run's first step, nats per token; None when that step is still to come.
    """

    def __init__(self, config: Config, first_entropy: float | None = None) -> None:
        self._objective = config.objective
        self._negative = [
            name for name in config.teachers if any(t.get(name, 0.0) < 0 for t in config.lambda_tables().values())
        ]
        self._first_entropy = first_entropy
        self._warned: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """(0/1 metrics `reward/alarm_negative_share` and `loss/alarm_entropy`, warnings to print) of one step.

        A switched-off alarm has no metric. A number that is not finite never fires.
        """
        objective = self._objective
        flags: dict[str, float] = {}
        warnings: list[str] = []
        entropy, share = metrics["loss/entropy"], metrics["reward/negative_share"]
        if self._first_entropy is None and entropy > 0 and math.isfinite(entropy):
            self._first_entropy = entropy
        if objective.alarm_negative_share is not None:
            fired = share > objective.alarm_negative_share
            flags["reward/alarm_negative_share"] = float(fired)
            if fired and self._first_time("share"):
                warnings.append(self._share_warning(step, share, metrics))
        if objective.alarm_entropy_share is not None and self._first_entropy is not None:
            fired = entropy < objective.alarm_entropy_share * self._first_entropy
            flags["loss/alarm_entropy"] = float(fired)
            if fired and self._first_time("entropy"):
                warnings.append(self._entropy_warning(step, entropy))
        return flags, warnings

    def _first_time(self, kind: str) -> bool:
        first = kind not in self._warned
        self._warned.add(kind)
        return first

    def _share_warning(self, step: int, share: float, metrics: Mapping[str, float]) -> str:
        names = ", ".join(f"{name} {metrics[f'reward/{name}/advantage_share']:.3g}" for name in self._negative)
        bound = self._objective.alarm_negative_share
        return (
            f"warning: step {step}: {share:.3g} of what the teachers add to the advantage comes from negative λ "
            f"({names}), more than objective.alarm_negative_share={bound:g}: the student mostly learns what to avoid. "
            f"Bring negative objective.lambdas nearer to 0; {GUARDS}. Later steps are marked in "
            "reward/alarm_negative_share only."
        )

    def _entropy_warning(self, step: int, entropy: float) -> str:
        assert self._first_entropy is not None
        return (
            f"warning: step {step}: the entropy, {entropy:.3g} nats per token, is {entropy / self._first_entropy:.2g} "
            f"of the first step's, less than objective.alarm_entropy_share={self._objective.alarm_entropy_share:g}: "
            "the student hardly explores any more. Lower learner.lr or bring negative objective.lambdas nearer to 0; "
            f"{GUARDS}. Later steps are marked in loss/alarm_entropy only."
        )


def first_entropy(run_dir: Path) -> float | None:
    """`loss/entropy` of the first step in RUN/metrics.jsonl that has one above 0; None when there is none."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            entropy = json.loads(line).get("loss/entropy")
            if entropy:
                return float(entropy)
    return None
