"""One cell of the mid-size benchmark, in a process that does nothing else.

    python bench/midsize_child.py < CELL.json        (started by midsize.py)

It imports everything, then waits for one line of JSON: `config` (a configuration tree), `placement`, `tokens` (packed
tokens of a sequence), `steps` (to measure, after one that is not) and `out`, where the measurement goes. Without a line
it ends. The rollouts are random tokens with the student's own logprobs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (ahead of the cell, like everything that takes time to import)
import torch
from midsize_logits import LogitsLearner, LogitsScorer
from midsize_plan import LOGITS, lengths
from teacher_memory_child import resident_parts, resident_peak

from tcopd_fast.batch import build_minibatches
from tcopd_fast.clock import StageClock
from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.dist import World, init_world
from tcopd_fast.errors import UserError
from tcopd_fast.learner import Learner
from tcopd_fast.models import ModelSet, check_models
from tcopd_fast.reward import compute_reward
from tcopd_fast.rundir import write_atomically
from tcopd_fast.scoring import Scorer
from tcopd_fast.types import Prompt, Rollout, ScoredRollout

Score = Callable[[Sequence[Rollout]], list[ScoredRollout]]
DOMAIN = "d"


def random_rollouts(sequences: int, tokens: int, vocab: int) -> list[Rollout]:
    """Sequences of random ids, `tokens` packed tokens each, the same in every process; their logprobs are zero."""
    generator = torch.Generator().manual_seed(0)
    prompt, response = lengths(tokens)
    out = []
    for i in range(sequences):
        ids = torch.randint(vocab, (prompt + response,), generator=generator).tolist()
        question = Prompt(f"p{i}", DOMAIN, tuple(ids[:prompt]), "", None, "")
        out.append(Rollout(question, 0, tuple(ids[prompt:]), torch.zeros(response), "length", 0, ""))
    return out


def build(config: Config, models: ModelSet, world: World, placement: str) -> tuple[Learner, Score, list[str]]:
    """The learner, what scores rollouts, and where the frozen models are, in words."""
    if placement == LOGITS:
        baseline = LogitsLearner(config, models, world)
        return baseline, LogitsScorer(config, models, baseline).score, ["all resident, logits materialised"]
    learner = Learner(config, models, world)
    scorer = Scorer(config, models, world, learner.frozen_base())
    lambdas = config.lambdas_for(DOMAIN)
    return learner, lambda rollouts: scorer.score(rollouts, [lambdas] * len(rollouts)), scorer.placements()


def train_step(config: Config, learner: Learner, score: Score, rollouts: Sequence[Rollout], clock: StageClock) -> float:
    """A step of the trainer between rollout and weight_sync; the loss."""
    with clock.stage("scoring"):
        scored = score(rollouts)
    lambdas = [config.lambdas_for(DOMAIN)] * len(rollouts)
    with clock.stage("reward"):
        rewarded = compute_reward(config, scored, lambdas, [None] * len(rollouts))
    with clock.stage("batch"):
        minibatches = build_minibatches(rewarded, [0] * len(rollouts), config, learner.world)
    return learner.update(minibatches, len(rollouts), clock).sums["loss"]


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Peaks and seconds by stage of every step, or where the GPU's memory did not suffice."""
    began = time.perf_counter()
    config = validate(cell["config"], Config)
    world = init_world()
    clock = StageClock(world.device)
    found: dict[str, Any] = {"steps": []}
    try:
        torch.manual_seed(config.seed)
        models = check_models(config)
        learner, score, found["placements"] = build(config, models, world, cell["placement"])
        vocab = learner.lm.model.config.vocab_size
        rollouts = random_rollouts(config.rollout.prompts_per_step, cell["tokens"], vocab)
        found["held_bytes"] = held_bytes(world.device)
        rollouts = [replace(r, logprobs=p) for r, p in zip(rollouts, learner.logprobs(rollouts), strict=True)]
        found["loading_s"] = time.perf_counter() - began
        for step in range(1 + cell["steps"]):
            loss = train_step(config, learner, score, rollouts, clock)
            metrics = clock.collect().metrics | {"loss": loss}
            if step:
                found["steps"].append(metrics)
            else:
                found["warm_up_s"] = metrics["time_s/step"]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The stage that was open last; there is none before the first step.
        spans = clock.collect().spans
        stage = spans[-1].stage if spans else "loading"
        found["out_of_memory"] = {"stage": stage, "message": str(error).splitlines()[0][:300]}
    found |= process_memory(world.device)
    world.leave()
    return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's memory was too small, as torch's allocator, CUDA or cuBLAS say it."""
    return any(words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def held_bytes(device: torch.device) -> int:
    """What is there before the first step: of torch's allocator on a GPU, else anonymous and mapped memory."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else sum(resident_parts().values())


def process_memory(device: torch.device) -> dict[str, Any]:
    """Of the host: the peak since the process began and what is resident. On a GPU: what torch took and pinned."""
    found: dict[str, Any] = {"host": {"resident_peak_bytes": resident_peak(), **resident_parts()}}
    if device.type == "cuda":
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["pinned_bytes"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    return found


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 0
    cell = json.loads(line)
    try:
        found = measure(cell)
    except UserError as error:
        print(f"error: {error}")
        return 2
    write_atomically(Path(cell["out"]), json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
