"""Stage 8, weight_sync: the learner's weights into the rollout engine, in place, version stamped."""

from __future__ import annotations

from tcopd_fast.learner import Learner
from tcopd_fast.rollout import RolloutEngine


def sync_weights(learner: Learner, engine: RolloutEngine, version: int) -> int:
    """Copy every parameter (gathered one at a time under ZeRO-3), stamp `version` and return it.

    A collective under ZeRO-3: every rank must call it. No file is written.
    """
    engine.load_weights(learner.named_weights(), version)
    return engine.version
